"""The parameterised layers that every part of the models is made of."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from osprey_jax import quantize
from osprey_jax.lora import ADAPTERS, Lora
from osprey_jax.ops.norms import layer_norm, rms_norm
from osprey_jax.ops.precision import matmul_precision
from osprey_jax.typing import Array, Float, Params


def constrain(x: Array, axes: Sequence[str | None]) -> Array:
    """Names an activation's logical axes; where there is a mesh, it is split as the rules say.

    A batch that doesn't divide over the mesh, such as a single image, stays whole. Raises ValueError for a
    name that the rules lack.
    """
    sizes, rules = jax.sharding.get_abstract_mesh().shape, dict(nn.get_logical_axis_rules())
    if rules and (unknown := [axis for axis in axes if axis is not None and axis not in rules]):
        raise ValueError(f"no sharding rule for the logical axes {unknown} of an activation's {tuple(axes)}")
    over = rules.get("batch") or ()
    parts = math.prod(sizes.get(name, 1) for name in over)
    if any(axis == "batch" and size % parts for axis, size in zip(axes, x.shape, strict=True)):
        axes = [None if axis == "batch" else axis for axis in axes]
    return nn.with_logical_constraint(x, tuple(axes))


def on_shards(
    function: Callable[..., Array],
    *args: Array,
    axes: Sequence[Sequence[str | None]],
    out: Sequence[str | None],
) -> Array:
    """Runs `function` on each device's part of `args`, for kernels, which no compiler splits.

    `axes` are the arguments' logical axes, `out` those of the result. Where some size doesn't divide over
    mesh axes, whatever these would split stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*args)
    specs: list[Any] = [nn.logical_to_mesh_axes(names) for names in (*axes, out)]

    def parts(entry: str | tuple[str, ...]) -> int:
        return math.prod(mesh.shape[name] for name in ((entry,) if isinstance(entry, str) else entry))

    whole = {
        entry
        for x, spec in zip(args, specs, strict=False)
        for size, entry in zip(x.shape, spec, strict=True)
        if entry and size % parts(entry)
    }
    *ins, result = (type(spec)(*(None if e in whole else e for e in spec)) for spec in specs)
    return jax.shard_map(function, mesh=mesh, in_specs=tuple(ins), out_specs=result, check_vma=False)(*args)


def logical(init: nn.initializers.Initializer, *axes: str | None) -> nn.initializers.Initializer:
    """Boxes what `init` makes with the logical name of each axis."""
    return nn.with_logical_partitioning(init, axes)


def unstack(params: dict[str, Any], name: str) -> Params:
    """Parameters in which what is stacked under `name` for a scan is apart: `name_0`, `name_1`, ….

    Stacks are taken out of `params[name]` one by one, so that no more than one of them need be there twice.
    """
    leaves, tree = jax.tree.flatten(params.pop(name))
    count = leaves[0].shape[0]
    for place, stacked in enumerate(leaves):
        leaves[place] = [stacked[number] for number in range(count)]
        del stacked
    parts = (jax.tree.unflatten(tree, [leaf[number] for leaf in leaves]) for number in range(count))
    return {**params, **{f"{name}_{number}": part for number, part in enumerate(parts)}}


class Linear(nn.Module):
    """Contracts the input's last `len(inputs)` axes with a kernel of shape `inputs + outputs`.

    `axes` names the kernel's logical axes, inputs first. Kernel and bias are cast to `dtype`; the result has
    that dtype, too, unless `out_dtype` is given. With a `quantization`, one of `quantize.SCHEMES`, the kernel
    holds integers, and a leaf `kernel_scale` their scales. With a `lora` that names it, the layer has an
    adapter.
    """

    inputs: Sequence[int]
    outputs: Sequence[int]
    axes: Sequence[str]
    use_bias: bool = True
    dtype: jnp.dtype = jnp.dtype("float32")
    out_dtype: jnp.dtype | None = None
    quantization: str | None = None
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = self._product(x) if self.quantization is None else self._quantized_product(x)
        if self.lora is not None and self.lora.adapts("/".join(self.path)):
            y += self._adapter_product(x, self.lora)
        if self.use_bias:
            axes = self.axes[len(self.inputs) :]
            bias = self.param("bias", logical(nn.initializers.zeros, *axes), tuple(self.outputs))
            bias = bias.astype(y.dtype)
            y += bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y

    def _product(self, x: Array) -> Array:
        n = len(self.inputs)
        init = logical(_uniform(n, len(self.outputs)), *self.axes)
        kernel = self.param("kernel", init, (*self.inputs, *self.outputs))
        return self._contract(x, kernel, n)

    def _adapter_product(self, x: Array, lora: Lora) -> Array:
        n, inner = len(self.inputs), "lora_rank"
        first = logical(_uniform(n, 1), *self.axes[:n], inner)
        last = logical(nn.initializers.zeros, inner, *self.axes[n:])
        a = self.param(ADAPTERS[0], first, (*self.inputs, lora.rank))
        b = self.param(ADAPTERS[1], last, (lora.rank, *self.outputs))
        return self._contract(self._contract(x, a, n), b * lora.scale, 1)

    def _contract(self, x: Array, kernel: Array, n: int) -> Array:
        """Contracts the last `n` axes of `x` with the first ones of a kernel."""
        contract = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
        return jax.lax.dot_general(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (contract, ((), ())),
            precision=matmul_precision(self.dtype),
            preferred_element_type=self.out_dtype,
        )

    def _quantized_product(self, x: Array) -> Array:
        n, scheme = len(self.inputs), quantize.scheme(self.quantization)
        integers, ones = partial(nn.initializers.zeros, dtype=scheme.dtype), nn.initializers.ones
        # A matrix, as that is how accelerators read integers well; of several axes the first one is split.
        shape = math.prod(self.inputs), math.prod(self.outputs)
        axes = self.axes[0], self.axes[n]
        kernel = self.param("kernel", logical(integers, *axes), shape)
        scale = self.param(
            quantize.SCALE,
            logical(ones, "scale_groups", axes[1]),
            quantize.scale_shape(shape, group=scheme.group),
        )
        y = quantize.dot(
            x.reshape(*x.shape[:-n], shape[0]),
            kernel,
            scale,
            dynamic=scheme.activations,
            dtype=self.dtype,
            out_dtype=self.out_dtype or self.dtype,
        )
        return y.reshape(*y.shape[:-1], *self.outputs)


def _uniform(inputs: int, outputs: int) -> nn.initializers.Initializer:
    """Of a kernel with so many axes of inputs and of outputs."""
    axes = tuple(range(inputs)), tuple(range(inputs, inputs + outputs))
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=axes[0], out_axis=axes[1])


class PatchConv(nn.Module):
    """A convolution whose kernel side equals its stride: one matmul over patches. Kernel `(s, s, C, C')`."""

    stride: int
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B Y X C"]) -> Array:
        b, rows, columns, channels = x.shape
        s = self.stride
        patches = x.reshape(b, rows // s, s, columns // s, s, channels).transpose(0, 1, 3, 2, 4, 5)
        shape = (s, s, channels, self.features)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1, 2))
        kernel = self.param(
            "kernel", logical(init, "kernel_rows", "kernel_columns", "channels_in", "channels"), shape
        )
        bias = self.param("bias", logical(nn.initializers.zeros, "channels"), (self.features,))
        y = jnp.einsum(
            "BYXijC,ijCD->BYXD",
            patches.astype(self.dtype),
            kernel.astype(self.dtype),
            precision=matmul_precision(self.dtype),
        )
        return y + bias.astype(self.dtype)[None, None, None, :]


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
