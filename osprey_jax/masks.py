"""Region masks: what users give, COCO's encodings, and the mask pyramid that the model takes (NumPy)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

if TYPE_CHECKING:  # which imports JAX
    from osprey_jax.typing import ArrayLike


Taps = tuple[np.ndarray, np.ndarray, np.ndarray]
"""What `bilinear_taps` gives."""

MAX_COORDINATE = 1_000_000
"""Polygons beyond it, in pixels, are refused."""
MAX_OUTLINE = 8 * MAX_COORDINATE
"""And those with longer outlines."""


class MaskPyramid(NamedTuple):
    """What the mask-aware extractor needs of each region, at the model's sizes."""

    levels: "tuple[ArrayLike, ...]"
    """One `(..., R, Y, X)` bool mask per feature level, res2 first."""
    position: "ArrayLike"
    """`(..., R, P, P)` float32 in [0, 1]: the mask resized, not binarised."""


def bilinear_taps(in_size: int, out_size: int) -> Taps:
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


def interpolate(x: np.ndarray, taps: Taps, *, axis: int) -> np.ndarray:
    """Resizes one axis of `x`, bool or float32, to as many places as `taps` are for; gives float32."""
    lo, hi, weight = taps
    weight = weight.reshape(-1, *(1,) * (x.ndim - 1 - axis))
    near = x.take(lo, axis) * (np.float32(1) - weight)
    near += x.take(hi, axis) * weight
    return near


def mask_pyramid(masks: np.ndarray, *, level_sizes: Sequence[int], position_size: int) -> MaskPyramid:
    """Resizes `(R, h, w)` bool masks from their own resolution to every level and to the position size.

    Each target pixel reads its four neighbours and nothing else, so a thin mask can vanish at a coarse
    level; a level is True where the interpolated value is above zero. `R` may be 0. Masks that lie in memory
    column by column, as `decode_rles` gives them, are read as they lie.
    """
    if masks.ndim != 3:
        raise ValueError(f"masks must be (R, h, w), got {masks.shape}")
    turn = (0, 2, 1) if masks.strides[1] < masks.strides[2] else (0, 1, 2)
    lying = np.ascontiguousarray(masks.transpose(turn), dtype=bool)
    position = lying
    for axis in (turn[2], turn[1]):  # columns first, so that the layout doesn't decide how sums are rounded
        position = interpolate(position, bilinear_taps(position.shape[axis], position_size), axis=axis)
    return MaskPyramid(
        levels=tuple(
            np.ascontiguousarray(_binary_level(lying, side).transpose(turn)) for side in level_sizes
        ),
        position=np.ascontiguousarray(position.transpose(turn)),
    )


def _binary_level(masks: np.ndarray, side: int) -> np.ndarray:
    """Above zero exactly where a neighbour of non-zero weight is set: no arithmetic needed."""
    for axis in (1, 2):
        lo, hi, weight = bilinear_taps(masks.shape[axis], side)
        near = masks.take(lo, axis)
        if weight.any():
            near |= masks.take(np.where(weight > 0, hi, lo), axis)
        masks = near
    return masks


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


def segmentation_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Checks a COCO `segmentation` and gives it as COCO's compressed RLE, `counts` a str, without decoding.

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
    counts = rle["counts"]
    return {"size": [height, width], "counts": counts if isinstance(counts, str) else counts.decode("ascii")}


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Rasterises what `segmentation_rle` takes to a `(height, width)` bool mask; raises what it raises."""
    return decode_rles([segmentation_rle(segmentation, height, width)])[0]


def decode_rles(rles: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Decodes compressed RLEs of one size, as `segmentation_rle` gives them, to `(R, h, w)` bool.

    Each mask lies in memory column by column. Without any RLE the shape is `(0, 1, 1)`.

    Raises:
      ValueError: RLEs of several sizes, or malformed ones.
    """
    if not rles:
        return np.zeros((0, 1, 1), bool)
    if len(sizes := {tuple(rle["size"]) for rle in rles}) > 1:
        raise ValueError(f"all RLEs must have one size, got {', '.join(map(str, sorted(sizes)))}")
    ((height, width),) = sizes
    runs = [_checked_runs(rle["counts"], height, width) for rle in rles]
    inside = np.concatenate([np.arange(len(lengths)) % 2 == 1 for lengths in runs])
    columns = np.repeat(inside, np.concatenate(runs)).reshape(-1, width, height)
    return columns.transpose(0, 2, 1)


def rle_area(rle: Mapping[str, Any]) -> int:
    """The number of pixels inside a compressed RLE."""
    return int(coco_mask.area(rle))


def rle_box(rle: Mapping[str, Any]) -> list[int]:
    """x0, y0, x1, y1 of a compressed RLE in pixels, x1 and y1 exclusive; zeros for an empty mask."""
    x, y, width, height = (int(number) for number in coco_mask.toBbox(rle))
    return [x, y, x + width, y + height]


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
        # So it does in proportion to the outline, and there what is too much for it ends the process.
        points = np.asarray(polygon, np.float64).reshape(-1, 2)
        steps = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1)
        if steps.sum() > MAX_OUTLINE:
            raise ValueError(f"a polygon's outline must not be longer than {MAX_OUTLINE:,}")
    return [[float(v) for v in polygon] for polygon in polygons]


def _checked_rle(rle: dict, height: int, width: int) -> dict:
    if "size" not in rle or "counts" not in rle:
        raise ValueError(f"an RLE has the keys size and counts, got {sorted(map(str, rle))}")
    if not isinstance(rle["size"], list | tuple) or list(rle["size"]) != [height, width]:
        raise ValueError(f"the RLE is {rle['size']} (height, width), expected {[height, width]}")
    counts = rle["counts"]
    if isinstance(counts, str | bytes):
        _checked_runs(counts, height, width)
        return {"size": [height, width], "counts": counts}
    if not isinstance(counts, list):
        raise ValueError(f"an RLE's counts are a list or a string, got {type(counts).__name__}")
    if not all(isinstance(v, int) and v >= 0 for v in counts):
        raise ValueError("an RLE's counts must be non-negative integers")
    if sum(counts) != height * width:
        raise _wrong_sum(height, width)
    return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def _checked_runs(counts: str | bytes, height: int, width: int) -> np.ndarray:
    runs = _runs(counts)
    if runs is None or (runs < 0).any() or runs.sum() != height * width:
        raise _wrong_sum(height, width)
    return runs


def _wrong_sum(height: int, width: int) -> ValueError:
    return ValueError(f"the RLE's counts do not add up to its {height} x {width} pixels")


def _runs(counts: str | bytes) -> np.ndarray | None:
    """Run lengths of a compressed RLE (5 bits a character, differences from the third run on), or None."""
    data = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
    chunks = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(chunks & 0x20 == 0)
    if not len(last) or last[-1] + 1 < len(chunks) or chunks.min() < 0 or chunks.max() > 63:
        return None
    first = np.append(0, last[:-1] + 1)
    length = last + 1 - first
    if length.max() > 7:  # characters, for 32 bits and the sign
        return None
    shifts = 5 * (np.arange(len(chunks)) - np.repeat(first, length))
    runs = np.add.reduceat((chunks & 0x1F) << shifts, first)
    runs -= (chunks[last] & 0x10) << (5 * length - 4)
    for start in (1, 2):
        runs[start::2] = np.cumsum(runs[start::2])
    return runs
