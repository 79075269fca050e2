"""What is to be described: images with the masks of their regions, out of files of several forms."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_pipelines.sources.files import parse


class Region(NamedTuple):
    """A region of an image."""

    id: int | str
    """What its file calls it; where that doesn't, the number from 1 in its image."""
    label: str | None
    """A category's or a mask file's name, if there is one."""
    segmentation: Mapping[str, Any]
    """COCO's compressed RLE, of the image's size."""


class Fault(NamedTuple):
    """A region, or a whole image, that can't be used."""

    region: int | str | None
    reason: str


class Picture(NamedTuple):
    """An image with its regions."""

    source: Mapping[str, Any]
    """Names it in lines of the output: `image`, and `record` where it is one of ArrayRecord."""
    image: np.ndarray
    """`(h, w, 3)` uint8."""
    regions: tuple[Region, ...]
    """May be none."""
    faults: tuple[Fault, ...]
    """Regions that are left out."""


class Input(Protocol):
    """Images with masks, in an order that files alone determine. Threads may read at the same time."""

    @property
    def counts(self) -> np.ndarray | None:
        """Int `(images,)`: how many regions each has, as far as one can know without reading it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Differs where other images or regions are listed, or in another order."""
        ...

    @property
    def left_out(self) -> Sequence[str]:
        """Sentences about what belongs to no image."""
        ...

    def __len__(self) -> int: ...

    def source(self, index: int) -> Mapping[str, Any]:
        """`Picture.source`, as far as it is known without reading the image."""
        ...

    def read(self, index: int) -> Picture:
        """Raises ValueError or OSError, which say what is wrong, for an image that can't be used."""
        ...

    def image(self, source: Mapping[str, Any]) -> bytes | np.ndarray:
        """An image alone, by what lines of the output say of it; raises as `read` does."""
        ...


def read_region(annotation: Any, number: int) -> int | str:
    """What an annotation is called: its `region` or `id`, or else its number."""
    for key in ("region", "id"):
        name = annotation.get(key) if isinstance(annotation, dict) else None
        if isinstance(name, int | str) and not isinstance(name, bool):
            return name
    return number


def parse_document(data: bytes, name: str) -> Any:
    """Parses a JSON file; ValueError names it."""
    try:
        return parse(data)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
