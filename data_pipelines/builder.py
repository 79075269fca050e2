"""`prepare`: writes a source's records as ArrayRecord files that TFDS and `Stored` read.

What can't be used, a broken image for example, is left out and named in a report. Shards are written by
several processes and are complete or absent, so a run that was ended goes on where it was when it is started
again, and the files are the same in the end.
"""

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import command_line, shard_writing
from data_pipelines.records import Source
from data_pipelines.shard_writing import SHARD_RECORDS, Plan, PrepareError
from data_pipelines.stored_format import KEYS, LEFT_OUT, PREPARED, PROGRESS, SPLIT, VERSION, features

MAX_LEFT_OUT = 0.05
"""The share of samples that may be left out before `prepare` counts as failed."""
FEW = 20
"""Of fewer samples a share says nothing."""
SETTINGS = "settings.json"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run wrote, or one before it."""

    output: Path
    name: str
    records: int
    """Samples that were kept."""
    num_bytes: int
    """Size of the ArrayRecord files."""
    left_out: Mapping[str, int]
    """Samples that were not kept, by the reason."""
    dropped: Mapping[str, int]
    """Samples that the source itself doesn't count, by the reason."""
    finished_before: bool = False
    """Nothing was left to do."""

    def exceeds(self, share: float) -> bool:
        """Whether more than this share of the samples, of 20 or more, was left out."""
        lost = sum(self.left_out.values())
        return lost + self.records >= FEW and lost > share * (lost + self.records)

    def __str__(self) -> str:
        lost = sum(self.left_out.values())
        total = lost + self.records
        before = " (finished before)" if self.finished_before else ""
        lines = [f"{self.output}: {self.records:,} of {total:,} samples of {self.name}, "]
        lines[0] += f"{self.num_bytes / 1e6:,.1f} MB{before}"
        if lost:
            lines.append(
                f"left out {lost:,} ({lost / total:.2%}), each of them named in {self.output / LEFT_OUT}:"
            )
            lines += _table(self.left_out)
        if self.dropped:
            lines.append(f"not counted, {self.name} drops them when it is opened:")
            lines += _table(self.dropped)
        return "\n".join(lines)


def prepare(
    source_name: str,
    *,
    annotations: str | os.PathLike | None,
    images: str | os.PathLike | None,
    output: str | os.PathLike,
    workers: int,
) -> Report:
    """Writes a source of the catalog into the directory `output`; see `store`.

    Raises what `command_line.open_source` and `store` raise, and ValueError for a prepared directory.
    """
    from data_pipelines.catalog import CATALOG

    _check_output(output)
    if source_name not in CATALOG and (Path(source_name) / PREPARED).is_file():
        raise ValueError(f"{source_name} is prepared already: name it in place of a source, or copy it")
    source_name, annotations = command_line.split_custom(source_name, annotations)
    source = command_line.open_source(source_name, annotations=annotations, images=images)
    given = {
        "annotations": _fingerprint(annotations),
        "images": None if images is None else os.path.abspath(images),
    }
    return store(source, output, workers=workers, settings={"source": source_name, **given})


def store(
    source: Source,
    output: str | os.PathLike,
    *,
    workers: int,
    settings: Mapping[str, Any],
    shard_records: int = SHARD_RECORDS,
) -> Report:
    """Writes all records of a source into a directory, or what of them is missing or damaged there.

    Args:
      source: has to be picklable where there are several workers.
      output: a directory that is empty, isn't there, or was begun with the same settings.
      workers: processes that write; 1 writes in this one.
      settings: what the records depend on, as JSON; tells an unfinished run from a different one.
      shard_records: samples for each file.

    Raises:
      ValueError: the directory holds something else or was begun with other settings.
      PrepareError: no sample can be used, or a file can't be written, the disk is full for example. The
        shards that are complete stay for the next run.
    """
    from tensorflow_datasets.core.naming import is_valid_dataset_name

    _check_output(output)
    output = Path(output).absolute()
    dataset = re.sub("[^a-z0-9]+", "_", source.name.lower()).strip("_")
    dataset = dataset if is_valid_dataset_name(dataset) else f"osprey_{dataset}"
    plan = Plan(output, dataset, len(source), shard_records)
    settings = {"version": VERSION, "name": source.name, "samples": len(source), **settings}
    settings["shard_records"] = shard_records
    if (output / PREPARED).exists():
        prepared = _read_prepared(output)
        _check_settings(output, prepared["settings"], settings)
        if not (damaged := _damaged(output, prepared)):
            return _report(output, prepared, finished_before=True)
        print(f"missing or damaged, written again: {', '.join(damaged)}", file=sys.stderr)
    with _begun(plan, settings):
        if (output / PREPARED).exists():
            _reopen(plan, _read_prepared(output))
        shard_writing.write_shards(source, plan, workers=workers)
        prepared = _finish(source, plan, settings)
    return _report(output, prepared)


