"""Mask pyramids of masks that are on the device, as `masks.mask_pyramid` makes them on the host."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from osprey_jax.masks import MaskPyramid, bilinear_taps
from osprey_jax.ops.resize import resize_bilinear
from osprey_jax.typing import Array, Bool


@partial(jax.jit, static_argnames=("level_sizes", "position_size"))
def mask_pyramid(
    masks: Bool[Array, "R h w"], *, level_sizes: Sequence[int], position_size: int
) -> MaskPyramid:
    """Resizes masks from their own resolution to every level and to the position size.

    Levels are the host's bit by bit; positions may be rounded otherwise in the last place.
    """
    return MaskPyramid(
        levels=tuple(_binary_level(masks, side) for side in level_sizes),
        position=resize_bilinear(masks, position_size, position_size),
    )


def _binary_level(masks: Array, side: int) -> Array:
    """True where a neighbour of non-zero weight is."""
    for axis in (1, 2):
        lo, hi, weight = bilinear_taps(masks.shape[axis], side)
        masks = masks.take(lo, axis) | (masks.take(hi, axis) & jnp.expand_dims(weight > 0, (0, 3 - axis)))
    return masks
