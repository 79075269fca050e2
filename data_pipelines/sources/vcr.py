"""Visual Commonsense Reasoning: a question about numbered objects, its answer, and the reason for that."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipelines.records import Record, Rle, Turn
from data_pipelines.sources.files import SampleSource, field, parse, strings
from osprey_jax.image import image_size
from osprey_jax.masks import MAX_COORDINATE, encode_rle
from osprey_jax.prompt import IMAGE_TOKEN, OVERVIEW, REGION

_NUMBER = re.compile(r"\b(\d+)\b")
_NO_SUCH_OBJECT = "a sample with a number that names no object"


class Vcr(SampleSource):
    """Lines with `objects`, `img_fn`, `metadata_fn` and three texts; boxes and polygons have own files."""

    name = "vcr"
    lines = True

    def _why_dropped(self, sample: Any) -> str | None:
        try:
            objects = strings(sample, "objects")
            texts = [_text(sample, key) for key in ("question", "answer", "rationale")]
        except ValueError:
            return None
        numbers = (number for text in texts for number in _NUMBER.findall(text))
        # The length first: Python refuses to read numbers of thousands of digits.
        named = all(len(number) < 10 and 0 < int(number) <= len(objects) for number in numbers)
        return None if named else _NO_SUCH_OBJECT

    def _image_name(self, sample: Any) -> str:
        return field(sample, "img_fn", str)

    def _record(self, sample_id: str, *values: Any) -> Record:
        (sample,) = values
        objects = strings(sample, "objects")
        question, answer, rationale = (
            _NUMBER.sub(lambda match: f"{objects[int(match[1]) - 1]} at region{match[1]}", _text(sample, key))
            for key in ("question", "answer", "rationale")
        )
        image = self._images.read(self._image_name(sample))
        masks = self._masks(sample, image)
        if len(masks) != len(objects):
            raise ValueError(f"{len(objects)} objects, but polygons of {len(masks)}")
        regions = ",".join(f"region{number} {REGION}" for number in range(1, len(objects) + 1))
        asked = Turn(f" {question}", answer, tuple(range(len(objects))), phrases="lead_in", slot=regions)
        return Record(
            sample_id=sample_id,
            image=image,
            masks=masks,
            turns=(asked if objects else Turn(question, answer), Turn("", rationale, phrases="why")),
            opening=f"{IMAGE_TOKEN}\n.\n{OVERVIEW}",
        )

    def _masks(self, sample: Any, image: bytes) -> tuple[Rle, ...]:
        path = field(sample, "metadata_fn", str)
        data = self._images.read(path)
        try:
            metadata = parse(data)
            boxes, segments = field(metadata, "boxes", list), field(metadata, "segms", list)
            if len(boxes) != len(segments):
                raise ValueError(f"{len(boxes)} boxes, but polygons of {len(segments)} objects")
            height, width = image_size(image)
            return tuple(
                encode_rle(rasterize(box, polygons, height=height, width=width))
                for box, polygons in zip(boxes, segments, strict=True)
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _text(sample: Any, key: str) -> str:
    """The text as it was written; derived files have it under the plain key."""
    original = f"{key}_orig"
    return field(
        sample, key if isinstance(sample.get(key), str) and original not in sample else original, str
    )


def rasterize(box: Any, polygons: Any, *, height: int, width: int) -> np.ndarray:
    """The pixels of an object, bool `(height, width)`: those whose point lies inside one of its polygons.

    The points stand evenly inside the box, one for each pixel of the rounded box, so they aren't quite the
    pixels' centres. Which points on an edge are inside is decided as by matplotlib's `Path.contains_points`.

    Args:
      box: x1, y1, x2, y2, and what else there is.
      polygons: lists of `[x, y]`; one of less than three points has no inside.
      height: of the image.
      width: of the image.

    Raises:
      ValueError: something else than a box of numbers and polygons of them.
    """
    corners = _numbers(box, "a box is x1, y1, x2, y2", lambda shape: len(shape) == 1 and shape[0] >= 4)
    x1, y1, x2, y2 = map(float, corners[:4])
    # Column by column in memory, as masks are encoded.
    mask = np.zeros((height, width), bool, order="F")
    columns, xs = _spaced(x1, x2, width)
    rows, ys = _spaced(y1, y2, height)
    if not isinstance(polygons, list):
        raise ValueError(f"expected a list of polygons, got {type(polygons).__name__}")
    for polygon in polygons:
        if polygon == []:
            continue
        points = _numbers(polygon, "a polygon is a list of [x, y]", lambda shape: shape[1:] == (2,))
        if len(points) >= 3:
            mask[rows, columns] |= _inside(points, xs, ys)
    return mask


def _numbers(values: Any, form: str, fits: Callable[[tuple[int, ...]], bool]) -> np.ndarray:
    try:
        array = np.array(values)
    except ValueError:  # lists of different lengths
        raise ValueError(form) from None
    if array.dtype.kind not in "iuf" or not fits(array.shape):
        raise ValueError(f"{form}, got {str(values)[:80]}")
    array = array.astype(np.float64)
    if not (np.abs(array) < MAX_COORDINATE).all():
        raise ValueError(f"coordinates must be numbers within ±{MAX_COORDINATE:,}")
    return array


def _spaced(low: float, high: float, size: int) -> tuple[slice, np.ndarray]:
    """The pixels between two coordinates of a side, and their points, which don't touch the coordinates."""
    first, last = round(low), round(high)
    count = max(last - first, 0)
    margin = (high - low) / (count * 2) if count else 0
    points = np.linspace(low + margin, high - margin, num=count)
    kept = slice(min(max(first, 0), size), min(max(last, 0), size))
    return kept, points[max(-first, 0) : max(size - first, 0)]


def _inside(polygon: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Which points `(ys, xs)` of a grid are inside a polygon `(N, 2)`: those left of an odd number of edges.

    Reference: the crossings test of Graphics Gems IV (Haines, "Point in Polygon Strategies"), as in
      matplotlib.
    Differs: the points of a row are in ascending order, and those left of an edge come first; the last of
      them is found by bisection with the same floating-point comparison, so that few are tested.
    """
    toggles = np.zeros((len(xs) + 1, len(ys)), np.uint8)
    x0, y0 = polygon.T
    x1, y1 = np.roll(polygon, -1, axis=0).T
    # An edge meets the rows with low < y <= high.
    first = np.searchsorted(ys, np.minimum(y0, y1), side="right")
    count = np.searchsorted(ys, np.maximum(y0, y1), side="right") - first
    edge = np.repeat(np.arange(len(polygon)), count)
    row = np.arange(len(edge)) + np.repeat(first - np.cumsum(count) + count, count)

    upward = y1[edge] >= ys[row]
    across = (y1[edge] - ys[row]) * (x0 - x1)[edge]
    end, rise = x1[edge], (y0 - y1)[edge]
    low, high = np.zeros_like(row), np.full_like(row, len(xs))
    while (low < high).any():
        middle = (low + high) // 2
        crossed = (across >= (end - xs[np.minimum(middle, len(xs) - 1)]) * rise) == upward
        crossed &= low < high
        low, high = np.where(crossed, middle + 1, low), np.where(crossed, high, middle)
    np.bitwise_xor.at(toggles, (low, row), 1)
    return np.bitwise_xor.accumulate(toggles[:0:-1], axis=0)[::-1].view(bool).T
