"""Masks of a crop at a size: computed from logits on the device with static shapes.

Shapes depend on an image's size only in steps of `STEP` pixels, so that few programs are compiled: what is
beyond it is a logit of 0, outside of every mask.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from osprey_jax.sam.config import SamConfig
from osprey_jax.sam.transforms import THRESHOLD, Frame, upscaling
from osprey_jax.typing import Array, ArrayLike, Bool, Float, Int

STEP = 64
TAPS = 3
"""Logits along one side that a pixel depends on: two of the encoder's, each of two neighbours."""
MAX_MASKS = 64
"""Masks that are computed at a time, or fewer, where they would have more than `MAX_PIXELS`."""
MAX_PIXELS = 1 << 24


class Taps(NamedTuple):
    """A matrix with few numbers other than 0 in each of its `T` rows, over `S` columns."""

    places: Int[ArrayLike, "K T"]
    weights: Float[ArrayLike, "K T"]


class Surface(NamedTuple):
    """Where masks are computed: interpolation along both sides, with weights of 0 where no image is."""

    rows: Taps
    columns: Taps
    masks: int
    """How many fit at a time."""


def surface(
    where: Frame, config: SamConfig, *, corner: tuple[int, int] = (0, 0), whole: tuple[int, int] | None = None
) -> Surface:
    """For masks of a crop at `where.size`, in a whole image where there is one."""
    matrices = upscaling(where, mask_size=config.mask_size, side=config.encoder.image_size)
    rows, columns = (
        _taps(np.pad(matrix, ((start, -(-side // STEP) * STEP - start - len(matrix)), (0, 0))))
        for matrix, start, side in zip(matrices, corner, whole or where.size, strict=True)
    )
    fitting = max(1, MAX_PIXELS // (rows.places.shape[1] * columns.places.shape[1]))
    return Surface(rows, columns, min(MAX_MASKS, 1 << fitting.bit_length() - 1))


def _taps(matrix: Float[np.ndarray, "T S"]) -> Taps:
    """What isn't 0 in a matrix of `upscaling`: neighbours, more than three where logits outnumber pixels."""
    first = (matrix != 0).argmax(axis=1)
    last = matrix.shape[1] - 1 - (matrix != 0)[:, ::-1].argmax(axis=1)
    span = np.where(matrix.any(axis=1), last - first + 1, 1).max()
    count = min(max(TAPS, span), matrix.shape[1])
    places = np.minimum(first, matrix.shape[1] - count) + np.arange(count)[:, None]
    return Taps(jnp.asarray(places, jnp.int32), jnp.asarray(matrix[np.arange(len(matrix)), places]))


def chunks(indices: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """`size` at a time, the last ones filled up with 0, and how many of them count."""
    for start in range(0, len(indices), size):
        some = indices[start : start + size]
        yield np.pad(some, (0, size - len(some))).astype(np.int32), len(some)


@jax.jit
def upscale(
    logits: Float[Array, "N Y X"], chosen: Int[Array, "n"], rows: Taps, columns: Taps
) -> Float[Array, "n h w"]:
    """Some logits at the size of a surface.

    A program of its own: within what reads the result, XLA on a CPU computes it anew for each reduction.
    """
    x = _mix(logits[chosen].swapaxes(1, 2), columns)
    return _mix(x.swapaxes(1, 2), rows)


def _mix(x: Float[Array, "n S C"], taps: Taps) -> Float[Array, "n T C"]:
    first, *others = (
        x[:, places] * weights[None, :, None]
        for places, weights in zip(taps.places, taps.weights, strict=True)
    )
    return sum(others, start=first)


def paint(
    logits: Float[Array, "N Y X"], chosen: Int[np.ndarray, "K"], at: Surface
) -> Iterator[tuple[Bool[Array, "n w h"], int]]:
    """Masks of some logits, column by column, a chunk at a time, and how many of a chunk count.

    They are larger than the image, at the end of all three axes.
    """
    for chunk, count in chunks(chosen, at.masks):
        yield inside(upscale(logits, chunk, at.rows, at.columns)), count


def masks_of(
    logits: Float[Array, "N Y X"], chosen: Int[np.ndarray, "K"], at: Surface, size: tuple[int, int]
) -> Bool[Array, "K h w"]:
    """Masks of some logits, of an image's size."""
    parts = [
        painted[:count, : size[1], : size[0]].swapaxes(1, 2) for painted, count in paint(logits, chosen, at)
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate([jnp.zeros((0, *size), bool), *parts])


@jax.jit
def marks(x: Float[Array, "n h w"], size: Int[Array, "2"], offset: Array) -> Int[Array, "n 6"]:
    """Pixels above the higher and the lower threshold, and the box of the mask, or zeros without one."""
    within = (jnp.arange(x.shape[1]) < size[0])[:, None] & (jnp.arange(x.shape[2]) < size[1])[None]
    high = jnp.sum(x > THRESHOLD + offset, axis=(1, 2), dtype=jnp.int32)
    low = jnp.sum((x > THRESHOLD - offset) & within[None], axis=(1, 2), dtype=jnp.int32)
    mask = x > THRESHOLD
    left, right = _ends(mask.any(axis=1))
    top, bottom = _ends(mask.any(axis=2))
    return jnp.stack([high, low, left, top, right, bottom], axis=1)


def _ends(hit: Bool[Array, "n side"]) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
    """First and last place that is hit, or 0 and 0."""
    last = hit.shape[1] - 1 - jnp.argmax(hit[:, ::-1], axis=1)
    return jnp.argmax(hit, axis=1).astype(jnp.int32), jnp.where(hit.any(axis=1), last, 0).astype(jnp.int32)


@jax.jit
def inside(x: Float[Array, "n h w"]) -> Bool[Array, "n w h"]:
    """Masks, column by column."""
    return (x > THRESHOLD).swapaxes(1, 2)
