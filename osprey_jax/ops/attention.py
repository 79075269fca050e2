"""Attention over explicit masks, and the one rule that says which token sees which."""

import itertools
from functools import partial, reduce
from typing import NamedTuple

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


_BLOCK = 256
"""Queries that are computed together where keys are in order."""


class _Source(NamedTuple):
    """Keys and values `(P, K, S, H)`, and which of them the queries see, `(B, T, S)`."""

    keys: Array
    values: Array
    mask: Array


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    *,
    prefix: tuple[Array, Array, Array] | None = None,
    in_order: bool = False,
) -> Float[Array, "B T N H"]:
    """Grouped-query softmax attention; scores and softmax in float32, output in the queries' dtype.

    Query head `n` reads key/value head `n // G`. A query that sees no key gets a finite, meaningless row.

    `prefix` is a further set of keys and values `(P, K, S', H)` and its mask `(B, T, S')`, under one softmax.
    `P` divides `B`: row `b` reads row `b // (B / P)` of it, and no row is copied.

    `in_order` says that `T = S` and no query sees a later key, so that most of what would be masked isn't
    computed at all.
    """
    if in_order and q.shape[1] >= 2 * _BLOCK:
        cuts = [*range(0, q.shape[1], _BLOCK), q.shape[1]]
        blocks = [
            attention(q[:, a:b], k[:, :, :b], v[:, :, :b], mask[:, a:b, :b], prefix=prefix)
            for a, b in itertools.pairwise(cuts)
        ]
        return jnp.concatenate(blocks, axis=1)
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=matmul_precision(q.dtype))
    b, t, n, h = q.shape
    own = _Source(k, v, mask)
    sources = [own] if prefix is None else [_Source(*prefix), own]

    # Scores lie in the order (P, K, R, T, G, S), in which neither the prefix nor what it is multiplied with
    # has to be moved; what there is one number of for each row, in the queries' order (B, T, N).
    def by_source(x: Array, keys: Array) -> Array:
        return jnp.moveaxis(x.reshape(keys.shape[0], -1, t, k.shape[1], n // k.shape[1], x.shape[-1]), 3, 1)

    def by_row(x: Array) -> Array:
        return jnp.moveaxis(x, 1, 3).reshape(b, t, n, x.shape[-1])

    scores = []
    for keys, _, visible in sources:
        found = einsum("PKRTGH,PKSH->PKRTGS", by_source(q, keys), keys) * h**-0.5
        seen = visible.reshape(keys.shape[0], 1, -1, t, 1, keys.shape[2])
        scores.append(jnp.where(seen, found, jnp.finfo(jnp.float32).min))
    if prefix is None:
        weights = [jax.nn.softmax(scores[0], axis=-1)]
    else:
        largest = reduce(jnp.maximum, [by_row(x.max(-1, keepdims=True)) for x in scores])
        powers = [
            jnp.exp(x - by_source(largest, keys)) for x, (keys, *_) in zip(scores, sources, strict=True)
        ]
        total = reduce(jnp.add, [by_row(x.sum(-1, keepdims=True)) for x in powers])
        weights = [x / by_source(total, y.keys) for x, y in zip(powers, sources, strict=True)]
    parts = [
        by_row(einsum("PKRTGS,PKSH->PKRTGH", x.astype(y.values.dtype), y.values))
        for x, y in zip(weights, sources, strict=True)
    ]
    return reduce(jnp.add, parts).astype(q.dtype)
