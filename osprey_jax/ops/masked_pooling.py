"""Masked pooling over a mask pyramid, and the pyramid of masks that are already on the device.

Reference: Yuan et al., Osprey, arXiv 2312.10032, section 3.2.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from osprey_jax.masks import MaskPyramid
from osprey_jax.ops.resize import resize_bilinear
from osprey_jax.typing import Array, Bool


@partial(jax.jit, static_argnames=("level_sizes", "position_size"))
def mask_pyramid(
    masks: Bool[Array, "... R h w"], *, level_sizes: tuple[int, ...], position_size: int
) -> MaskPyramid:
    """`osprey_jax.masks.mask_pyramid` for masks on the device; any leading axes."""
    masks = masks.astype(jnp.float32)
    levels = tuple(resize_bilinear(masks, side, side) > 0 for side in level_sizes)
    return MaskPyramid(levels=levels, position=resize_bilinear(masks, position_size, position_size))


@jax.jit
def masked_pooling(features: Sequence[Array], levels: Sequence[Array]) -> tuple[Array, ...]:
    """Means of each level's features over each region.

    Args:
      features: per level `(B, Y, X, C)`.
      levels: per level `(B, R, Y, X)` bool.

    Returns:
      Per level `(B, R, C)` float32: sum over the region divided by its area + 1e-8, so that a region that
      is empty at a level pools to zeros there.
    """
    return tuple(_pool(x, mask) for x, mask in zip(features, levels, strict=True))


def _pool(x: Array, mask: Array) -> Array:
    total = jnp.einsum(
        "BYXC,BRYX->BRC", x.astype(jnp.float32), mask.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    area = jnp.sum(mask, axis=(2, 3), dtype=jnp.float32)
    return total / (area + 1e-8)[:, :, None]
