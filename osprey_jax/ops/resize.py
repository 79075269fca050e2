"""Bilinear resize as torch's `interpolate(mode="bilinear", align_corners=False)`: no antialiasing."""

import jax.numpy as jnp

from osprey_jax.masks import bilinear_taps
from osprey_jax.typing import Array, Float


def resize_bilinear(x: Float[Array, "... h w"], height: int, width: int) -> Float[Array, "... Y X"]:
    """Resizes the last two axes, in float32; each target pixel reads its four neighbours."""
    top, bottom, wy = bilinear_taps(x.shape[-2], height)
    left, right, wx = bilinear_taps(x.shape[-1], width)
    wx = wx.reshape((1,) * (x.ndim - 1) + (-1,))
    wy = wy.reshape((1,) * (x.ndim - 2) + (-1, 1))
    x = x.astype(jnp.float32)
    upper, lower = x[..., top, :], x[..., bottom, :]
    upper_row = upper[..., left] * (1 - wx) + upper[..., right] * wx
    lower_row = lower[..., left] * (1 - wx) + lower[..., right] * wx
    return upper_row * (1 - wy) + lower_row * wy
