"""How far predicted masks are from true ones, for all pairs of them at once.

Reference: Kirillov et al., Segment Anything, arXiv 2304.02643, appendix A; Milletari et al., V-Net, arXiv
1606.04797 (dice).
Differs: plain cross-entropy in place of the focal loss, which leaves edges soft, and so masks that everything
mode takes for unstable.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from osprey_jax.ops.precision import matmul_precision
from osprey_jax.sam.transforms import THRESHOLD
from osprey_jax.typing import Array, Float


class Distances(NamedTuple):
    """Between `M` predicted masks for each of `P` prompts and `R` true ones."""

    cross_entropy: Float[Array, "P M R"]
    """Mean over pixels."""
    dice: Float[Array, "P M R"]
    """1 less twice the overlap over the sum of both areas, with 1 pixel added to either."""
    iou: Float[Array, "P M R"]
    """Of predictions made binary: intersection over union, 0 where both are empty; without a gradient."""


def distances(logits: Float[Array, "P M h w"], regions: Float[Array, "R h w"]) -> Distances:
    """Compares logits, float32, with masks of zeros and ones.

    Each distance is made of sums over pixels that are linear in the true mask, so all pairs cost a matmul.
    """
    dot = partial(jnp.matmul, precision=matmul_precision(jnp.dtype("float32")))
    shape = (*logits.shape[:2], len(regions))
    x, truth = logits.reshape(shape[0] * shape[1], -1), regions.reshape(len(regions), -1).T
    area = truth.sum(axis=0)[None]

    cross_entropy = (jax.nn.softplus(x).sum(axis=1)[:, None] - dot(x, truth)) / x.shape[1]
    p = jax.nn.sigmoid(x)
    dice = 1 - (2 * dot(p, truth) + 1) / (p.sum(axis=1)[:, None] + area + 1)
    inside = (jax.lax.stop_gradient(x) > THRESHOLD).astype(x.dtype)
    both = dot(inside, truth)
    iou = both / jnp.maximum(inside.sum(axis=1)[:, None] + area - both, 1)
    return Distances(*(found.reshape(shape) for found in (cross_entropy, dice, iou)))
