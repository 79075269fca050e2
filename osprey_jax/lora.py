"""Low-rank adapters: what is learned beside a frozen matrix, and how it becomes part of the matrix.

A matrix W of `inputs + outputs` axes gets A of `inputs + (rank,)`, and B of `(rank,) + outputs`, which begins
as zeros; the layer computes x·W + x·A·B · alpha / rank.

Reference: Hu et al., LoRA, arXiv 2106.09685.
Differs: A begins uniform, as other matrices and in the authors' program, not normal; there is no dropout.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from osprey_jax.quantize import KERNEL
from osprey_jax.typing import Array, ArrayLike, Float, Params

ADAPTERS = ("lora_a", "lora_b")
"""Names of an adapter's two leaves, which lie beside the kernel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Which matrices of the decoder's layers have adapters, and of what size."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Regular expressions; a layer is adapted where one matches its path, as `decoder/layers/mlp/up_proj`."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise ValueError(f"lora: adapters need a rank, an alpha above 0 and targets, got {self}")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"lora.targets: {target!r} is no regular expression: {error}") from None

    @property
    def scale(self) -> float:
        """What A·B is multiplied by."""
        return self.alpha / self.rank

    def adapts(self, layer: str) -> bool:
        """Whether the layer of this path, such as `decoder/layers/mlp/up_proj`, has an adapter."""
        return any(re.fullmatch(target, layer) for target in self.targets)

    def check_targets(self, layers: Iterable[str]) -> None:
        """Raises ValueError for a target that matches none of the layers that can have adapters."""
        layers = sorted(layers)
        for target in self.targets:
            if not any(re.fullmatch(target, layer) for layer in layers):
                raise ValueError(f"lora.targets: {target!r} matches none of {', '.join(layers)}")


def is_adapter(path: str) -> bool:
    """Whether the leaf of this path is a part of an adapter."""
    return path.rpartition("/")[2] in ADAPTERS


def without_adapters(params: Params) -> dict[str, Any]:
    """The tree that there is without any adapter."""
    return {
        name: without_adapters(node) if isinstance(node, Mapping) else node
        for name, node in params.items()
        if name not in ADAPTERS
    }


def merge_adapters(params: Params, lora: Lora, *, dtype: jnp.dtype | str = "float32") -> dict[str, Any]:
    """Parameters of a plain model that computes what the adapted one does.

    Merged kernels are float32 unless told, whatever they were: what adapters learn may be less than
    bfloat16's steps.
    Every other leaf stays itself. Leaves are arrays, not traced ones; kernels keep their places.
    """
    plain: dict[str, Any] = {}
    for name, node in params.items():
        if isinstance(node, Mapping):
            plain[name] = merge_adapters(node, lora, dtype=dtype)
        elif name == KERNEL and ADAPTERS[0] in params:
            a, b = (params[each] for each in ADAPTERS)
            plain[name] = merge_kernel(node, a, b, scale=lora.scale, sharding=node.sharding, dtype=dtype)
        elif name not in ADAPTERS:
            plain[name] = node
    return plain


def merge_kernel(
    kernel: Float[ArrayLike, "..."],
    a: Float[ArrayLike, "..."],
    b: Float[ArrayLike, "..."],
    *,
    scale: float,
    sharding: Sharding | None,
    dtype: jnp.dtype | str = "float32",
) -> Float[Array, "..."]:
    """`kernel + a·b * scale`, computed in float32 and cast once; all three may be stacks of layers.

    Layers are worked on one by one, so that no second float32 copy of a stack is made.
    """

    def layer(leaves: tuple[Array, Array, Array]) -> Array:
        w, a, b = (leaf.astype(jnp.float32) for leaf in leaves)
        return (w + jnp.tensordot(a, b * scale, 1, precision="highest")).astype(dtype)

    stacks = a.ndim + b.ndim - 2 - kernel.ndim
    assert stacks in (0, 1), (kernel.shape, a.shape, b.shape)
    whole = partial(jax.lax.map, layer) if stacks else layer
    return jax.jit(whole, out_shardings=sharding)((kernel, a, b))
