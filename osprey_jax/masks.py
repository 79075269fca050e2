"""Region masks: what users give, COCO's encodings, and the mask pyramid that the model takes (NumPy)."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

if TYPE_CHECKING:  # which imports JAX
    from osprey_jax.typing import ArrayLike


MAX_COORDINATE = 1_000_000
"""Polygons beyond it, in pixels, are refused."""


class MaskPyramid(NamedTuple):
    """What the mask-aware extractor needs of each region, at the model's sizes."""

    levels: "tuple[ArrayLike, ...]"
    """One `(..., R, Y, X)` bool mask per feature level, res2 first."""
    position: "ArrayLike"
    """`(..., R, P, P)` float32 in [0, 1]: the mask resized, not binarised."""


def bilinear_taps(in_size: int, out_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two source indices of each target pixel, and the second one's weight.

    Half-pixel centres, no antialiasing, in float32 with one rounding after the multiply-add, which is how
    torch's CPU `interpolate` computes them: whether a weight is zero decides what a binarised mask keeps.

    Returns: `lo` and `hi` int32 `(out_size,)`, `weight` float32 `(out_size,)` in [0, 1).
    """
    scale = np.float64(np.float32(in_size) / np.float32(out_size))
    source = (scale * (np.arange(out_size) + 0.5) - 0.5).astype(np.float32)
    source = np.maximum(source, np.float32(0))
    lo = np.minimum(source.astype(np.int32), in_size - 1)
    hi = np.minimum(lo + 1, in_size - 1)
    return lo, hi, (source - lo.astype(np.float32)).astype(np.float32)


def resize_square(x: np.ndarray, size: int, *, rows: int) -> np.ndarray:
    """Resizes the axis `rows` and the columns after it to `size` by `bilinear_taps`; gives float32."""
    for axis in (rows + 1, rows):
        # An axis that has its size already reads each element alone.
        if x.shape[axis] != size:
            low, high, weight = bilinear_taps(x.shape[axis], size)
            weight = weight.reshape(-1, *(1,) * (x.ndim - 1 - axis))
            x = x.take(low, axis) * (np.float32(1) - weight) + x.take(high, axis) * weight
    return x.astype(np.float32, copy=False)


def mask_pyramid(masks: np.ndarray, *, level_sizes: Sequence[int], position_size: int) -> MaskPyramid:
    """Resizes `(R, h, w)` bool masks from their own resolution to every level and to the position size.

    Each target pixel reads its four neighbours and nothing else, so a thin mask can vanish at a coarse
    level; a level is True where the interpolated value is above zero. `R` may be 0.
    """
    if masks.ndim != 3:
        raise ValueError(f"masks must be (R, h, w), got {masks.shape}")
    masks = masks.astype(bool)
    levels = tuple(_binary_level(masks, side) for side in level_sizes)
    return MaskPyramid(levels=levels, position=resize_square(masks, position_size, rows=1))


def _binary_level(masks: np.ndarray, side: int) -> np.ndarray:
    """Above zero exactly where a neighbour of non-zero weight is set: no arithmetic needed."""
    rows, columns = (_nonzero_taps(size, side) for size in masks.shape[1:])
    out = np.zeros((masks.shape[0], side, side), bool)
    for row in rows:
        picked = masks[:, row]
        for column in columns:
            out |= picked[:, :, column]
    return out


def _nonzero_taps(in_size: int, out_size: int) -> tuple[np.ndarray, np.ndarray]:
    lo, hi, weight = bilinear_taps(in_size, out_size)
    return lo, np.where(weight > 0, hi, lo)


def as_masks(masks: "ArrayLike | Iterable[ArrayLike]", image_size: tuple[int, int]) -> np.ndarray:
    """Checks what a user gives as masks and returns them as `(R, h, w)` bool.

    Accepts an array or an iterable of `(h, w)` arrays, bool, 0/1 or 0/255, at the image's own size `(h, w)`.
    All-zero masks are legal.

    Raises:
      ValueError: no masks, another number of axes, another size than the image's, other values.
    """
    if isinstance(masks, Iterable) and not hasattr(masks, "shape"):
        masks = list(masks)
        if len(shapes := sorted({np.shape(mask) for mask in masks})) > 1:
            raise ValueError(f"all masks must have one size, got {', '.join(map(str, shapes))}")
    array = np.asarray(masks)
    if masks is None or array.shape[:1] == (0,):
        raise ValueError("no masks given: pass (R, h, w) with at least one region")
    if array.ndim != 3:
        hint = "; for a single mask pass mask[None]" if array.ndim == 2 else ""
        raise ValueError(f"masks must be (R, h, w), got {array.shape}{hint}")
    if array.shape[1:] != tuple(image_size):
        raise ValueError(
            f"masks are {array.shape[1:]} (height, width), the image is {tuple(image_size)}; "
            "masks must have the image's own size"
        )
    if array.dtype == bool:
        return array
    if not np.issubdtype(array.dtype, np.number):
        raise ValueError(f"masks must be bool or numbers, got dtype {array.dtype}")
    inside = array != 0
    value = array.max()
    if value not in (0, 1, 255) or not np.array_equal(array, inside * value):
        few = ", ".join(str(v) for v in np.unique(array)[:6])
        raise ValueError(f"masks must hold only 0 and 1, or 0 and 255; found the values {few}")
    return inside


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Rasterises a COCO `segmentation` to a `(height, width)` bool mask.

    Takes a list of polygons (`[x0, y0, x1, y1, …]`), an uncompressed RLE (`counts` a list) or a compressed
    RLE (`counts` a string).

    Raises:
      ValueError: a malformed polygon or RLE, or an RLE of another size.
    """
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(_checked_polygons(segmentation), height, width))
    elif isinstance(segmentation, dict):
        rle = _checked_rle(segmentation, height, width)
    else:
        raise ValueError(f"a segmentation is a list of polygons or an RLE, got {type(segmentation).__name__}")
    return coco_mask.decode(rle).astype(bool)


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Encodes an `(h, w)` bool mask as COCO's compressed RLE, `counts` a str."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def _checked_polygons(polygons: list) -> list[list[float]]:
    if not polygons:
        raise ValueError("a segmentation without polygons")
    for polygon in polygons:
        if not isinstance(polygon, list | tuple):
            raise ValueError("a polygon segmentation is a list of coordinate lists")
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"a polygon needs at least 3 points of 2 coordinates, got {len(polygon)} numbers"
            )
        # The rasteriser takes memory in proportion to a polygon's extent, whatever the image's size.
        if not all(isinstance(v, int | float) and -MAX_COORDINATE < v < MAX_COORDINATE for v in polygon):
            raise ValueError(f"a polygon's coordinates must be numbers within ±{MAX_COORDINATE:,}")
    return [[float(v) for v in polygon] for polygon in polygons]


