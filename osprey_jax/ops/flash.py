"""Self-attention for training, whose scores never stand whole: the accelerators' own kernels.

On TPU it is JAX's splash attention, whose mask is given as an array, so that whatever
`ops.attention.visibility` says holds, prefixes included, and blocks in which nothing is seen aren't computed;
on NVIDIA GPUs it is cuDNN's; elsewhere `ops.attention.attention`. Which one is picked when a program is
lowered, by the platform that it is lowered for.

Reference: Dao et al., FlashAttention, arXiv 2205.14135; `jax.experimental.pallas.ops.tpu.splash_attention`.
Differs: on TPU queries are scaled, and rounded to bfloat16, before the product, not in float32 after it.
Not run on hardware yet: the form for TPUs is compiled by libtpu and run in Pallas' interpreter; cuDNN's call
can't even be traced without a GPU, and only the same call of XLA's implementation is tested.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

from osprey_jax.ops.attention import attention
from osprey_jax.typing import Array, Bool, Float

_BLOCKS = (512, 384, 256)
"""Sides of splash attention's blocks, the best first."""
_SHORTEST = 512
"""Below it the scores are small, and what a model is initialised with isn't worth a kernel."""

Form = Callable[[Array, Array, Array, Array], Array]


def suits(q: Float[Array, "B T N H"]) -> bool:
    """Whether the kernels take queries like these: bfloat16, heads of 128, whole tiles of 128 tokens."""
    _, length, _, head = q.shape
    return q.dtype == jnp.bfloat16 and head == 128 and length % 128 == 0 and length >= _SHORTEST


@jax.custom_vjp
def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    mask: Bool[Array, "B T T"],
) -> Float[Array, "B T N H"]:
    """What `ops.attention.attention` computes, for queries that `suits` accepts.

    A query that sees no key gets a finite, meaningless row, as there, though not the same one. Forward and
    backward pass keep no more than the arguments; the backward pass computes the rest again.
    """
    return jax.lax.platform_dependent(q, k, v, mask, default=attention, **_kernels())


def _forward(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, tuple[Array, ...]]:
    return flash_attention(q, k, v, mask), (q, k, v, mask)


def _backward(residuals: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array, None]:
    # Were the choice itself differentiated, each form would keep what all of them need.
    def gradients(form: Form, q: Array, k: Array, v: Array, mask: Array, g: Array) -> tuple[Array, ...]:
        return jax.vjp(lambda q, k, v: form(q, k, v, mask), q, k, v)[1](g)

    kernels = {platform: partial(gradients, form) for platform, form in _kernels().items()}
    dq, dk, dv = jax.lax.platform_dependent(*residuals, g, default=partial(gradients, attention), **kernels)
    return dq, dk, dv, None


flash_attention.defvjp(_forward, _backward)


def _kernels() -> dict[str, Form]:
    """By platform. Tracing cuDNN's call asks the driver for its version, so that one needs a GPU."""
    try:
        jax.devices("cuda")
    except RuntimeError:
        return {"tpu": splash_attention}
    return {"tpu": splash_attention, "cuda": cudnn_attention}


def splash_attention(q: Array, k: Array, v: Array, mask: Array, *, interpret: bool = False) -> Array:
    """The form for TPUs; with `interpret` it runs anywhere, slowly."""
    length, head = q.shape[1], q.shape[-1]
    block = min(_BLOCKS, key=lambda size: -length % size)
    more = -length % block
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    q = jnp.pad(jnp.swapaxes(q, 1, 2) * jnp.asarray(head**-0.5, q.dtype), ((0, 0), (0, 0), (0, more), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (k, v))
    mask = _never_blind(jnp.pad(mask, ((0, 0), (0, more), (0, more))))

    def row(q: Array, k: Array, v: Array, mask: Array) -> Array:
        kernel = splash.make_splash_mha(
            mask[None], block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
        # In JAX 0.10 this flag becomes an array, which fails under jit; it only names a scope.
        infos = tuple(info._replace(is_dynamic_mask=None) for info in infos)
        out = splash.SplashAttentionKernel(*infos, **kernel.kwargs)(q, k, v)
        assert isinstance(out, Array), "residuals weren't asked for"
        return out

    return jnp.swapaxes(jax.vmap(row)(q, k, v, mask), 1, 2)[:, :length]


def cudnn_attention(
    q: Array, k: Array, v: Array, mask: Array, *, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> Array:
    """The form for NVIDIA GPUs; the mask becomes a bias of the queries' dtype, without an axis of heads."""
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    return jax.nn.dot_product_attention(
        q, k, v, mask=_never_blind(mask)[:, None], implementation=implementation
    )


def _never_blind(mask: Bool[Array, "B T T"]) -> Bool[Array, "B T T"]:
    """Lets queries that see nothing see themselves, for a softmax over nothing is not finite."""
    itself = jnp.eye(mask.shape[1], dtype=bool)[None]
    return mask | (itself & ~mask.any(axis=-1, keepdims=True))
