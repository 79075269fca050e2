"""Rotary position embedding in the half-split layout of Hugging Face checkpoints.

Reference: Su et al., RoFormer, arXiv 2104.09864.
Differs: element `i` is rotated with element `i + H/2` (as in the checkpoints) rather than with `i + 1`.
"""

import jax.numpy as jnp

from osprey_jax.typing import Array, Float, Int


def apply_rotary(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], *, theta: float
) -> Float[Array, "B T N H"]:
    """Rotates each head of `x` by its token's position; angles in float32."""
    half = x.shape[-1] // 2
    frequencies = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
