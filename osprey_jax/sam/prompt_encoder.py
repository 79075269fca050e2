"""SAM's prompt encoder: points, corners of boxes and masks in, tokens and embeddings of the image's size out.

Reference: Kirillov et al., Segment Anything, arXiv 2304.02643, appendix A; Tancik et al., Fourier Features
Let Networks Learn High Frequency Functions, arXiv 2006.10739.
Differs: points and boxes come as one list of places, each with its kind.
"""

import math

import flax.linen as nn
import jax.numpy as jnp

from osprey_jax.models.layers import LayerNorm, Linear, PatchConv
from osprey_jax.ops.activations import gelu
from osprey_jax.ops.precision import matmul_precision
from osprey_jax.sam.config import SamConfig
from osprey_jax.typing import Array, Float, Int

PADDING, BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = -1, 0, 1, 2, 3
"""Kinds of places. The first three are points' labels, padding being no point; the others boxes' corners."""


class PromptEncoder(nn.Module):
    """Fourier features of places plus what is learnt for their kinds; a small convolutional net for masks."""

    config: SamConfig
    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self) -> None:
        c = self.config
        dim, normal = c.encoder.out_dim, nn.initializers.normal(1.0)
        self.frequencies = self.param("frequencies", normal, (2, dim // 2))
        self.kinds = self.param("kinds", normal, (4, dim))
        self.not_a_point = self.param("not_a_point", normal, (dim,))
        self.no_mask = self.param("no_mask", normal, (dim,))
        few, many = c.decoder.mask_channels // 4, c.decoder.mask_channels
        self.mask_conv1 = PatchConv(2, few, self.dtype)
        self.mask_norm1 = LayerNorm(1e-6)
        self.mask_conv2 = PatchConv(2, many, self.dtype)
        self.mask_norm2 = LayerNorm(1e-6)
        self.mask_conv3 = Linear((many,), (dim,), ("channels_in", "channels"), dtype=self.dtype)

    def __call__(
        self,
        places: Float[Array, "P T 2"],
        kinds: Int[Array, "P T"],
        masks: Float[Array, "P Y X"] | None,
    ) -> tuple[Array, Array]:
        """Encodes `P` prompts.

        Args:
          places: x and y in pixels of the encoder's input, before the half pixel to their centres.
          kinds: what each is, see `PADDING` and the others.
          masks: logits of `mask_size`, as the decoder gives them, or None.

        Returns: tokens `(P, T, D)`, and what is added to the image's embedding: `(P, grid, grid, D)` for
        masks, `(1, 1, 1, D)` without.
        """
        size = self.config.encoder.image_size
        tokens = jnp.where((kinds == PADDING)[..., None], 0, self.encode_places((places + 0.5) / size))
        learnt = jnp.concatenate([self.not_a_point[None], self.kinds])[kinds + 1]
        tokens = (tokens + learnt.astype(jnp.float32)).astype(self.dtype)
        if masks is None:
            return tokens, self.no_mask.astype(self.dtype)[None, None, None]
        x = gelu(self.mask_norm1(self.mask_conv1(masks[..., None])))
        x = gelu(self.mask_norm2(self.mask_conv2(x)))
        return tokens, self.mask_conv3(x)

    def encode_places(self, places: Float[Array, "... 2"]) -> Float[Array, "... D"]:
        """Fourier features, float32, of x and y in [0, 1]."""
        exact, frequencies = matmul_precision(jnp.dtype("float32")), self.frequencies.astype(jnp.float32)
        turns = jnp.matmul(2 * places - 1, frequencies, precision=exact)
        angles = 2 * math.pi * turns
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    def encode_grid(self) -> Float[Array, "Y X D"]:
        """The features of the patches' centres."""
        side = self.config.encoder.grid_size
        centres = (jnp.arange(side, dtype=jnp.float32) + 0.5) / side
        x, y = jnp.meshgrid(centres, centres)
        return self.encode_places(jnp.stack([x, y], axis=-1)).astype(self.dtype)
