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


def _padded(x: Array, side: int) -> Array:
    pad = side // 2
    return jnp.pad(x.astype(jnp.float32), ((0, 0), (pad, pad), (pad, pad), (0, 0)))


def _shifted_sums(x: Array, kernel: Array) -> Array:
    side, (rows, columns) = kernel.shape[0], x.shape[1:3]
    padded, kernel = _padded(x, side), kernel.astype(jnp.float32)[:, :, None, None, None, :]
    total = jnp.zeros(x.shape, jnp.float32)
    for dy in range(side):
        for dx in range(side):
            total += padded[:, dy : dy + rows, dx : dx + columns] * kernel[dy, dx]
    return total.astype(x.dtype)


def _kernel_grad_sums(x: Array, kernel: Array, g: Array) -> Array:
    side, (rows, columns) = kernel.shape[0], x.shape[1:3]
    padded, g32 = _padded(x, side), g.astype(jnp.float32)

    def row_of_taps(dy: Array) -> Array:
        shifted = jax.lax.dynamic_slice_in_dim(padded, dy, rows, axis=1)
        return jnp.stack([jnp.sum(shifted[:, :, dx : dx + columns] * g32, (0, 1, 2)) for dx in range(side)])

    # A loop over the kernel's rows: all taps unrolled compile and run three times as long.
    return jax.lax.map(row_of_taps, jnp.arange(side)).astype(kernel.dtype)


def _kernel_grad_convolution(x: Array, kernel: Array, g: Array) -> Array:
    return jax.vjp(lambda weights: _convolution(x, weights), kernel)[1](g)[0]
