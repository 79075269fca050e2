"""Osprey: tower, projector, mask-aware extractor and decoder, and the splicing of their tokens.

Reference: Yuan et al., Osprey, arXiv 2312.10032.
Differs: sequences have static shapes. An image occupies `num_image_tokens` places of `input_ids`, each
holding `IMAGE_TOKEN_ID`; every `<mask>` and `<pos>` occupies one. A sequence may hold several images, one
after another with their regions behind them: then `images` and masks have as many rows for each of its rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from osprey_jax.config import OspreyConfig
from osprey_jax.lora import Lora
from osprey_jax.masks import MaskPyramid
from osprey_jax.models.convnext import ConvNeXt
from osprey_jax.models.layers import Linear, constrain, unstack
from osprey_jax.models.llama import Cache, Llama
from osprey_jax.models.mask_extractor import MaskExtractor
from osprey_jax.prompt import IMAGE_TOKEN_ID
from osprey_jax.quantize import SCALE
from osprey_jax.typing import Array, Bool, Float, Int, Params


@flax.struct.dataclass
class VisualTokens:
    """What an image and its regions contribute to a sequence."""

    image: Float[Array, "B YX D"]
    """Image tokens, row-major over res4."""
    mask: Float[Array, "B R D"]
    position: Float[Array, "B R D"]


class Projector(nn.Module):
    """Two linear layers with a GELU between: res4's channels to the decoder's width."""

    dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B YX C"]) -> Float[Array, "B YX D"]:
        x = Linear((x.shape[-1],), (self.dim,), ("channels", "projector"), dtype=self.dtype, name="fc1")(x)
        x = jax.nn.gelu(x, approximate=False)
        return Linear((self.dim,), (self.dim,), ("projector", "embed"), dtype=self.dtype, name="fc2")(x)


class Osprey(nn.Module):
    """The whole model. Parameters keep their own dtype; `dtype` is what tower and decoder compute in.

    `quantization` names the decoder's low precision (`quantize.SCHEMES`), if any.
    """

    config: OspreyConfig
    dtype: jnp.dtype = jnp.dtype("float32")
    scan_layers: bool = True
    """Whether the decoder's layers are stacked; for generation they are apart (`unstack_params`)."""
    scan_blocks: bool = True
    """Whether the blocks of the tower's stages are stacked."""
    quantization: str | None = None
    remat: str = "none"
    """Of the decoder's layers, where they are stacked (`llama.Llama`)."""
    lora: Lora | None = None
    """The decoder's adapters, if any."""

    def setup(self) -> None:
        c = self.config
        self.vision = ConvNeXt(c.vision, self.dtype, self.scan_blocks)
        self.projector = Projector(c.decoder.dim, self.dtype)
        self.extractor = MaskExtractor(c.extractor, c.decoder.dim)
        how = self.scan_layers, self.quantization, self.remat, self.lora
        self.decoder = Llama(c.decoder, self.dtype, *how)

    def features(self, images: Float[Array, "B Y X 3"]) -> tuple[Array, ...]:
        """The tower's four feature maps of preprocessed images."""
        return self.vision(images)

    def visual_tokens(self, features: tuple[Array, ...], masks: MaskPyramid) -> VisualTokens:
        """Image, mask and position tokens from the tower's features and the regions' mask pyramid."""
        mask, position = self.region_tokens(features, masks)
        return VisualTokens(image=self.image_tokens(features), mask=mask, position=position)

    def image_tokens(self, features: tuple[Array, ...]) -> Float[Array, "B YX D"]:
        """Image tokens from the tower's features, row-major over res4."""
        res4 = features[2]
        return _whole(self.projector(res4.reshape(res4.shape[0], -1, res4.shape[-1])))

    def region_tokens(self, features: tuple[Array, ...], masks: MaskPyramid) -> tuple[Array, Array]:
        """Mask and position tokens, each `(B, R, D)`, from the tower's features and a mask pyramid."""
        mask, position = self.extractor(features, masks)
        return _whole(mask), _whole(position)

    def embed(self, input_ids: Int[Array, "B T"], tokens: VisualTokens) -> Float[Array, "B T D"]:
        """Embeds text ids and puts the visual tokens in their places, each kind in order of appearance.

        `tokens` has I rows for each row of `input_ids`: its images, in order; each has its regions behind it.
        """
        rows, dim = input_ids.shape[0], tokens.image.shape[-1]
        is_image = input_ids == IMAGE_TOKEN_ID
        x = _whole(self.decoder.embed(jnp.clip(input_ids, 0, self.config.decoder.vocab_size - 1)))
        x = splice(x, is_image, tokens.image.reshape(rows, -1, dim))
        for token_id, values in (
            (self.config.mask_token_id, tokens.mask),
            (self.config.position_token_id, tokens.position),
        ):
            places, values_of_row = input_ids == token_id, values.reshape(rows, -1, dim)
            order = None
            if values.shape[0] > rows:
                order = _region_order(
                    places, is_image, regions=values.shape[1], image_tokens=tokens.image.shape[1]
                )
            x = splice(x, places, values_of_row, order)
        return x

    def decode(
        self,
        input_ids: Int[Array, "B T"],
        tokens: VisualTokens,
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        prefix_segment_ids: Int[Array, "B T"] | None = None,
        prefix: Cache | None = None,
        cache: Cache | None = None,
        in_order: bool = False,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden states of a spliced sequence; the arguments are those of `Llama.__call__`."""
        return self.decoder(
            self.embed(input_ids, tokens),
            positions=positions,
            segment_ids=segment_ids,
            prefix_segment_ids=prefix_segment_ids,
            prefix=prefix,
            cache=cache,
            in_order=in_order,
        )

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Next-token logits in float32."""
        return self.decoder.logits(hidden)

    def __call__(
        self,
        images: Float[Array, "BI Y X 3"],
        masks: MaskPyramid,
        input_ids: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        prefix_segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits of whole sequences; the arguments are those of `hidden`."""
        return self.logits(
            self.hidden(
                images,
                masks,
                input_ids,
                positions=positions,
                segment_ids=segment_ids,
                prefix_segment_ids=prefix_segment_ids,
            )
        )

    def hidden(
        self,
        images: Float[Array, "BI Y X 3"],
        masks: MaskPyramid,
        input_ids: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        prefix_segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """What the head makes logits of, for whole sequences; positions 0..T-1 of one segment by default.

        `images` and `masks` have I rows for each row of `input_ids`, as many as there may be images in it.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1])[None, :], input_ids.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(input_ids)
        hidden, _ = self.decode(
            input_ids,
            self.visual_tokens(self.features(images), masks),
            positions=positions,
            segment_ids=segment_ids,
            prefix_segment_ids=prefix_segment_ids,
        )
        return hidden


