"""The two parameterised layers that every part of the model is made of."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from osprey_jax.ops.norms import layer_norm, rms_norm
from osprey_jax.ops.precision import matmul_precision
from osprey_jax.typing import Array


def logical(init: nn.initializers.Initializer, *axes: str | None) -> nn.initializers.Initializer:
    """Boxes what `init` makes with the logical name of each axis."""
    return nn.with_logical_partitioning(init, axes)


class Linear(nn.Module):
    """Contracts the input's last `len(inputs)` axes with a kernel of shape `inputs + outputs`.

    `axes` names the kernel's logical axes, inputs first. Kernel and bias are cast to `dtype`; the result has
    that dtype, too, unless `out_dtype` is given.
    """

    inputs: Sequence[int]
    outputs: Sequence[int]
    axes: Sequence[str]
    use_bias: bool = True
    dtype: jnp.dtype = jnp.dtype("float32")
    out_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n = len(self.inputs)
        init = nn.initializers.variance_scaling(
            1 / 3,
            "fan_in",
            "uniform",
            in_axis=tuple(range(n)),
            out_axis=tuple(range(n, n + len(self.outputs))),
        )
        kernel = self.param("kernel", logical(init, *self.axes), (*self.inputs, *self.outputs))
        contract = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
        y = jax.lax.dot_general(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (contract, ((), ())),
            precision=matmul_precision(self.dtype),
            preferred_element_type=self.out_dtype,
        )
        if self.use_bias:
            bias = self.param(
                "bias", logical(nn.initializers.zeros, *self.axes[n:]), tuple(self.outputs)
            ).astype(y.dtype)
            y += bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y


class LayerNorm(nn.Module):
    """LayerNorm over channels."""

    eps: float
    axis: str = "channels"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", logical(nn.initializers.ones, self.axis), (x.shape[-1],))
        bias = self.param("bias", logical(nn.initializers.zeros, self.axis), (x.shape[-1],))
        return layer_norm(x, scale, bias, eps=self.eps)


class RMSNorm(nn.Module):
    """RMSNorm over the model's width."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", logical(nn.initializers.ones, "norm"), (x.shape[-1],))
        return rms_norm(x, scale, eps=self.eps)
