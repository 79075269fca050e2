"""Checks a user's own data (`sources.custom`) line by line and tells at once all that is wrong with it."""

import argparse
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
    seems_normalized,
    why_no_jsonl,
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

_REGION_WORD = re.compile(r"\bregion([1-9][0-9]{0,5})\b")


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


def validate(
    path: str | os.PathLike,
    *,
    images: str | os.PathLike | None = None,
    workers: int = 1,
    tell: Callable[[Report], None] | None = None,
) -> Report:
    """Checks every line of a JSONL file and every image that it names, as training would.

    Args:
      path: the file.
      images: what names are relative to, as in `sources.custom.Custom`.
      workers: processes that share the work where there is much of it.
      tell: called with what is found, part by part in the order of lines.

    Raises ValueError or OSError where the file or the images' folder can't be read.
    """
    path = Path(path)
    folder = images_of(path, images)
    opened = open_images(folder)
    chunks = _chunks(path)
    report = Report()

    def take(part: Report) -> None:
        report.add(part)
        if tell is not None:
            tell(part)

    if (text := _why_no_jsonl(path)) is not None:
        take(Report(findings=[Finding(0, "error", "JSON", text)]))
        return report
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
            found = _in_order(path, opened, chunks)
        # Closed at once, so that an exception here ends the processes too.
        with contextlib.closing(found):
            for chunk, part in zip(chunks, found, strict=True):
                if part.findings and sys.stderr.isatty():
                    progress.clear()
                take(part)
                progress.update(chunk.lines)
    if report.lines == 0:
        text = "the file has no samples; write one JSON object a line"
        take(Report(findings=[Finding(0, "error", "empty file", text)]))
    return report


def _why_no_jsonl(path: Path) -> str | None:
    with path.open("rb") as file:
        start = len(BOM) if file.read(len(BOM)) == BOM else 0
        first = next(read_lines(file, start=start), None)
    reason = None if first is None else why_no_jsonl(path, first.text)
    return None if reason is None else f"{path} {reason}"


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


def _in_order(path: Path, images: Images, chunks: list[_Chunk]) -> Generator[Report, None, None]:
    for chunk in chunks:
        yield _check_chunk(path, images, chunk)


def _in_processes(
    path: Path, folder: Path, chunks: list[_Chunk], workers: int
) -> Generator[Report, None, None]:
    # Forking would take locks of whatever threads there are along.
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(chunks))
    processes, receivers = [], []
    try:
        resource_tracker.ensure_running()  # which would let interrupts in
        with _interrupts_held():  # processes inherit that, and leave Ctrl-C to this one from the start
            for first in range(workers):
                receiver, sender = context.Pipe(duplex=False)
                arguments = (path, folder, chunks[first::workers], sender)
                process = context.Process(target=_worker, args=arguments, daemon=True)
                process.start()
                sender.close()  # so that a process that dies ends what is received
                processes.append(process)
                receivers.append(receiver)
        for place, chunk in enumerate(chunks):
            try:
                part = receivers[place % workers].recv()
            except (EOFError, ConnectionError) as error:
                lines = f"line {chunk.number} or a later one"
                raise OSError(f"a process that checked {lines} has died, perhaps of memory") from error
            if isinstance(part, Exception):
                raise part
            yield part
    finally:
        with _interrupts_held():
            for process in processes:
                process.terminate()
                process.join()


def _worker(path: Path, folder: Path, chunks: list[_Chunk], sender: Connection) -> None:
    end_with_parent()
    try:
        images = open_images(folder)
        for chunk in chunks:
            sender.send(_check_chunk(path, images, chunk))
    except (ValueError, OSError) as error:
        sender.send(error)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Lets Ctrl-C wait until the block is done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
        for kind, text in (*_doubts(record), *_doubtful_numbers(record), *_doubtful_coordinates(entry)):
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
    named = Counter(record.opening_regions)
    for turn in record.turns:
        named.update(turn.regions)
    alone = {turn.regions[0] for turn in record.turns if len(turn.regions) == 1}
    for index, rle in enumerate(record.masks):
        region = f"region {index + 1}"
        if rle_area(rle) == 0:
            if not named[index]:
                training = ""
            elif named[index] == 1 and index in alone:
                training = "; training leaves it out with its question and the answer"
            else:
                training = "; training keeps it, as an empty region"
            text = f"{region}: no pixel of the image is inside{training}; check its coordinates"
            yield Problem("empty mask", text)
        if not named[index]:
            text = f"{region}: no question names it, so it is never seen; write <region{index + 1}> in one"
            yield Problem("unnamed region", text)


def _doubtful_numbers(record: Record) -> Iterator[Problem]:
    """Where answers number regions otherwise than the model can count them."""
    if record.opening_regions or not record.masks:
        return
    shown: list[int] = []
    told: set[int] = set()
    for place, turn in enumerate(record.turns, 1):
        shown += [index for index in dict.fromkeys(turn.regions) if index not in shown]
        for number in dict.fromkeys(map(int, _REGION_WORD.findall(turn.answer))):
            if number in told or shown[number - 1 : number] == [number - 1]:
                continue
            told.add(number)
            if number - 1 in shown:
                why = f"which is number {shown.index(number - 1) + 1} of those that questions have named"
            else:
                why = "which no question has named by then"
            text = f'message {2 * place}: the answer says region{number}, {why}; write "list_regions": true'
            yield Problem("region number", text)


def _doubtful_coordinates(entry: dict[str, Any]) -> Iterator[Problem]:
    for number, region in enumerate(entry["regions"], 1):
        if seems_normalized(region):
            text = f"region {number}: all of them are within 0 and 1, but coordinates are in pixels"
            yield Problem("coordinates", text)


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
        type=_at_least_one,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that share the work (default: one per core)",
    )


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Prints what is wrong with a file and a summary; 0 where every line can be used, otherwise 1."""
    report = Report()

    def tell(part: Report) -> None:
        report.add(part)
        for finding in part.findings:
            if finding.level != "note":
                where = f"line {finding.line}: " if finding.line else ""
                echo(printable(f"{where}{finding.level}: {finding.text}").replace("\n", " "))

    try:
        validate(args.file, images=args.images, workers=args.workers, tell=tell)
    except KeyboardInterrupt:
        if report.lines:
            _summarize(f"{args.file}, not to its end", report)
        raise
    _summarize(str(args.file), report)
    return 1 if report.bad_lines else 0


def _summarize(what: str, report: Report) -> None:
    if notes := report.of("note"):
        lines = ", ".join(str(note.line) for note in notes[:10]) + (", …" if len(notes) > 10 else "")
        who, where = ("1 image has", "line") if len(notes) == 1 else (f"{len(notes):,} images have", "lines")
        echo(
            f"note: {who} an EXIF orientation, which is not applied: regions belong to the pixels as they "
            f"are stored ({where} {lines})"
        )
    bad = report.lines - report.samples
    echo(
        f"{what}: {report.lines:,} lines, {report.samples:,} can be used, {bad:,} can't; "
        f"{report.regions:,} regions and {report.turns:,} turns in what can be used"
    )
    levels: tuple[Level, ...] = ("error", "warning")
    for level in levels:
        if counts := Counter(finding.kind for finding in report.of(level)):
            told = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())
            echo(f"{level}s: {told}")
