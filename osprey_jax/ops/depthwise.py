"""Depthwise 2-D convolution with a form, forward and backward, for each platform.

XLA's convolution with feature groups is slow on CPU; there the sum over the kernel's taps of shifted
inputs is several times faster. Elsewhere the convolution is taken.
"""

import jax
import jax.numpy as jnp

from osprey_jax.ops.precision import matmul_precision
from osprey_jax.typing import Array, Float


@jax.custom_vjp
def depthwise_conv(x: Float[Array, "B Y X C"], kernel: Float[Array, "k k C"]) -> Float[Array, "B Y X C"]:
    """Correlates each channel with its own odd-sided kernel; zero padding keeps the size (torch's `same`)."""
    return jax.lax.platform_dependent(x, kernel, cpu=_shifted_sums, default=_convolution)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return depthwise_conv(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    # The input's gradient is the same correlation with the kernel turned by half a turn.
    x, kernel = residuals
    dx = depthwise_conv(g, kernel[::-1, ::-1])
    dkernel = jax.lax.platform_dependent(
        x, kernel, g, cpu=_kernel_grad_sums, default=_kernel_grad_convolution
    )
    return dx, dkernel


depthwise_conv.defvjp(_forward, _backward)


def _convolution(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None, :].astype(x.dtype),
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=matmul_precision(x.dtype),
    )


def _shifts(x: Array, side: int) -> list[tuple[int, int, Array]]:
    """Every tap `(dy, dx)` with the input shifted so that the tap lies on the output's pixel."""
    rows, columns, pad = x.shape[1], x.shape[2], side // 2
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return [
        (dy, dx, padded[:, dy : dy + rows, dx : dx + columns]) for dy in range(side) for dx in range(side)
    ]


def _shifted_sums(x: Array, kernel: Array) -> Array:
    total = jnp.zeros(x.shape, jnp.float32)
    for dy, dx, shifted in _shifts(x, kernel.shape[0]):
        total += shifted.astype(jnp.float32) * kernel[dy, dx].astype(jnp.float32)[None, None, None, :]
    return total.astype(x.dtype)


def _kernel_grad_sums(x: Array, kernel: Array, g: Array) -> Array:
    g32 = g.astype(jnp.float32)
    taps = [
        jnp.sum(shifted.astype(jnp.float32) * g32, (0, 1, 2)) for *_, shifted in _shifts(x, kernel.shape[0])
    ]
    return jnp.stack(taps).reshape(kernel.shape).astype(kernel.dtype)


def _kernel_grad_convolution(x: Array, kernel: Array, g: Array) -> Array:
    return jax.vjp(lambda weights: _convolution(x, weights), kernel)[1](g)[0]
