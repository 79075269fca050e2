"""Normalisation over channels, computed in float32 and returned in the input's dtype."""

import jax
import jax.numpy as jnp

from osprey_jax.typing import Array, Float


def layer_norm(
    x: Float[Array, "... C"], scale: Float[Array, " C"], bias: Float[Array, " C"], *, eps: float
) -> Float[Array, "... C"]:
    """LayerNorm over the last axis with biased variance, as `torch.nn.LayerNorm`."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), -1, keepdims=True)
    normed = _scale(centred * jax.lax.rsqrt(variance + eps), scale)
    return (normed + _expand(bias, x.ndim)).astype(x.dtype)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], *, eps: float) -> Float[Array, "... D"]:
    """RMSNorm over the last axis, as Llama's."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + eps)
    return _scale(normed, scale).astype(x.dtype)


def _scale(x: Array, scale: Array) -> Array:
    return x * _expand(scale, x.ndim)


def _expand(vector: Array, ndim: int) -> Array:
    return vector.astype(jnp.float32).reshape((1,) * (ndim - 1) + (-1,))
