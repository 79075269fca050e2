"""Users' points, boxes and masks, checked and brought into the form of SAM's prompt encoder."""

import jax
import jax.numpy as jnp
import numpy as np

from osprey_jax.sam.prompt_encoder import BACKGROUND, BOTTOM_RIGHT, FOREGROUND, PADDING, TOP_LEFT
from osprey_jax.sam.transforms import Frame, to_input
from osprey_jax.typing import Array, ArrayLike


def encode_prompts(
    where: Frame,
    *,
    points: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    boxes: ArrayLike | None = None,
    masks: ArrayLike | None = None,
    mask_size: int,
) -> tuple[np.ndarray, np.ndarray, Array | None]:
    """Places `(N, T, 2)` in the encoder's input, their kinds `(N, T)`, and masks `(N, Y, X)` or None.

    As in the original, points without a box are followed by one place that is none. The arguments are those
    of `Sam.predict`; raises ValueError that says which of them is wrong and how.
    """
    given = {"points": points, "boxes": boxes, "masks": masks}
    counts = {name: _count(name, x) for name, x in given.items() if x is not None}
    if not counts:
        raise ValueError("give points, boxes or masks")
    if len(set(counts.values())) > 1 or 0 in counts.values():
        told = " and ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"give one of each kind for each prompt, and at least one prompt, got {told}")
    if labels is not None and points is None:
        raise ValueError("labels are those of points; give points as well")
    (count,) = set(counts.values())
    places, kinds = np.zeros((count, 0, 2)), np.zeros((count, 0), np.int32)
    if points is not None:
        places, kinds = _checked_points(points, labels, where.size)
        if boxes is None:
            places = np.pad(places, ((0, 0), (0, 1), (0, 0)))
            kinds = np.pad(kinds, ((0, 0), (0, 1)), constant_values=PADDING)
    if boxes is not None:
        corners = _checked_boxes(boxes, where.size).reshape(-1, 2, 2)
        places = np.concatenate([places, corners], axis=1)
        ends = np.broadcast_to(np.array([TOP_LEFT, BOTTOM_RIGHT], np.int32), (count, 2))
        kinds = np.concatenate([kinds, ends], axis=1)
    return to_input(places, where), kinds, None if masks is None else _checked_masks(masks, mask_size)


def _checked_points(
    points: ArrayLike, labels: ArrayLike | None, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    array = _numbers("points", points)
    if array.ndim != 3 or array.shape[2] != 2 or array.shape[1] == 0:
        raise ValueError(f"points must be (N, P, 2), x and y of P points for each prompt, got {array.shape}")
    kinds = np.ones(array.shape[:2]) if labels is None else _numbers("labels", labels)
    if kinds.shape != array.shape[:2]:
        raise ValueError(f"labels must be {array.shape[:2]}, one for each of the points, got {kinds.shape}")
    if not np.isin(kinds, (FOREGROUND, BACKGROUND, PADDING)).all():
        raise ValueError(f"labels must be 1 (inside), 0 (outside) or -1 (no point), got {kinds.tolist()}")
    array = np.where(kinds[..., None] == PADDING, 0, array)
    for number, place in enumerate(array.reshape(-1, 2)):
        if not _within(place, size):
            raise ValueError(
                f"point {number // array.shape[1]}: x, y = {_told(place)} lies outside of the image, "
                f"which is {size[1]} wide and {size[0]} high"
            )
    return array, kinds.astype(np.int32)


def _checked_boxes(boxes: ArrayLike, size: tuple[int, int]) -> np.ndarray:
    array = _numbers("boxes", boxes)
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"boxes must be (N, 4), x0, y0, x1 and y1 for each prompt, got {array.shape}")
    for number, box in enumerate(array):
        if not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(
                f"box {number} is empty: x0, y0, x1, y1 = {_told(box)}; x1 must be above x0 and y1 above y0"
            )
        if not (_within(box[:2], size) and _within(box[2:], size)):
            raise ValueError(
                f"box {number}: x0, y0, x1, y1 = {_told(box)} goes beyond the image, "
                f"which is {size[1]} wide and {size[0]} high"
            )
    return array


def _checked_masks(masks: ArrayLike, mask_size: int) -> Array:
    if not isinstance(masks, jax.Array):
        masks = jnp.asarray(_numbers("masks", masks), jnp.float32)
    shape = masks.shape
    if len(shape) != 3 or shape[1:] != (mask_size, mask_size):
        raise ValueError(
            f"masks must be (N, {mask_size}, {mask_size}), logits of a prediction before, got {shape}"
        )
    return masks


def _count(name: str, values: ArrayLike) -> int:
    try:
        return len(values)
    except TypeError:
        raise ValueError(f"{name} must have an axis of prompts, got {values!r:.80}") from None


def _numbers(name: str, values: ArrayLike) -> np.ndarray:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, as many for each prompt, got {values!r:.80}") from None
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite numbers")
    return array


def _within(place: np.ndarray, size: tuple[int, int]) -> bool:
    return bool((place >= 0).all() and place[0] <= size[1] and place[1] <= size[0])


def _told(numbers: np.ndarray) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
