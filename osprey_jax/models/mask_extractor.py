"""Mask-aware extractor: feature maps and region masks in, one mask token and one position token each out.

Reference: Yuan et al., Osprey, arXiv 2312.10032, section 3.2.
Differs: takes a mask pyramid made beforehand, a batch of images with equally many (padded) regions.
"""

from collections.abc import Sequence
from functools import reduce

import flax.linen as nn
import jax
import jax.numpy as jnp

from osprey_jax.config import ExtractorConfig
from osprey_jax.masks import MaskPyramid
from osprey_jax.models.layers import Linear, constrain
from osprey_jax.ops.masked_pooling import masked_pooling
from osprey_jax.typing import Array

LEVELS = ("res2", "res3", "res4", "res5")


class MaskExtractor(nn.Module):
    """Pools each level over each region, projects and sums; encodes the position mask by an MLP.

    Runs in float32 whatever the rest of the model computes in, as the release does.
    """

    config: ExtractorConfig
    out_dim: int

    @nn.compact
    def __call__(self, features: Sequence[Array], masks: MaskPyramid) -> tuple[Array, Array]:
        """Returns mask tokens and position tokens, each `(B, R, D)` float32."""
        dim, out = self.config.dim, self.out_dim
        pooled = masked_pooling(tuple(features), tuple(masks.levels))
        projected = [
            Linear((x.shape[-1],), (dim,), ("channels", "extractor"), name=level)(x)
            for level, x in zip(LEVELS, pooled, strict=True)
        ]
        summed = reduce(jnp.add, projected)
        mask_tokens = Linear((dim,), (out,), ("extractor", "embed"), name="feat_linear")(summed)

        x = jnp.asarray(masks.position, jnp.float32)
        x = x.reshape(*x.shape[:2], self.config.position_size**2)
        x = jax.nn.relu(Linear((x.shape[-1],), (dim,), ("pixels", "extractor"), name="mask_linear_0")(x))
        # Without the constraints jaxlib 0.10.2 partitions these products wrongly on a mesh of 2 × 2 × 2.
        x = constrain(x, ("batch", None, "activation_extractor"))
        x = jax.nn.relu(Linear((dim,), (dim,), ("extractor", "extractor_out"), name="mask_linear_1")(x))
        x = constrain(x, ("batch", None, "activation_embed"))
        return mask_tokens, Linear((dim,), (out,), ("extractor", "embed"), name="mask_linear_2")(x)
