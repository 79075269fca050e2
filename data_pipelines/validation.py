"""Checks a user's own data (`sources.custom`) line by line and tells at once all that is wrong with it."""

import argparse
import dataclasses
import functools
import itertools
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags
from tqdm import tqdm

from data_pipelines.command_line import echo, printable
from data_pipelines.conversation import converse
from data_pipelines.images import Images, open_images
from data_pipelines.records import Record
from data_pipelines.sources.custom import images_of
from data_pipelines.sources.custom_rules import (
    BadSample,
    Problem,
    image_name,
    make_record,
    open_image,
    parse_line,
    read_lines,
)
from data_pipelines.sources.files import BOM
from data_pipelines.workers import end_with_parent
from osprey_jax.image import load_image
from osprey_jax.masks import rle_area

Level = Literal["error", "warning", "note"]

CHUNK = 64
"""Lines that are checked at a time."""
FEW_CHUNKS = 4
"""So many are checked before other processes would have started."""


class Finding(NamedTuple):
    """What there is to say about a line."""

    line: int
    """From 1; 0 for the file as a whole."""
    level: Level
    """A line with an error can't be used."""
    kind: str
    text: str


@dataclasses.dataclass
class Report:
    """What was found in a file."""

    lines: int = 0
    """Blank ones not counted."""
    regions: int = 0
    """Of the samples that can be used."""
    turns: int = 0
    """Of the samples that can be used."""
    findings: list[Finding] = dataclasses.field(default_factory=list)

    @property
    def bad_lines(self) -> list[int]:
        """The numbers of lines that can't be used; 0 for the file as a whole."""
        return sorted({finding.line for finding in self.findings if finding.level == "error"})

    @property
    def samples(self) -> int:
        """Lines that can be used."""
        return self.lines - sum(line > 0 for line in self.bad_lines)

    def of(self, level: Level) -> list[Finding]:
        """The findings of one level."""
        return [finding for finding in self.findings if finding.level == level]

    def add(self, other: "Report") -> None:
        """Takes in what was found in later lines."""
        self.lines += other.lines
        self.regions += other.regions
        self.turns += other.turns
        self.findings += other.findings


class _Chunk(NamedTuple):
    start: int
    """In bytes."""
    number: int
    """Of its first line."""
    lines: int


def validate(path: str | os.PathLike, *, images: str | os.PathLike | None = None, workers: int = 1) -> Report:
    """Checks every line of a JSONL file and every image that it names, as training would.

    Args:
      path: the file.
      images: what names are relative to, as in `sources.custom.Custom`.
      workers: processes that share the work where there is much of it.

    Raises ValueError or OSError where the file or the images' folder can't be read.
    """
    path = Path(path)
    folder = images_of(path, images)
    opened = open_images(folder)
    chunks = _chunks(path)
    report = Report()
    with tqdm(
        total=sum(chunk.lines for chunk in chunks),
        unit=" lines",
        file=sys.stderr,
        # Nothing where it is quick, and not many lines where nobody watches.
        delay=2,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    ) as progress:
        if workers > 1 and len(chunks) > FEW_CHUNKS:
            found = _in_processes(path, folder, chunks, workers)
        else:
            found = (_check_chunk(path, opened, chunk) for chunk in chunks)
        for chunk, part in zip(chunks, found, strict=True):
            report.add(part)
            progress.update(chunk.lines)
    if report.lines == 0:
        text = "the file has no samples; write one JSON object a line"
        report.findings.append(Finding(0, "error", "empty file", text))
    return report


def _chunks(path: Path) -> list[_Chunk]:
    chunks, number = [], 1
    try:
        with path.open("rb") as file:
            start = len(BOM) if file.read(len(BOM)) == BOM else 0
            file.seek(start)
            while sizes := [len(data) for data in itertools.islice(file, CHUNK)]:
                chunks.append(_Chunk(start, number, len(sizes)))
                start, number = start + sum(sizes), number + len(sizes)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    return chunks


def _in_processes(path: Path, folder: Path, chunks: list[_Chunk], workers: int) -> Iterator[Report]:
    # Forking would take locks of whatever threads there are along.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(chunks)), context, end_with_parent) as pool:
        reports = pool.map(functools.partial(_check_in_worker, path, folder), chunks)
        for chunk in chunks:
            try:
                yield next(reports)
            except BrokenProcessPool as error:
                lines = f"line {chunk.number} or a later one"
                raise OSError(f"a process that checked {lines} has died, perhaps of memory") from error


def _check_in_worker(path: Path, folder: Path, chunk: _Chunk) -> Report:
    return _check_chunk(path, _opened_images(folder), chunk)


