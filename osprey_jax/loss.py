"""The training loss: next-token cross-entropy, weighted token by token.

A batch carries its weights with it (`Batch.loss_weights`), so the mean over dialogues of each one's mean over
its labelled tokens, which is the original's, holds for any batch, accumulation or packing: sums of both are
added up over the whole batch and divided once, at the end.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from osprey_jax.typing import Array, Float, Int

CHUNK = 256
"""Places of each row whose logits are there at a time."""


def loss_sums(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"], loss_weights: Float[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of cross-entropies, and the sum of the weights, both float32.

    Args:
      logits: of any float dtype; computed with in float32.
      labels: the token at each place, which is predicted from the place before it; -100 where there is none.
      loss_weights: of each labelled token. That of a first token, which nothing predicts, doesn't count.
    """
    return _sums(logits[:, :-1], labels[:, 1:], loss_weights[:, 1:])


def _sums(logits: Array, labels: Array, weights: Array) -> tuple[Array, Array]:
    """Of logits that stand where what they predict does."""
    logits = logits.astype(jnp.float32)
    # A comparison with every id, and no look-up, leaves logits that are split over the vocabulary in place.
    ids = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None, None, :]
    chosen = jnp.sum(jnp.where(ids == labels[:, :, None], logits, 0.0), axis=-1)
    cross_entropy = jax.nn.logsumexp(logits, axis=-1) - chosen
    # Masked, not only multiplied: whatever stands at padding can't make the sum infinite.
    weighted = jnp.where(weights > 0, cross_entropy * weights.astype(jnp.float32), 0.0)
    return jnp.sum(weighted), jnp.sum(weights, dtype=jnp.float32)


def chunked_loss_sums(
    head: Callable[[Array], Array],
    hidden: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    loss_weights: Float[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`loss_sums` of `head(hidden)`, of which only `CHUNK` places a row are there at a time.

    The backward pass computes the logits of a chunk again. `head` acts on each place alone.
    """
    length = hidden.shape[1]
    if length <= CHUNK:
        return loss_sums(head(hidden), labels, loss_weights)
    # What a place predicts stands at the next one.
    places = length - 1
    count = math.ceil(places / CHUNK)
    size = math.ceil(places / count)

    def chunks(x: Array) -> Array:
        padding = [(0, 0), (0, count * size - places)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def of_chunk(hidden: Array, labels: Array, weights: Array) -> tuple[Array, Array]:
        return _sums(head(hidden), labels, weights)

    def add(total: tuple[Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple, None]:
        sums = of_chunk(*chunk)
        return (total[0] + sums[0], total[1] + sums[1]), None

    parts = chunks(hidden[:, :-1]), chunks(labels[:, 1:]), chunks(loss_weights[:, 1:])
    total, _ = jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), parts)
    return total
