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
    *,
    prefix: tuple[Array, Array, Array] | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query softmax attention; scores and softmax in float32, output in the queries' dtype.

    Query head `n` reads key/value head `n // G`. A query that sees no key gets a finite, meaningless row.

    `prefix` is a further set of keys and values `(P, S', K, H)` and its mask `(B, T, S')`, under one softmax.
    `P` divides `B`: row `b` reads row `b // (B / P)` of it, and no row is copied.
    """
    sources = [(k, v, mask)] if prefix is None else [prefix, (k, v, mask)]
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=matmul_precision(q.dtype))
    b, t, n, h = q.shape
    grouped = [q.reshape(keys.shape[0], -1, t, k.shape[2], n // k.shape[2], h) for keys, _, _ in sources]
    scores = [
        einsum("PRTKGH,PSKH->PRKGTS", queries, keys).reshape(b, k.shape[2], -1, t, keys.shape[1])
        for queries, (keys, *_) in zip(grouped, sources, strict=True)
    ]
    seen = jnp.concatenate([visible for *_, visible in sources], axis=-1)[:, None, None]
    masked = jnp.where(seen, jnp.concatenate(scores, axis=-1) * h**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(masked, axis=-1).astype(v.dtype)
    out, start = jnp.zeros(q.shape, jnp.float32), 0
    for keys, values, _ in sources:
        part = weights[..., start : start + keys.shape[1]]
        part = part.reshape(keys.shape[0], -1, *part.shape[1:])
        out += einsum("PRKGTS,PSKH->PRTKGH", part, values).reshape(q.shape)
        start += keys.shape[1]
    return out.astype(q.dtype)
