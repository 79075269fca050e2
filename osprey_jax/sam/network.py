"""SAM's three networks as one, whose two steps are jit-compiled: an image once, then prompts about it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from osprey_jax.sam.config import SamConfig
from osprey_jax.sam.image_encoder import ImageEncoder
from osprey_jax.sam.mask_decoder import MaskDecoder
from osprey_jax.sam.prompt_encoder import PromptEncoder
from osprey_jax.typing import Array, Float, Int, Params


class SamNetwork(nn.Module):
    """Image encoder, prompt encoder and mask decoder."""

    config: SamConfig
    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self) -> None:
        c = self.config
        self.image_encoder = ImageEncoder(c.encoder, self.dtype)
        self.prompt_encoder = PromptEncoder(c, self.dtype)
        self.mask_decoder = MaskDecoder(c.decoder, c.encoder.out_dim, self.dtype)

    def encode(self, images: Float[Array, "B Y X 3"]) -> Array:
        """Embeddings of images: see `ImageEncoder`."""
        return self.image_encoder(images)

    def decode(
        self,
        embedding: Float[Array, "Y X D"],
        places: Float[Array, "P T 2"],
        kinds: Int[Array, "P T"],
        masks: Float[Array, "P Y X"] | None = None,
    ) -> tuple[Array, Array]:
        """Masks for prompts about one image: see `PromptEncoder` and `MaskDecoder`."""
        tokens, dense = self.prompt_encoder(places, kinds, masks)
        return self.mask_decoder(embedding[None] + dense, self.prompt_encoder.encode_grid(), tokens)

    def __call__(
        self,
        images: Float[Array, "B Y X 3"],
        places: Float[Array, "B P T 2"],
        kinds: Int[Array, "B P T"],
        masks: Float[Array, "B P Y X"] | None = None,
    ) -> tuple[Array, Array]:
        """Masks for `P` prompts about each of `B` images, with a batch axis in front: for training."""
        embeddings = self.encode(images)
        each = zip(embeddings, places, kinds, [None] * len(images) if masks is None else masks, strict=True)
        logits, iou = zip(*(self.decode(*one) for one in each), strict=True)
        return jnp.stack(logits), jnp.stack(iou)


def init_params(config: SamConfig, key: Array) -> Params:
    """Fresh float32 parameters."""
    size, mask = config.encoder.image_size, config.mask_size
    places, kinds = jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 1), jnp.int32)
    boxed = jax.jit(SamNetwork(config).init)(
        key, jnp.zeros((1, size, size, 3)), places, kinds, jnp.zeros((1, 1, mask, mask))
    )
    return nn.unbox(boxed["params"])


def abstract_params(config: SamConfig, dtype: str = "float32") -> Params:
    """Shapes and dtypes of the parameters; nothing is computed."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), shapes)
