"""The training loss: next-token cross-entropy, weighted token by token.

A batch carries its weights with it (`Batch.loss_weights`), so the mean over dialogues of each one's mean over
its labelled tokens, which is the original's, holds for any batch, accumulation or packing: sums of both are
added up over the whole batch and divided once, at the end.
"""

import jax
import jax.numpy as jnp

from osprey_jax.typing import Array, Float, Int


def loss_sums(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"], loss_weights: Float[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of cross-entropies, and the sum of the weights, both float32.

    Args:
      logits: of any float dtype; computed with in float32.
      labels: the token at each place, which is predicted from the place before it; -100 where there is none.
      loss_weights: of each labelled token. That of a first token, which nothing predicts, doesn't count.
    """
    logits, labels, weights = logits[:, :-1].astype(jnp.float32), labels[:, 1:], loss_weights[:, 1:]
    # A comparison with every id, and no look-up, leaves logits that are split over the vocabulary in place.
    ids = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None, None, :]
    chosen = jnp.sum(jnp.where(ids == labels[:, :, None], logits, 0.0), axis=-1)
    cross_entropy = jax.nn.logsumexp(logits, axis=-1) - chosen
    # Masked, not only multiplied: whatever stands at padding can't make the sum infinite.
    weighted = jnp.where(weights > 0, cross_entropy * weights.astype(jnp.float32), 0.0)
    return jnp.sum(weighted), jnp.sum(weights, dtype=jnp.float32)
