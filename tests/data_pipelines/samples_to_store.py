"""A source of all kinds of records, and of samples that can't be used; worker processes import it."""

import dataclasses
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from data_pipelines.records import Record, Turn
from osprey_jax.masks import encode_rle

SIZE = (6, 8)
"""Height and width of the images."""


def encoded(index: int, file_format: str = "JPEG", mode: str = "RGB") -> bytes:
    """An image file whose pixels depend on the index."""
    pixels = np.random.default_rng(index).integers(0, 255, (*SIZE, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, file_format)
    return buffer.getvalue()


def masks(index: int, size: tuple[int, int] = SIZE, count: int = 2) -> tuple[dict, ...]:
    rng = np.random.default_rng(index)
    return tuple(encode_rle(rng.random(size) < 0.5) for _ in range(count))


RECORDS: tuple[Callable[[int], Record], ...] = (
    # Everything that a record can have; turns without regions between others, a region that is named twice.
    lambda index: Record(
        sample_id=f"all/{index}",
        image=encoded(index),
        masks=masks(index, count=3),
        turns=(
            Turn("<mask><pos> und <mask><pos>? ö\n", " ein Löwe 🦁", (2, 0)),
            Turn("and here?", "nothing"),
            Turn(" In a word.", "x", (1,), phrases="short", slot="<mask><pos>"),
            Turn("", "because", phrases="why"),
        ),
        opening="<image>\nregion1<mask><pos>,region2<mask><pos>. ",
        opening_regions=(1, 1),
        broken_regions=("region 2 of 5: ö",),
        at_most=15,
    ),
    # A conversation about nothing to be seen.
    lambda index: Record(sample_id=f"text/{index}", image=None, masks=(), turns=(Turn("Hello", "Hi"),)),
    # A caption.
    lambda index: Record(
        sample_id=f"plain/{index}",
        image=encoded(index, "PNG", "P"),
        masks=(),
        turns=(Turn("", "a caption\n"),),
        opening="<image>\n",
        plain=True,
    ),
    # Masks that nobody names, an image of four colours.
    lambda index: Record(
        sample_id=f"cmyk/{index}",
        image=encoded(index, "JPEG", "CMYK"),
        masks=masks(index),
        turns=(Turn("q", "a"),),
    ),
)


@dataclasses.dataclass(frozen=True)
class AllKinds:
    """Each kind of record in turn."""

    count: int
    seconds: float = 0.0
    """How long a sample takes."""
    watched: Path | None = None
    """A line for each sample that was read."""

    name = "all_kinds"
    dropped: ClassVar = {"a sample without a turn": 3}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        time.sleep(self.seconds)
        if self.watched:
            with self.watched.open("a") as file:
                file.write(f"{index}\n")
        return RECORDS[index % len(RECORDS)](index)

    def image_key(self, index: int) -> str:
        return f"{self.name}/{index}"


def _record(index: int, image: bytes | np.ndarray | None, size: tuple[int, int] = SIZE) -> Record:
    return Record(f"bad/{index}", image, masks(index, size), (Turn("q", "a"),))


def _raises(error: Exception) -> Record:
    raise error


def _bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(buffer, "PNG")
    return buffer.getvalue()


BAD: tuple[tuple[Callable[[int], Record], str], ...] = (
    (lambda i: _raises(FileNotFoundError(f"no image {i}.jpg in /data/{i}")), "no image N.jpg in …"),
    (lambda i: _raises(ValueError(f"region {i} of 7: a polygon needs 3 points")), "region N of N: a polygon"),
    (lambda i: _raises(KeyError("file_name")), "KeyError"),
    (lambda i: _record(i, encoded(i)[:300]), "cannot read the image"),
    (lambda i: _record(i, b"GIF89a nothing"), "cannot read the image"),
    (lambda i: _record(i, b""), "cannot read the image"),
    (lambda i: _record(i, _bomb()), "cannot read the image"),
    (lambda i: _record(i, np.zeros((6, 8), np.uint8)), "an image array must be"),
    (lambda i: _record(i, encoded(i), (6, 12)), "masks are (N, N) (height, width), the image is (N, N)"),
    (lambda i: _record(i, None), "regions without an image"),
    (lambda i: Record(f"bad/{i}", encoded(i), (), (Turn("q", "\ud800"),)), "codec can"),
)
"""What can be wrong with a sample, and how that is called."""


@dataclasses.dataclass(frozen=True)
class SomeBad:
    """Every third sample is bad."""

    count: int
    name = "some_bad"
    dropped: ClassVar = {"a line that is no JSON": 1}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        if index % 3 == 1:
            return BAD[index // 3 % len(BAD)][0](index)
        return RECORDS[0](index)

    def image_key(self, index: int) -> str:
        return f"{self.name}/{index}"
