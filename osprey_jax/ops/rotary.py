"""Rotary position embedding in the half-split layout of Hugging Face checkpoints.

Reference: Su et al., RoFormer, arXiv 2104.09864.
Differs: element `i` is rotated with element `i + H/2` (as in the checkpoints) rather than with `i + 1`.
"""

import jax.numpy as jnp
import numpy as np

from osprey_jax.typing import Array, Float, Int


def apply_rotary(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], *, theta: float
) -> Float[Array, "B T N H"]:
    """Rotates each head of `x` by its token's position; angles in float32."""
    frequencies = _frequencies(x.shape[-1] // 2, theta)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _frequencies(half: int, theta: float) -> np.ndarray:
    """Angles per position, rounded as torch does: one unit in the last place is 1e-4 at position 1000."""
    exponents = np.arange(half, dtype=np.float32) / np.float32(half)
    return np.float32(1) / (theta ** exponents.astype(np.float64)).astype(np.float32)