def apply(model: Osprey, params: Params, method: Callable, *args: Any, **kwargs: Any) -> Any:
    """What a method of the network, such as `Osprey.features`, returns with these parameters."""
    return model.apply({"params": params}, *args, method=method, **kwargs)


def _whole(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Keeps tokens together on a mesh, split over the batch alone, so that splicing moves nothing."""
    return constrain(x, ("batch", None, "activation_embed"))


def splice(
    x: Float[Array, "B T D"],
    places: Bool[Array, "B T"],
    values: Float[Array, "B _ D"],
    order: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Replaces each row's k-th marked place by its k-th value, or by the one that `order` names."""
    if values.shape[1] == 0:
        return x
    if order is None:
        order = jnp.maximum(jnp.cumsum(places, axis=1, dtype=jnp.int32) - 1, 0)
    chosen = jnp.take_along_axis(values, order[:, :, None], axis=1, mode="clip")
    return jnp.where(places[:, :, None], chosen.astype(x.dtype), x)


def _region_order(
    places: Bool[Array, "B T"], is_image: Bool[Array, "B T"], *, regions: int, image_tokens: int
) -> Int[Array, "B T"]:
    """Which value belongs to each place: each image has `regions` of them, of which some are padding."""
    images = jnp.cumsum(is_image, axis=1, dtype=jnp.int32) - 1
    seen = jnp.cumsum(places, axis=1, dtype=jnp.int32)
    begins = is_image & (images % image_tokens == 0)
    before = jax.lax.cummax(jnp.where(begins, seen, 0), axis=1)
    return jnp.maximum(images, 0) // image_tokens * regions + jnp.maximum(seen - 1 - before, 0)


def _init(config: OspreyConfig, key: Array, **options: Any) -> Params:
    """Fresh parameters, boxed with their logical axes; `options` are fields of `Osprey`."""
    vision, size = config.vision, config.extractor.position_size
    masks = MaskPyramid(
        levels=tuple(jnp.zeros((1, 1, side, side), bool) for side in vision.level_sizes),
        position=jnp.zeros((1, 1, size, size), jnp.float32),
    )
    images = jnp.zeros((1, vision.image_size, vision.image_size, 3), jnp.float32)
    return Osprey(config, **options).init(key, images, masks, jnp.zeros((1, 1), jnp.int32))["params"]


def boxed_params(
    config: OspreyConfig,
    *,
    scan_layers: bool = True,
    scan_blocks: bool = True,
    quantization: str | None = None,
    lora: Lora | None = None,
) -> Params:
    """Shapes of all parameters, boxed with their logical axes: float32, or quantised; allocates nothing."""
    layout = {"scan_layers": scan_layers, "scan_blocks": scan_blocks}
    how: dict[str, Any] = {**layout, "quantization": quantization, "lora": lora}
    return jax.eval_shape(partial(_init, config, **how), jax.random.key(0))


def unstack_params(params: Any, *, blocks: bool) -> Params:
    """The parameters as generation takes them: the decoder's layers apart, and if told, the tower's blocks.

    What is so already stays. Stacks are taken out of `params`, as `layers.unstack` does.
    """
    decoder, vision = params["decoder"], params["vision"]
    if "layers" in decoder:
        decoder = unstack(decoder, "layers")
    if blocks:
        vision = {k: unstack(part, "blocks") if "blocks" in part else part for k, part in vision.items()}
    return {**params, "decoder": decoder, "vision": vision}


def abstract_params(
    config: OspreyConfig, dtype: jnp.dtype | str = "float32", *, quantization: str | None = None
) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves of one dtype; allocates nothing.

    Quantised kernels are integers and their scales float32, whatever `dtype` is.
    """

    def struct(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        own = path[-1].key == SCALE or not jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if own else jnp.dtype(dtype))

    return jax.tree_util.tree_map_with_path(struct, nn.unbox(boxed_params(config, quantization=quantization)))


def init_params(config: OspreyConfig, key: Array, *, lora: Lora | None = None) -> Params:
    """Fresh float32 parameters."""
    return nn.unbox(jax.jit(partial(_init, config, lora=lora))(key))
