"""Forward agreement with torch, from the image's file to the logits: where it ends, if it does.

Each comparison here runs on the steps' own outputs, so a difference shows at the first step that makes it; in
`test_gradients` each block gets the same input on both sides. The tolerance is `bridge.FORWARD`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from osprey_jax.image import preprocess
from osprey_jax.masks import MaskPyramid
from osprey_jax.models.llama import DecoderLayer, Place
from osprey_jax.models.osprey import Osprey, VisualTokens
from osprey_jax.ops.attention import visibility
from osprey_jax.ops.masked_pooling import mask_pyramid, masked_pooling
from osprey_jax.typing import Array, Params
from tests.parity.bridge import Pair, assert_steps_agree, largest_difference
from tests.parity.reference import IMAGE_ID, OspreyReference, ReferenceConfig
from tests.parity.scenes import REGIONS, picture, prompt, region_masks

LEVELS = ("res2", "res3", "res4", "res5")
Steps = dict[str, np.ndarray]


def our_steps(pair: Pair) -> Callable[[Params, Array, MaskPyramid, Array], dict[str, Array]]:
    """One program of the whole model that returns what it computes on the way."""
    model, decoder = pair.model, pair.config.decoder

    def steps(params: Params, images: Array, masks: MaskPyramid, ids: Array) -> dict[str, Array]:
        variables = {"params": params}
        features = model.apply(variables, images, method=Osprey.features)
        pooled = masked_pooling(features, masks.levels)
        tokens = model.apply(variables, features, masks, method=Osprey.visual_tokens)
        x = model.apply(variables, ids, tokens, method=Osprey.embed)
        found = dict(zip(LEVELS, features, strict=True))
        found |= {f"pooled {name}": value for name, value in zip(LEVELS, pooled, strict=True)}
        found |= {"image tokens": tokens.image, "mask tokens": tokens.mask}
        found |= {"position tokens": tokens.position, "spliced": x}
        positions, ones = jnp.arange(ids.shape[1])[None, :], jnp.ones_like(ids)
        mask = visibility(
            query_positions=positions, key_positions=positions, query_segments=ones, key_segments=ones
        )
        for index in range(decoder.num_layers):
            layer = jax.tree.map(lambda leaf, i=index: leaf[i], params["decoder"]["layers"])
            block = DecoderLayer(decoder, jnp.dtype("float32"))
            x, _ = block.apply({"params": layer}, x, None, None, Place(positions, mask))
            found[f"layer {index}"] = x
        # Not from the layers above but through the scan.
        hidden, _ = model.apply(
            variables, ids, tokens, positions=positions, segment_ids=ones, method=Osprey.decode
        )
        return found | {"logits": model.apply(variables, hidden, method=Osprey.logits)}

    return jax.jit(steps)


@torch.no_grad()
def reference_steps(
    reference: OspreyReference, image: np.ndarray, masks: np.ndarray, ids: list[int]
) -> Steps:
    """The same steps in torch, channels last and with a batch axis as ours."""
    features = reference.tower(reference.preprocess(image))
    regions = torch.from_numpy(masks).float()
    found = {name: x.permute(0, 2, 3, 1) for name, x in zip(LEVELS, features, strict=True)}
    pooled = reference.pool(features, regions)
    found |= {f"pooled {name}": x[None] for name, x in zip(LEVELS, pooled, strict=True)}
    mask_tokens, position_tokens = reference.extract(features, regions)
    found |= {"image tokens": reference.project(features[2]), "mask tokens": mask_tokens[None]}
    found |= {"position tokens": position_tokens[None], "spliced": reference.embed(image, masks, ids)}
    layers: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: layers.append(out))
        for layer in reference.llama.model.layers
    ]
    logits = reference.logits(image, masks, ids)
    for hook in hooks:
        hook.remove()
    found |= {f"layer {index}": x for index, x in enumerate(layers)}
    return {name: value.numpy() for name, value in (found | {"logits": logits[None]}).items()}


def test_every_step_of_the_whole_model_agrees(
    pair: Pair, photograph: np.ndarray, regions: np.ndarray
) -> None:
    ids = prompt(pair.reference.config, len(regions))
    expected = reference_steps(pair.reference, photograph, regions, ids)
    images = preprocess(photograph, size=pair.config.vision.image_size)[None]
    found = our_steps(pair)(pair.params, images, pair.pyramid(regions), np.array([pair.expand(ids)]))
    assert_steps_agree(found, expected)
    assert largest_difference(found["logits"], expected["logits"]) < 2e-4
    # The steps tell the regions apart, and an empty region from a full one.
    tokens = expected["mask tokens"][0]
    assert all(np.abs(tokens[i] - tokens[j]).max() > 1e-2 for i in range(7) for j in range(i))


def test_a_prompt_without_regions_agrees(multi_head: Pair, photograph: np.ndarray) -> None:
    """Image-level conversations, and the one call that does everything."""
    ids = prompt(multi_head.reference.config, 0)
    expected = multi_head.reference.logits(photograph, None, ids).numpy()
    images = preprocess(photograph, size=multi_head.config.vision.image_size)[None]
    nothing = multi_head.pyramid(np.zeros((0, 427, 640), bool))
    whole = jax.jit(lambda params, *inputs: multi_head.model.apply({"params": params}, *inputs))
    found = whole(multi_head.params, images, nothing, np.array([multi_head.expand(ids)]))
    assert_steps_agree({"logits": found[0]}, {"logits": expected})


@pytest.mark.parametrize("size", [96, 512])
@pytest.mark.parametrize(
    "shape", [(427, 640), (640, 427), (512, 512), (75, 1300), (2048, 1365), (96, 97), (3, 2)]
)
def test_preprocessed_images_agree(shape: tuple[int, int], size: int, multi_head: Pair) -> None:
    image = picture(*shape)
    reference = OspreyReference.preprocess.__get__(Sized(size))
    expected = reference(image)[0].permute(1, 2, 0).numpy()
    found = preprocess(image, size=size)
    assert found.dtype == np.float32
    # Up to 2.6 from black to white; one unit in the last place of that is 2.4e-7.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.5e-6)


class Sized:
    """As much of a reference as its preprocessing needs."""

    def __init__(self, size: int):
        self.config = ReferenceConfig(image_size=size)


@pytest.mark.parametrize("shape", [(427, 640), (640, 427), (96, 96), (1365, 2048), (50, 33)])
def test_extractor_agrees_for_masks_of_any_size(shape: tuple[int, int], multi_head: Pair) -> None:
    """Feature maps are random here, so a mask that is off by one pixel pools something else."""
    reference, config = multi_head.reference, multi_head.config
    generator = torch.Generator().manual_seed(0)
    sides = zip(config.vision.dims, config.vision.level_sizes, strict=True)
    features = [torch.randn((1, dim, side, side), generator=generator) for dim, side in sides]
    masks = region_masks(*shape)
    with torch.no_grad():
        expected = reference.extract(features, torch.from_numpy(masks).float())
    channels_last = tuple(x.permute(0, 2, 3, 1).numpy() for x in features)
    sizes, position = config.vision.level_sizes, config.extractor.position_size
    on_device = mask_pyramid(jnp.asarray(masks)[None], level_sizes=sizes, position_size=position)
    extract = jax.jit(lambda *args: extractor_tokens(multi_head, *args))
    for pyramid in (multi_head.pyramid(masks), on_device):
        tokens = extract(multi_head.params, channels_last, pyramid)
        assert_steps_agree(
            {"mask tokens": tokens.mask[0], "position tokens": tokens.position[0]},
            {"mask tokens": expected[0].numpy(), "position tokens": expected[1].numpy()},
        )


def extractor_tokens(
    pair: Pair, params: Params, features: tuple[Array, ...], masks: MaskPyramid
) -> VisualTokens:
    return pair.model.apply({"params": params}, features, masks, method=Osprey.visual_tokens)


def test_thin_regions_vanish_at_coarse_levels_and_empty_ones_leave_biases(
    regions: np.ndarray, multi_head: Pair
) -> None:
    """What makes the tests above hard is in their masks."""
    levels = np.stack([level[0].sum((1, 2)) for level in multi_head.pyramid(regions).levels])
    areas = dict(zip(REGIONS, levels.T.tolist(), strict=True))
    assert areas["row"] == [0, 0, 0, 3]
    assert areas["column"] == [24, 0, 0, 0]
    assert areas["pixel"] == [0, 1, 0, 0]
    assert areas["empty"] == [0, 0, 0, 0]
    assert areas["full"] == [24**2, 12**2, 6**2, 3**2]
    linears = multi_head.reference.mask_extractor
    with torch.no_grad():
        summed = sum(getattr(linears, name).bias for name in LEVELS)
        expected = linears.feat_linear(summed).numpy()
    zeros = tuple(
        np.zeros((1, side, side, dim), np.float32)
        for side, dim in zip(multi_head.config.vision.level_sizes, multi_head.config.vision.dims, strict=True)
    )
    tokens = extractor_tokens(multi_head, multi_head.params, zeros, multi_head.pyramid(regions))
    np.testing.assert_allclose(tokens.mask[0, REGIONS.index("empty")], expected, rtol=1e-5, atol=1e-5)


def test_visual_tokens_are_spliced_in_order_of_appearance(multi_head: Pair) -> None:
    """Also where `<pos>` precedes `<mask>`, the image comes last, or rows of a batch differ."""
    reference, config = multi_head.reference, multi_head.config
    mask, position = config.mask_token_id, config.position_token_id
    rows = [
        [1, 5, IMAGE_ID, 9, mask, position, 3, mask, position, 60, mask, position],
        [position, mask, mask, 7, position, 8, mask, position, 9, 2, 0, IMAGE_ID],
    ]
    rng = np.random.default_rng(0)
    shapes = {"image": config.vision.num_image_tokens, "mask": 3, "position": 3}
    tokens = {
        name: rng.normal(size=(2, n, config.decoder.dim)).astype(np.float32) for name, n in shapes.items()
    }
    with torch.no_grad():
        expected = [
            reference.splice(ids, *(torch.from_numpy(x[row]) for x in tokens.values()), mask, position)[0]
            for row, ids in enumerate(rows)
        ]
    found = multi_head.model.apply(
        {"params": multi_head.params},
        np.array([multi_head.expand(ids) for ids in rows]),
        VisualTokens(**tokens),
        method=Osprey.embed,
    )
    np.testing.assert_array_equal(found, torch.stack(expected).numpy())


def test_a_sequence_as_long_as_the_decoder_was_trained_for_agrees(pair: Pair) -> None:
    """Rotary angles grow with the position, and so does what a rounded frequency makes of them."""
    ids = np.random.default_rng(0).integers(0, pair.config.decoder.vocab_size, (1, 2048))
    with torch.no_grad():
        expected = pair.reference.llama(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()

    def logits(params: Params, ids: Array) -> Array:
        nothing = jnp.zeros((1, 0, pair.config.decoder.dim))
        tokens = VisualTokens(image=nothing, mask=nothing, position=nothing)
        hidden, _ = pair.model.apply(
            {"params": params},
            ids,
            tokens,
            positions=jnp.arange(2048)[None, :],
            segment_ids=jnp.ones_like(ids),
            method=Osprey.decode,
        )
        return pair.model.apply({"params": params}, hidden, method=Osprey.logits)

    assert_steps_agree({"logits": jax.jit(logits)(pair.params, ids)}, {"logits": expected})


def test_the_full_tower_agrees() -> None:
    """ConvNeXt-Large at 512 pixels, as in the release: 36 blocks, 196 million parameters."""
    sizes = {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536), "image_size": 512, "vocab_size": 61}
    pair = Pair.of(ReferenceConfig(**sizes))
    image = picture(427, 640)
    with torch.no_grad():
        expected = pair.reference.tower(pair.reference.preprocess(image))
    features = jax.jit(lambda params, x: pair.model.apply({"params": params}, x, method=Osprey.features))
    found = features(pair.params, preprocess(image, size=512)[None])
    assert_steps_agree(
        dict(zip(LEVELS, found, strict=True)),
        {name: x.permute(0, 2, 3, 1).numpy() for name, x in zip(LEVELS, expected, strict=True)},
    )