def _checked_rle(rle: dict, height: int, width: int) -> dict:
    if "size" not in rle or "counts" not in rle:
        raise ValueError(f"an RLE has the keys size and counts, got {sorted(map(str, rle))}")
    if not isinstance(rle["size"], list | tuple) or list(rle["size"]) != [height, width]:
        raise ValueError(f"the RLE is {rle['size']} (height, width), expected {[height, width]}")
    counts = rle["counts"]
    if isinstance(counts, list):
        if not all(isinstance(v, int) and v >= 0 for v in counts):
            raise ValueError("an RLE's counts must be non-negative integers")
        total = sum(counts)
    elif isinstance(counts, str | bytes):
        total = sum(runs) if (runs := _runs(counts)) is not None and min(runs, default=0) >= 0 else -1
    else:
        raise ValueError(f"an RLE's counts are a list or a string, got {type(counts).__name__}")
    if total != height * width:
        raise ValueError(f"the RLE's counts do not add up to its {height} x {width} pixels")
    if isinstance(counts, list):
        return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": counts}


def _runs(counts: str | bytes) -> list[int] | None:
    """Run lengths of a compressed RLE (5 bits a character, differences from the third run on), or None."""
    data = counts.encode("utf-8", "replace") if isinstance(counts, str) else counts
    runs: list[int] = []
    value = shift = 0
    for byte in data:
        chunk = byte - 48
        if not 0 <= chunk < 64 or shift > 60:
            return None
        value |= (chunk & 0x1F) << shift
        shift += 5
        if not chunk & 0x20:
            if chunk & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if shift == 0 else None