def _check_output(output: str | os.PathLike) -> None:
    # A `Path` has lost one of the two slashes.
    if re.match(r"[A-Za-z][\w+.-]+:/", os.fspath(output)):
        raise ValueError(f"files are prepared in a local directory and copied from there, {output} is none")
    if os.path.exists(output) and not os.path.isdir(output):
        raise ValueError(f"{output} is a file: name a new directory")


def _read_prepared(output: Path) -> dict[str, Any]:
    try:
        prepared: dict[str, Any] = json.loads((output / PREPARED).read_text())
    except ValueError as error:
        raise ValueError(
            f"{output} is damaged: {PREPARED} is not valid json; delete the directory"
        ) from error
    return prepared


def _damaged(output: Path, prepared: dict[str, Any]) -> list[str]:
    """Names of files that are missing, and of shards that have another size than when they were written."""
    sizes = {name: num_bytes for name, _, num_bytes in prepared["shards"]}
    sizes |= dict.fromkeys((KEYS, LEFT_OUT, "dataset_info.json", "features.json"))
    paths = [(output / name, size) for name, size in sizes.items()]
    return [
        path.name for path, size in paths if not path.is_file() or size not in (None, path.stat().st_size)
    ]


def _reopen(plan: Plan, prepared: dict[str, Any]) -> None:
    """Makes a finished directory an unfinished one that has the shards which are as they were written.

    It has none of them where what was noted of the samples can't be read any more.
    """
    damaged = _damaged(plan.output, prepared)
    try:
        keys = np.load(plan.output / KEYS)
        lines = (plan.output / LEFT_OUT).read_text("utf-8").split("\n")
        left_out = [json.loads(line) for line in lines if line]
    except (OSError, ValueError, EOFError):
        keys, left_out = np.zeros(0, np.uint64), []
    lost = sum(prepared["left_out"].values())
    if (len(keys), len(left_out)) == (prepared["records"], lost):
        start = 0
        for shard, (name, records, _) in enumerate(prepared["shards"]):
            note = {
                "keys": [f"{key:016x}" for key in keys[start : start + records].tolist()],
                "left_out": [entry for entry in left_out if entry["index"] in plan.indices(shard)],
            }
            start += records
            if name not in damaged:
                shard_writing.write_whole(plan.note(shard), json.dumps(note).encode())
    (plan.output / PREPARED).unlink()


