"""Low precision for inference: integer weights with scales, and matrix products with them.

A weight is quantised symmetrically in blocks: each block's largest magnitude becomes the largest integer, and
what a block stands for is its integers times its scale. A kernel's scales have the kernel's rank, an axis of
`n` blocks having size `n`, so the shapes of the two tell the blocks; stacked layers are nothing special.

Reference: Dettmers et al., LLM.int8(), arXiv 2208.07339: a scale per token and per output channel;
Frantar et al., GPTQ, arXiv 2210.17323: groups of 128 at four bits.
Differs: weights are rounded to the nearest integer, without data; no outliers are treated apart.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from osprey_jax.ops.precision import matmul_precision
from osprey_jax.typing import Array, ArrayLike, Float, Int

KERNEL, SCALE = "kernel", "kernel_scale"
"""Names of a quantised layer's two leaves."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a linear layer computes in low precision."""

    dtype: jnp.dtype
    """Of the weights."""
    group: int | None = None
    """Weights of an output that share a scale, along the last input axis; None for all of them."""
    activations: bool = False
    """Whether the layer's input is rounded to int8, too, with a scale for each token."""

    @property
    def weights(self) -> tuple[jnp.dtype, int | None]:
        """What tells the stored parameters."""
        return self.dtype, self.group


SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme(dtype=jnp.dtype("int8")),
    "int8_dynamic": Scheme(dtype=jnp.dtype("int8"), activations=True),
    "int4": Scheme(dtype=jnp.dtype("int4"), group=128),
}


def scheme(name: Any) -> Scheme:
    """The scheme called `name`; a ValueError lists the names there are."""
    if not isinstance(name, str) or name not in SCHEMES:
        raise ValueError(f"no quantization {name!r}; choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def checked(name: Any) -> str:
    """The name itself, if `scheme` knows it."""
    scheme(name)
    return name


def scale_shape(shape: Sequence[int], *, group: int | None) -> tuple[int, int]:
    """Shape of the scales of a matrix of inputs × outputs.

    Where `group` doesn't divide the inputs, groups are the largest that divide both.
    """
    inputs, outputs = shape
    return 1 if group is None else inputs // math.gcd(inputs, group), outputs


def quantize(
    weight: Float[ArrayLike, "..."], shape: Sequence[int], dtype: jnp.dtype
) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
    """Integers of `weight`'s shape and float32 scales of `shape`; blocks of zeros have the scale 1.

    An integer times its scale is within half a scale of the weight, as far as float32 tells; at a tie it is
    either neighbour. The same compiled or not.
    """
    blocks = _blocks(jnp.asarray(weight).astype(jnp.float32), shape)
    largest = jnp.iinfo(dtype).max
    inner = tuple(range(1, blocks.ndim, 2))
    top = jnp.max(jnp.abs(blocks), axis=inner, keepdims=True)
    # A compiler makes products of divisions by what is constant or broadcast, so these are products already.
    scale = top * np.float32(1 / largest)
    seen = scale >= jnp.finfo(jnp.float32).tiny
    rounded = jnp.round(blocks * (largest / jnp.where(seen, top, 1)))
    integers = jnp.where(seen, jnp.clip(rounded, -largest, largest), 0).astype(dtype)
    return integers.reshape(weight.shape), jnp.where(seen, scale, 1).reshape(tuple(shape))


def dequantize(
    integers: Int[Array, "..."], scale: Float[Array, "..."], dtype: jnp.dtype
) -> Float[Array, "..."]:
    """What quantised weights stand for, computed in float32."""
    blocks = _blocks(integers, scale.shape).astype(jnp.float32)
    scales = scale.reshape([n for size in scale.shape for n in (size, 1)])
    return (blocks * scales).reshape(integers.shape).astype(dtype)


def dot(
    x: Float[Array, "... D"],
    integers: Int[Array, "D F"],
    scale: Float[Array, "_ F"],
    *,
    dynamic: bool,
    dtype: jnp.dtype,
    out_dtype: jnp.dtype,
) -> Float[Array, "... F"]:
    """`x` times a quantised matrix.

    Args:
      x: the layer's input.
      integers: the matrix.
      scale: its scales.
      dynamic: whether `x` is quantised as well; each output then has one scale.
      dtype: what is computed in otherwise; all integers are exact in it.
      out_dtype: of the result.
    """
    # A loop around the layers would otherwise copy whole stacks into the layout that one product likes best.
    integers = with_layout_constraint(integers, Layout((0, 1)))
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    product = partial(jax.lax.dot_general, dimension_numbers=dims)
    precision = matmul_precision(dtype)
    if scale.shape[0] > 1:
        assert not dynamic, "int8 activations need one scale per output"
        weight = dequantize(integers, scale, dtype)
        return product(x.astype(dtype), weight, precision=precision, preferred_element_type=out_dtype)
    if dynamic:
        x8, tokens = quantize(x, (*x.shape[:-1], 1), jnp.dtype("int8"))
        y = product(x8, integers, preferred_element_type=jnp.dtype("int32")).astype(jnp.float32) * tokens
    else:
        # Converted inside the program, so that memory is read as integers.
        y = product(
            x.astype(dtype),
            integers.astype(dtype),
            precision=precision,
            preferred_element_type=jnp.dtype("float32"),
        )
    return (y * scale.reshape((1,) * (y.ndim - 1) + scale.shape[1:])).astype(out_dtype)


def scale_path(path: str) -> str:
    """Path of the scales that belong to the kernel at `path`."""
    return f"{path.rpartition('/')[0]}/{SCALE}" if path.endswith(f"/{KERNEL}") else ""


def quantize_leaf(
    kernel: Array, integers: jax.ShapeDtypeStruct, scale: jax.ShapeDtypeStruct
) -> tuple[Array, Array]:
    """A float kernel, perhaps of stacked layers, as the two leaves that are described.

    Layers are worked on one by one, so that no float32 copy of a stack is made.
    """

    def layer(weight: Array) -> tuple[Array, Array]:
        return quantize(weight.reshape(integers.shape[-2:]), scale.shape[-2:], integers.dtype)

    whole = layer if len(integers.shape) == 2 else partial(jax.lax.map, layer)
    return jax.jit(whole, out_shardings=(integers.sharding, scale.sharding))(kernel)


def quantized_leaves(
    leaves: Iterable[tuple[str, np.ndarray]], structs: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves of a float model, by path, as those of a quantised one, whose leaves `structs` describes."""
    for path, leaf in leaves:
        if (scale := scale_path(path)) not in structs:
            yield path, leaf
            continue
        integers = np.empty(structs[path].shape, structs[path].dtype)
        scales = np.empty(structs[scale].shape, np.float32)
        for layer in np.ndindex(integers.shape[:-2]):
            weight = leaf[layer].reshape(integers.shape[-2:])
            integers[layer], scales[layer] = _quantize(weight, scales.shape[-2:], integers.dtype)
        del leaf, weight
        yield path, integers
        yield scale, scales
        del integers, scales


_quantize = jax.jit(quantize, static_argnames=("shape", "dtype"))


def _blocks(x: Array, shape: Sequence[int]) -> Array:
    """Every axis in two: blocks and what is in each of them."""
    assert x.ndim == len(shape), (x.shape, shape)
    assert all(size % n == 0 for size, n in zip(x.shape, shape, strict=True)), (x.shape, shape)
    return x.reshape([m for size, n in zip(x.shape, shape, strict=True) for m in (n, size // n)])
