"""How exactly matmuls are computed, by the dtype that was asked for."""

import jax
import jax.numpy as jnp


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Highest for float32, which accelerators round to fewer bits by default; their own for the rest."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