@functools.lru_cache(maxsize=1)
def _opened_images(folder: Path) -> Images:
    """Tar files are indexed once for all chunks of a worker."""
    return open_images(folder)


def _check_chunk(path: Path, images: Images, chunk: _Chunk) -> Report:
    report = Report()
    with path.open("rb") as file, warnings.catch_warnings():
        # Pillow's, of oddities in images that hinder nobody.
        warnings.simplefilter("ignore")
        for number, _, text in read_lines(file, start=chunk.start, number=chunk.number):
            if number >= chunk.number + chunk.lines:
                break
            report.add(check_line(text, images, number))
    return report


def check_line(data: bytes, images: Images, number: int = 1) -> Report:
    """Checks one line and its images."""
    report = Report(lines=1)

    def add(level: Level, kind: str, text: str) -> None:
        report.findings.append(Finding(number, level, kind, text))

    try:
        entry = parse_line(data)
    except BadSample as error:
        for problem in error.problems:
            add("error", *problem)
        return report
    problems: list[Problem] = []
    record = None
    try:
        record = make_record(entry, images, "sample")
    except BadSample as error:
        problems += error.problems
    if record is not None:
        try:
            # Which turns are left doesn't depend on what is drawn.
            converse(record, np.random.default_rng(0))
        except ValueError as error:
            problems.append(Problem("region", f"{error}, so that no turn is left"))
        for kind, text in _doubts(record):
            add("warning", kind, text)
    try:
        name = image_name(entry)
        if (orientation := _decode(images.read(name), name)) is not None:
            add("note", "EXIF orientation", f"{name} has EXIF orientation {orientation}")
    except (ValueError, OSError) as error:
        if str(error) not in [problem.text for problem in problems]:
            problems.append(Problem("image", str(error)))
    for problem in problems:
        add("error", *problem)
    if record is not None and not problems:
        report.regions, report.turns = len(record.masks), len(record.turns)
    return report


def _decode(data: bytes, name: str) -> int | None:
    """Decodes an image as `transforms` does; gives its EXIF orientation where that turns the picture."""
    with open_image(data, name) as opened:
        size = opened.height, opened.width
        try:
            pixels = load_image(data)
        except ValueError as error:
            reason = error.__cause__ or error
            raise ValueError(f"{name} is damaged: {reason}; copy or export it again") from error
        if pixels.shape[:2] != size:
            raise ValueError(f"{name} is {pixels.shape[:2]} (height, width), its header says {size}")
        try:
            value = opened.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # Pillow raises all kinds of exceptions on broken tags, which turn nothing
            return None
    return value if value in range(2, 9) else None


def _doubts(record: Record) -> Iterator[Problem]:
    named = {region for turn in record.turns for region in turn.regions}
    for index, rle in enumerate(record.masks):
        region = f"region {index + 1}"
        if rle_area(rle) == 0:
            yield Problem("empty mask", f"{region}: no pixel of the image is inside; check its coordinates")
        if index not in named:
            text = f"{region}: no question names it, so it is never seen; write <region{index + 1}> in one"
            yield Problem("unnamed region", text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `validate`."""
    parser.add_argument("file", type=Path, metavar="FILE", help="the JSONL file")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="what names of images and masks are relative to: a directory, a .tar, or a directory of .tars "
        "(default: the directory of FILE)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that share the work (default: one per core)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints what is wrong with a file and a summary; 0 where every line can be used, otherwise 1."""
    report = validate(args.file, images=args.images, workers=args.workers)
    for finding in report.findings:
        if finding.level != "note":
            where = f"line {finding.line}: " if finding.line else ""
            echo(printable(f"{where}{finding.level}: {finding.text}").replace("\n", " "))
    if notes := report.of("note"):
        lines = ", ".join(str(note.line) for note in notes[:10]) + (", …" if len(notes) > 10 else "")
        who, where = ("1 image has", "line") if len(notes) == 1 else (f"{len(notes):,} images have", "lines")
        echo(
            f"note: {who} an EXIF orientation, which is not applied: regions belong to the pixels as they "
            f"are stored ({where} {lines})"
        )
    bad = report.lines - report.samples
    echo(
        f"{args.file}: {report.lines:,} lines, {report.samples:,} can be used, {bad:,} can't; "
        f"{report.regions:,} regions and {report.turns:,} turns in what can be used"
    )
    levels: tuple[Level, ...] = ("error", "warning")
    for level in levels:
        if counts := Counter(finding.kind for finding in report.of(level)):
            told = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())
            echo(f"{level}s: {told}")
    return 1 if report.bad_lines else 0
