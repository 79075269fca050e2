"""What the commands have in common: which data they are about, and how words and pictures leave them."""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipelines.records import Source
from osprey_jax.figure import FORMATS
from osprey_jax.prompt import Tokenizer

SMALL_TOKENIZER = "tokens are those of shapes' small tokenizer; --tokenizer DIR for yours"
"""Said where there is no --tokenizer."""
_CUSTOM = "custom:"


class _SourceOption(argparse.Action):
    """Collects what belongs to one source, so that several can follow each other on the command line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        given = list(getattr(namespace, "sources", None) or [{}])
        if self.dest in given[-1]:
            given.append({})
        given[-1] = {**given[-1], self.dest: values}
        namespace.sources = given


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `open_sources` reads."""
    parser.set_defaults(sources=[])
    add = parser.add_argument_group("data", argument_default=argparse.SUPPRESS).add_argument
    add(
        "--source",
        action=_SourceOption,
        metavar="NAME",
        help="a source (python -m data_pipelines --help lists them), custom:FILE.jsonl, or a directory "
        "made by prepare",
    )
    add("--annotations", action=_SourceOption, type=Path, metavar="FILE", help="the source's annotations")
    add(
        "--images",
        action=_SourceOption,
        type=Path,
        metavar="DIR",
        help="a directory of its images, a .tar of them, or a directory of .tar shards",
    )


def open_sources(given: Sequence[Mapping[str, Any]]) -> list[Source]:
    """Opens what was named with `--source`, `--annotations` and `--images`.

    Raises ValueError or OSError, which say what is wrong with which.
    """
    from data_pipelines import catalog

    if sys.stdout is None:
        raise ValueError("stdout is closed: there is nowhere to print to")
    if not given or any("source" not in entry for entry in given):
        raise ValueError("no --source given: name one of " + ", ".join(catalog.CATALOG))
    sources: list[Source] = []
    for entry in given:
        name = entry["source"]
        paths = {key: path for key, path in entry.items() if key != "source"}
        if not paths and name not in catalog.CATALOG and Path(name).is_dir():
            sources.append(catalog.open_from_root(name, Path()))
        else:
            sources.append(open_source(name, **paths))
        if not len(sources[-1]):
            raise ValueError(f"{name} has no samples{dropped(sources[-1])}")
    return sources


def open_source(
    name: str,
    *,
    annotations: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
) -> Source:
    """Opens a source of the catalog, or `custom:FILE.jsonl`.

    Raises ValueError as `catalog.open_source` does, and for files that aren't there or can't be read.
    """
    from data_pipelines import catalog

    name, annotations = split_custom(name, annotations)
    try:
        return catalog.open_source(name, annotations=annotations, images=images)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            what = f"cannot read {error.filename}: {error.strerror}" if error.filename else str(error)
            raise ValueError(f"{name}: {what}") from error
        what = f"there is no {error.filename}" if error.filename else str(error)
        raise ValueError(f"{name}: {what}. To be got: {catalog.CATALOG[name].get}") from error


def split_custom(
    name: str, annotations: str | os.PathLike[str] | None
) -> tuple[str, str | os.PathLike[str] | None]:
    """Name and annotations of a source; those of `custom:FILE.jsonl` are in its name, as in training."""
    if not name.startswith(_CUSTOM):
        return name, annotations
    if annotations is not None:
        raise ValueError(f"{name} names its annotations itself: leave out --annotations {annotations}")
    if not (file := name.removeprefix(_CUSTOM)):
        raise ValueError(f"which file? name it as {_CUSTOM}FILE.jsonl")
    return "custom", file


def dropped(source: Source) -> str:
    """In brackets, the samples of the files that have no index; empty where there are none."""
    counts = ", ".join(f"{count:,} × {reason}" for reason, count in source.dropped.items())
    return f" (dropped: {counts})" if counts else ""


def add_tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option whose value `open_tokenizer` takes."""
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="with a tokenizer.model or tokenizer.json; default: the small one of the shapes",
    )


def open_tokenizer(directory: Path | None) -> Tokenizer:
    """A directory's tokenizer, or the one that belongs to the shapes."""
    if directory is not None:
        return Tokenizer.load(directory)
    from data_pipelines.shapes.tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(folder)
        return Tokenizer.load(folder)


def check_figure(path: Path | None) -> None:
    """Finds out before the work that a figure can be written; raises ValueError."""
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"a figure is one of {', '.join(FORMATS)}, not {path}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: it is a directory, or there is none to write it in")


def save_figure(picture: Image.Image, path: Path) -> None:
    """Writes a figure whose path `check_figure` has seen."""
    picture.save(path, format=FORMATS[path.suffix.lower()], quality=92)
    print(f"figure in {path}", file=sys.stderr)


def printable(text: str) -> str:
    """Control characters and what UTF-8 can't encode as escapes; newlines stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def echo(text: str) -> None:
    """Prints to stdout, whatever it can encode."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))
