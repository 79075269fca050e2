"""Attention over squares of tokens with decomposed relative positions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from osprey_jax.ops.precision import matmul_precision
from osprey_jax.typing import Array, Float

BLOCK = 128
"""Queries whose scores are computed together, about; those of 64 x 64 tokens at once would take 0.8 GB."""


def relative_attention(
    q: Float[Array, "B Y X N H"],
    k: Float[Array, "B Y X N H"],
    v: Float[Array, "B Y X N H"],
    rel_rows: Float[Array, "P H"],
    rel_columns: Float[Array, "P H"],
) -> Float[Array, "B Y X N H"]:
    """Softmax attention in which a score also has the query times a vector for its key's relative place.

    `rel_rows[d]` belongs to a key `side - 1 - d` rows below its query, `rel_columns` likewise; both have
    `2 * side - 1` places. Scores and softmax are float32, the result has the queries' dtype.

    Reference: Li et al., MViTv2, arXiv 2112.01526, section 4.1.
    """
    b, side, _, n, h = q.shape
    einsum = partial(jnp.einsum, precision=matmul_precision(q.dtype), preferred_element_type=jnp.float32)
    distance = np.arange(side)[:, None] - np.arange(side)[None, :] + side - 1
    by_row = einsum("BYXNH,YSH->BNYXS", q, rel_rows[distance])
    by_column = einsum("BYXNH,XSH->BNYXS", q, rel_columns[distance])
    q = q.transpose(0, 3, 1, 2, 4) * h**-0.5
    k = k.reshape(b, side**2, n, h).transpose(0, 2, 3, 1)
    v = v.reshape(b, side**2, n, h).transpose(0, 2, 1, 3)

    def attend(rows: tuple[Array, Array, Array]) -> Array:
        """Queries of some rows, `(B, N, Y, X, H)`, and their biases."""
        q, by_row, by_column = rows
        scores = einsum("BNTH,BNHS->BNTS", q.reshape(b, n, -1, h), k)
        scores = scores.reshape(b, n, -1, side, side)
        scores += by_row.reshape(b, n, -1, side, 1) + by_column.reshape(b, n, -1, 1, side)
        powers = jnp.exp(scores - scores.max((-2, -1), keepdims=True))
        total = powers.sum((-2, -1))[..., None]
        out = einsum("BNTS,BNSH->BNTH", powers.reshape(b, n, -1, side**2).astype(v.dtype), v)
        return (out / total).reshape(q.shape).astype(q.dtype)

    step = max(1, BLOCK // side)
    if side <= step or side % step:
        out = attend((q, by_row, by_column))
    else:
        blocks = [
            jnp.moveaxis(x.reshape(b, n, side // step, step, *x.shape[3:]), 2, 0)
            for x in (q, by_row, by_column)
        ]
        out = jnp.moveaxis(jax.lax.map(attend, tuple(blocks)), 0, 2).reshape(q.shape)
    return out.transpose(0, 2, 3, 1, 4)
