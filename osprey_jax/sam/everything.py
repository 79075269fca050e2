"""Everything in an image: masks that a grid of points leads to, the good ones, each once.

Reference: `SamAutomaticMaskGenerator` of Kirillov et al., Segment Anything, arXiv 2304.02643.
Differs: masks may be judged on fewer pixels than they have in the end; one without a pixel above the lower
of stability's thresholds goes, whatever the options.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from osprey_jax.image import load_image
from osprey_jax.masks import decode_rles, encode_rle, rle_area, rle_box
from osprey_jax.ops.nms import nms
from osprey_jax.sam.candidates import Candidates, Sheet, ahead, search
from osprey_jax.sam.crops import crops
from osprey_jax.sam.options import Options
from osprey_jax.sam.predictor import Sam
from osprey_jax.sam.small_regions import remove_small_regions
from osprey_jax.sam.surface import masks_of, paint
from osprey_jax.typing import Array, Bool

__all__ = ["Found", "Options", "find"]

Rle = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """Masks of everything, by descending expected IoU; smaller crops' first, masks that changed last."""

    records: list[dict[str, Any]]
    """As the original's: `segmentation` (COCO RLE), `area`, `bbox`, `predicted_iou`, `point_coords`,
    `stability_score` and `crop_box`. Boxes are x, y, width and height, `bbox` between inclusive corners."""
    size: tuple[int, int]
    """Of the image, `(h, w)`."""
    _sam: Sam
    _sheets: Sequence[Sheet]
    _places: Sequence[tuple[int, int] | None]
    """For each record, its crop and row of that crop's logits, unless only its RLE says what it is."""

    def masks(self, start: int = 0, stop: int | None = None) -> Bool[Array, "n h w"]:
        """The masks of some records, in their order, computed anew on the device."""
        numbers = range(len(self.records))[start:stop]
        parts = [jnp.zeros((0, *self.size), bool)]
        for crop, run in itertools.groupby(numbers, key=lambda number: _crop(self._places[number])):
            parts += self._masks_of(crop, list(run))
        return jnp.concatenate(parts[1:]) if len(parts) > 1 else parts[0]

    def _masks_of(self, crop: int | None, numbers: list[int]) -> Iterator[Array]:
        if crop is None:
            yield jnp.asarray(decode_rles([self.records[number]["segmentation"] for number in numbers]))
            return
        slots = np.array([place[1] for number in numbers if (place := self._places[number])])
        sheet = self._sheets[crop]
        yield masks_of(sheet.logits, slots, sheet.surface(self._sam.config, self.size), self.size)


def find(
    sam: Sam,
    image: np.ndarray,
    options: Options = Options(),  # noqa: B008 (it is frozen)
    *,
    max_height: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Found:
    """Finds everything in an image. The same arguments give the same result, bit for bit, on one device.

    Args:
      sam: a promptable segmenter.
      image: `(h, w, 3)` uint8.
      options: where to look, and what is good enough.
      max_height: images that are taller are judged as if they had this height in pixels, as in Osprey's demo,
        which shrinks them: how stable masks are, what is cut off by a crop's edge and what is found twice.
        Masks have the image's size all the same.
      progress: is called with how many more points are done, of `points_per_side²` for each crop.

    Raises:
      ValueError: an image that is none, or a `max_height` below 1.
    """
    if max_height is not None and max_height < 1:
        raise ValueError(f"max_height must be at least 1, got {max_height}")
    image = load_image(image)
    size = image.shape[0], image.shape[1]
    scale = 1.0 if max_height is None else min(1.0, max_height / size[0])
    parts, sheets, boxes = [], [], []
    for number, crop in enumerate(crops(size, options)):
        some, sheet = search(
            sam, image, crop, options, number=number, scale=scale, progress=progress or (lambda _: None)
        )
        parts.append(some)
        sheets.append(sheet)
        boxes.append(crop.box)
    found = Candidates.concatenate(parts)
    if len(boxes) > 1:
        areas = np.array([(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes], np.float32)
        found = found.take(nms(found.boxes, 1 / areas[found.crops], threshold=options.crop_nms_thresh))
    rles = _encode(sam, found, sheets, size)
    places: list[tuple[int, int] | None] = list(zip(found.crops.tolist(), found.slots.tolist(), strict=True))
    if options.min_mask_region_area > 0:
        kept, rles, changed = _without_small_regions(rles, options)
        found = found.take(kept)
        places = [None if changes else places[index] for index, changes in zip(kept, changed, strict=True)]
    return Found(_records(found, rles, boxes), size, sam, sheets, places)


def _encode(sam: Sam, found: Candidates, sheets: Sequence[Sheet], size: tuple[int, int]) -> list[Rle]:
    """The candidates' masks at the image's size."""
    rles: list[Rle] = [{}] * len(found.crops)
    for crop in np.unique(found.crops):
        numbers = iter(np.flatnonzero(found.crops == crop))
        at = sheets[crop].surface(sam.config, size)
        for painted, count in ahead(paint(sheets[crop].logits, found.slots[found.crops == crop], at)):
            columns = np.asarray(painted)[:count, : size[1], : size[0]]
            for mask, number in zip(columns, numbers, strict=False):
                rles[number] = encode_rle(mask.T)
    return rles


def _without_small_regions(rles: list[Rle], options: Options) -> tuple[np.ndarray, list[Rle], list[bool]]:
    """Clears masks of small regions; what that makes doubles goes, rather than what was clear.

    Returns: the indices that stay, their RLEs, and whether each has changed.
    """
    cleared, changed = list(rles), np.zeros(len(rles), bool)
    for number, rle in enumerate(rles):
        mask, changed[number] = remove_small_regions(decode_rles([rle])[0], area=options.min_mask_region_area)
        if changed[number]:
            cleared[number] = encode_rle(mask)
    kept = nms(
        np.array([_corners(rle) for rle in cleared], np.float32).reshape(-1, 4),
        (~changed).astype(np.float32),
        threshold=max(options.box_nms_thresh, options.crop_nms_thresh),
    )
    return kept, [cleared[index] for index in kept], changed[kept].tolist()


def _records(
    found: Candidates, rles: Sequence[Rle], boxes: Sequence[tuple[int, int, int, int]]
) -> list[dict[str, Any]]:
    return [
        {
            "segmentation": rle,
            "area": rle_area(rle),
            "bbox": _sides(_corners(rle)),
            "predicted_iou": float(iou),
            "point_coords": [point.tolist()],
            "stability_score": float(stability),
            "crop_box": _sides(boxes[crop]),
        }
        for rle, iou, stability, point, crop in zip(
            rles, found.iou, found.stability, found.points, found.crops, strict=True
        )
    ]


def _corners(rle: Rle) -> tuple[int, int, int, int]:
    """The box of a mask, all inclusive, zeros for an empty one."""
    x0, y0, x1, y1 = rle_box(rle)
    return x0, y0, max(0, x1 - 1), max(0, y1 - 1)


def _sides(corners: Sequence[int]) -> list[int]:
    x0, y0, x1, y1 = corners
    return [x0, y0, x1 - x0, y1 - y0]


def _crop(place: tuple[int, int] | None) -> int | None:
    return None if place is None else place[0]
