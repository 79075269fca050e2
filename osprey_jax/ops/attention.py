"""Attention over explicit masks, and the one rule that says which token sees which."""

from functools import partial

import jax
import jax.numpy as jnp

from osprey_jax.ops.precision import matmul_precision
from osprey_jax.typing import Array, Bool, Float, Int


def visibility(
    *,
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    prefix_segments: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T S"]:
    """Which key each query sees: no later position, and its own segment or its prefix.

    Segment 0 is padding and is seen by nobody. `prefix_segments` names, per query, one more segment that
    it sees (0 for none): conversations packed behind one image's prefix carry the prefix's segment there,
    with positions that go on from the prefix's end.
    """
    keys = key_segments[:, None, :]
    seen = keys == query_segments[:, :, None]
    if prefix_segments is not None:
        seen |= keys == prefix_segments[:, :, None]
    causal = key_positions[:, None, :] <= query_positions[:, :, None]
    return seen & causal & (keys != 0)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Grouped-query softmax attention; scores and softmax in float32, output in the queries' dtype.

    Query head `n` reads key/value head `n // G`. A query that sees no key gets a finite, meaningless row.
    """
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, k.shape[2], n // k.shape[2], h)
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=matmul_precision(q.dtype))
    scores = einsum("BTKGH,BSKH->BKGTS", grouped, k) * h**-0.5
    scores = jnp.where(mask[:, None, None, :, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = einsum("BKGTS,BSKH->BTKGH", weights, v)
    return out.reshape(b, t, n, h).astype(q.dtype)