@contextlib.contextmanager
def _begun(plan: Plan, settings: dict[str, Any]) -> Iterator[None]:
    """Holds an unfinished directory for this process alone."""
    output, progress = plan.output, plan.output / PROGRESS
    known = progress.is_dir() or (output / PREPARED).is_file()
    if output.is_dir() and any(output.iterdir()) and not known:
        raise ValueError(f"{output} has other files in it: name a new directory")
    progress.mkdir(parents=True, exist_ok=True)
    with (progress / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {output}") from error
        if (progress / SETTINGS).exists():
            _check_settings(output, json.loads((progress / SETTINGS).read_text()), settings)
        else:
            shard_writing.write_whole(progress / SETTINGS, json.dumps(settings).encode())
        _clear(progress)
        try:
            yield
        finally:
            _clear(progress)


def _clear(progress: Path) -> None:
    """Removes what processes that were ended had begun to write."""
    for path in progress.glob(f"{shard_writing.UNFINISHED}*"):
        path.unlink()


def _check_settings(output: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if changed := [key for key in before | now if before.get(key) != now.get(key)]:
        told = "; ".join(f"{key}: {before.get(key)} then, {now.get(key)} now" for key in changed)
        raise ValueError(f"{output} was written from something else: name a new directory ({told})")


def _finish(source: Source, plan: Plan, settings: dict[str, Any]) -> dict[str, Any]:
    """Puts together what the shards' writers noted, and what makes the directory readable."""
    output = plan.output
    notes = [json.loads(plan.note(shard).read_text()) for shard in range(plan.num_shards)]
    lengths = [len(note["keys"]) for note in notes]
    left_out = collections.Counter(entry["reason"] for note in notes for entry in note["left_out"])
    lines = [json.dumps(entry, ensure_ascii=False) for note in notes for entry in note["left_out"]]
    text = "".join(line + "\n" for line in lines)
    shard_writing.write_whole(output / LEFT_OUT, text.encode("utf-8", "backslashreplace"))
    if not sum(lengths):
        # Nothing of it is of use to another run.
        for path in [*map(plan.shard, range(plan.num_shards)), output / PROGRESS]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        reasons = "".join(f"; {count} × {reason}" for reason, count in left_out.most_common(3))
        raise PrepareError(f"none of the {plan.samples} samples of {source.name} can be used{reasons}")
    keys = np.array([int(key, 16) for note in notes for key in note["keys"]], np.uint64)
    with shard_writing.replacing(output / KEYS) as partial, partial.open("wb") as file:
        np.save(file, keys)
    with shard_writing.writing(output / "dataset_info.json"):
        _write_metadata(plan, lengths, source.name)
    prepared = {
        "version": VERSION,
        "name": source.name,
        "records": len(keys),
        "shards": [
            (path.name, length, path.stat().st_size)
            for path, length in zip(map(plan.shard, range(plan.num_shards)), lengths, strict=True)
        ],
        "dropped": dict(source.dropped),
        "left_out": dict(left_out.most_common()),
        "settings": settings,
    }
    shard_writing.write_whole(output / PREPARED, json.dumps(prepared, indent=1).encode())
    shutil.rmtree(output / PROGRESS)
    return prepared


def _write_metadata(plan: Plan, lengths: list[int], name: str) -> None:
    """What `tfds.builder_from_directory` reads: `dataset_info.json` and `features.json`."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.naming import ShardedFileTemplate

    template = ShardedFileTemplate(
        data_dir=plan.output, dataset_name=plan.dataset, split=SPLIT, filetype_suffix="array_record"
    )
    num_bytes = sum(plan.shard(shard).stat().st_size for shard in range(plan.num_shards))
    split = tfds.core.SplitInfo(
        name=SPLIT, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=plan.output,
        features=features(),
        split_infos=[split],
        version="1.0.0",
        check_data=False,  # which would take TensorFlow
        description=f"Records of {name}: images, regions of them and what is said about them.",
    )


def _fingerprint(annotations: str | os.PathLike | None) -> str | None:
    """Of a file its contents, so that a changed one is seen; of anything else its place."""
    if annotations is None or not os.path.isfile(annotations):
        return None if annotations is None else os.path.abspath(annotations)
    with open(annotations, "rb") as file:
        return f"blake2b:{hashlib.file_digest(file, 'blake2b').hexdigest()[:32]}"


def _report(output: Path, prepared: dict[str, Any], *, finished_before: bool = False) -> Report:
    return Report(
        output=output,
        name=prepared["name"],
        records=prepared["records"],
        num_bytes=sum(num_bytes for _, _, num_bytes in prepared["shards"]),
        left_out=prepared["left_out"],
        dropped=prepared["dropped"],
        finished_before=finished_before,
    )


def _table(counts: Mapping[str, int], rows: int = 20) -> list[str]:
    ordered = collections.Counter(counts).most_common()
    lines = [f"{count:>9,}  {reason}" for reason, count in ordered[:rows]]
    if rest := ordered[rows:]:
        lines.append(f"{sum(count for _, count in rest):>9,}  for {len(rest)} other reasons")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m data_pipelines prepare`."""
    parser.epilog = (
        "Run again, the same command goes on with what is missing, and writes again what was deleted or cut\n"
        "short since. Each sample is stored with its image, so a set of many samples an image grows: 13 MB\n"
        "of images with 40 samples each became 516 MB. The exit status is 1 if too many samples were left\n"
        "out, or if a file could not be written."
    )
    add = parser.add_argument
    add(
        "--source",
        required=True,
        metavar="NAME",
        help="one of the sources (python -m data_pipelines --help), or custom:FILE.jsonl",
    )
    add("--annotations", type=Path, metavar="FILE", help="the source's annotations")
    add(
        "--images",
        type=Path,
        metavar="DIR",
        help="its images: a directory, a .tar, a directory of .tar shards",
    )
    add("--output", required=True, metavar="DIR", help="a new directory, or an unfinished one")
    add(
        "--workers",
        type=_count,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes; default: all cores",
    )
    add(
        "--max-left-out",
        type=_share,
        default=MAX_LEFT_OUT,
        metavar="SHARE",
        help=f"of the samples, if they are {FEW} or more (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Prepares, prints the report; returns the exit status."""
    try:
        report = prepare(
            args.source,
            annotations=args.annotations,
            images=args.images,
            output=args.output,
            workers=args.workers,
        )
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # What is read has been opened by `prepare`, which tells in a ValueError where that fails.
        what = error.filename or args.output
        print(f"error: cannot write {what}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(report)
    if report.exceeds(args.max_left_out):
        print(f"error: more than {args.max_left_out:.0%} of the samples were left out", file=sys.stderr)
        return 1
    return 0


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _share(text: str) -> float:
    if not 0 <= (share := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {share}")
    return share
