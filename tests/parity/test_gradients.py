"""Gradients of every block, and of the whole model's loss, against torch: parameters and inputs.

Each block gets the same random inputs and the same random cotangent on both sides. The error names tensors as
the release does, inputs as `input N`, and gives each one's relative L2 difference.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional as F

from osprey_jax.image import preprocess
from osprey_jax.masks import MaskPyramid
from osprey_jax.models import convnext, llama
from osprey_jax.models.mask_extractor import MaskExtractor
from osprey_jax.models.osprey import Projector
from osprey_jax.ops.attention import visibility
from osprey_jax.typing import Array, Params
from tests.parity.bridge import (
    Pair,
    assert_gradients_agree,
    assert_steps_agree,
    release_arrays,
)
from tests.parity.reference import IMAGE_ID, OspreyReference
from tests.parity.scenes import prompt

FLOAT32 = jnp.dtype("float32")
OurBlock = Callable[..., Array]
TorchBlock = Callable[..., torch.Tensor]


def normal(*shapes: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def assert_block_agrees(pair: Pair, ours: OurBlock, theirs: TorchBlock, inputs: list[np.ndarray]) -> None:
    """`ours(params, *inputs)` and `theirs(reference, *inputs)`: output, then gradients of everything.

    Parameters that a block doesn't have must get none.
    """

    def gradients(
        params: Params, inputs: list[Array], cotangent: Array
    ) -> tuple[Array, tuple[Params, list[Array]]]:
        out, pullback = jax.vjp(lambda params, inputs: ours(params, *inputs), params, inputs)
        return out, pullback(cotangent)

    pair.reference.zero_grad()
    leaves = [torch.from_numpy(x).requires_grad_() for x in inputs]
    expected = theirs(pair.reference, *leaves)
    (cotangent,) = normal(tuple(expected.shape), seed=1)
    expected.backward(torch.from_numpy(cotangent))
    found, (of_params, of_inputs) = jax.jit(gradients)(pair.params, inputs, cotangent)
    assert_steps_agree({"output": found}, {"output": expected.detach().numpy()})
    assert_gradients_agree(
        release_arrays(of_params) | {f"input {i}": np.asarray(x) for i, x in enumerate(of_inputs)},
        torch_gradients(pair.reference) | {f"input {i}": x.grad.numpy() for i, x in enumerate(leaves)},
    )


def torch_gradients(reference: OspreyReference) -> dict[str, np.ndarray]:
    """Under the release's names; zeros for a parameter that took no part."""
    parameters = reference.release_parameters().items()
    return {k: torch.zeros_like(v).numpy() if v.grad is None else v.grad.numpy() for k, v in parameters}


def channels_first(block: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Runs torch's block on `(B, Y, X, C)` as ours."""
    return block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def test_stem(multi_head: Pair) -> None:
    def ours(params: Params, x: Array) -> Array:
        vision, dim = params["vision"], multi_head.config.vision.dims[0]
        x = convnext.PatchConv(4, dim, FLOAT32).apply({"params": vision["stem_conv"]}, x)
        return convnext.LayerNorm(1e-6).apply({"params": vision["stem_norm"]}, x)

    def theirs(reference: OspreyReference, x: torch.Tensor) -> torch.Tensor:
        return channels_first(reference.convnext.embeddings, x)

    assert_block_agrees(multi_head, ours, theirs, normal((2, 32, 48, 3)))


def test_downsampling(multi_head: Pair) -> None:
    """The norm's input is far from zero mean, as feature maps are: where variance cancels."""
    dims = multi_head.config.vision.dims

    def ours(params: Params, x: Array) -> Array:
        stage = params["vision"]["stages_2"]
        x = convnext.LayerNorm(1e-6).apply({"params": stage["downsample_norm"]}, x)
        return convnext.PatchConv(2, dims[2], FLOAT32).apply({"params": stage["downsample_conv"]}, x)

    def theirs(reference: OspreyReference, x: torch.Tensor) -> torch.Tensor:
        norm, conv = reference.convnext.encoder.stages[2].downsampling_layer
        return channels_first(lambda x: conv(norm(x)), x)

    (x,) = normal((2, 12, 8, dims[1]))
    assert_block_agrees(multi_head, ours, theirs, [3 + x])


def test_convnext_block(multi_head: Pair) -> None:
    """The second of a stage's two: its gradient lies behind the first's in the stacked parameter."""
    dim = multi_head.config.vision.dims[2]

    def ours(params: Params, x: Array) -> Array:
        block = jax.tree.map(lambda leaf: leaf[1], params["vision"]["stages_2"]["blocks"])
        return convnext.Block(dim, 1e-6, FLOAT32).apply({"params": block}, x)[0]

    def theirs(reference: OspreyReference, x: torch.Tensor) -> torch.Tensor:
        return channels_first(reference.convnext.encoder.stages[2].layers[1], x)

    assert_block_agrees(multi_head, ours, theirs, normal((2, 9, 14, dim)))


def test_stage_of_scanned_blocks(grouped: Pair) -> None:
    vision = grouped.config.vision

    def ours(params: Params, x: Array) -> Array:
        stage = convnext.Stage(vision.depths[2], vision.dims[2], 1e-6, FLOAT32, downsample=True)
        return stage.apply({"params": params["vision"]["stages_2"]}, x)

    def theirs(reference: OspreyReference, x: torch.Tensor) -> torch.Tensor:
        return channels_first(reference.convnext.encoder.stages[2], x)

    assert_block_agrees(grouped, ours, theirs, normal((2, 12, 16, vision.dims[1])))


def test_projector(multi_head: Pair) -> None:
    dim = multi_head.config.decoder.dim

    def ours(params: Params, x: Array) -> Array:
        return Projector(dim, FLOAT32).apply({"params": params["projector"]}, x)

    def theirs(reference: OspreyReference, x: torch.Tensor) -> torch.Tensor:
        return reference.projector(x)

    assert_block_agrees(multi_head, ours, theirs, normal((2, 36, multi_head.config.vision.dims[2])))


def test_extractor(multi_head: Pair, regions: np.ndarray) -> None:
    """Thin, empty, full and scattered regions of one image; also the feature maps' gradients."""
    config, pyramid = multi_head.config, multi_head.pyramid(regions)

    def ours(params: Params, *features: Array) -> Array:
        extractor = MaskExtractor(config.extractor, config.decoder.dim)
        return jnp.stack(extractor.apply({"params": params["extractor"]}, features, pyramid))

    def theirs(reference: OspreyReference, *features: torch.Tensor) -> torch.Tensor:
        maps = [x.permute(0, 3, 1, 2) for x in features]
        return torch.stack(reference.extract(maps, torch.from_numpy(regions).float()))[:, None]

    sides = zip(config.vision.level_sizes, config.vision.dims, strict=True)
    assert_block_agrees(multi_head, ours, theirs, normal(*((1, side, side, dim) for side, dim in sides)))


def test_decoder_layer(pair: Pair) -> None:
    config = pair.config.decoder
    positions = np.broadcast_to(np.arange(20)[None], (2, 20))
    ones = np.ones_like(positions)

    def ours(params: Params, x: Array) -> Array:
        mask = visibility(
            query_positions=positions, key_positions=positions, query_segments=ones, key_segments=ones
        )
        layer = jax.tree.map(lambda leaf: leaf[1], params["decoder"]["layers"])
        place = llama.Place(positions, mask)
        return llama.DecoderLayer(config, FLOAT32).apply({"params": layer}, x, None, None, place)[0]

    def theirs(reference: OspreyReference, x: torch.Tensor) -> torch.Tensor:
        decoder = reference.llama.model
        angles = decoder.rotary_emb(x, torch.from_numpy(positions.copy()))
        causal = torch.full((20, 20), -torch.inf).triu(1)[None, None]
        return decoder.layers[1](x, attention_mask=causal, position_embeddings=angles)

    assert_block_agrees(pair, ours, theirs, normal((2, 20, config.dim)))


def test_decoder_over_embeddings(multi_head: Pair) -> None:
    """All layers, scanned, with the final norm and the head."""
    config = multi_head.config.decoder
    positions = np.broadcast_to(np.arange(20)[None], (2, 20))

    def ours(params: Params, x: Array) -> Array:
        variables, decoder = {"params": params["decoder"]}, llama.Llama(config)
        hidden, _ = decoder.apply(variables, x, positions=positions, segment_ids=np.ones_like(positions))
        return decoder.apply(variables, hidden, method=llama.Llama.logits)

    def theirs(reference: OspreyReference, x: torch.Tensor) -> torch.Tensor:
        return reference.llama(inputs_embeds=x, use_cache=False).logits

    assert_block_agrees(multi_head, ours, theirs, normal((2, 20, config.dim)))


def test_embedding_and_head(multi_head: Pair) -> None:
    """Repeated ids add up in the table's gradient, ids that don't occur get none.

    Id 0 is left out: torch never trains its row, the padding's, which no sequence of ours reads as text.
    """
    ids, config = np.array([[5, 5, 60, 1], [7, 5, 1, 31]]), multi_head.config.decoder

    def ours(params: Params, x: Array) -> Array:
        variables, decoder = {"params": params["decoder"]}, llama.Llama(config)
        embedded = decoder.apply(variables, ids, method=llama.Llama.embed)
        return decoder.apply(variables, embedded * x, method=llama.Llama.logits)

    def theirs(reference: OspreyReference, x: torch.Tensor) -> torch.Tensor:
        return reference.llama.lm_head(reference.llama.model.embed_tokens(torch.from_numpy(ids)) * x)

    assert_block_agrees(multi_head, ours, theirs, normal((2, 4, config.dim)))


@dataclasses.dataclass
class Sample:
    """An image with regions, a prompt, and labels: -100 where there is no loss."""

    pixels: np.ndarray
    masks: np.ndarray
    ids: list[int]
    labels: list[int]


def make_sample(pair: Pair, photograph: np.ndarray, masks: np.ndarray, seed: int) -> Sample:
    ids = prompt(pair.reference.config, len(masks), seed)
    spliced = pair.expand(ids)
    labels = [-100] * len(spliced)
    for place in (*range(-9, -6), -2, -1):
        labels[place] = spliced[place] if 0 <= spliced[place] < pair.config.decoder.vocab_size else -100
    assert sum(label != -100 for label in labels) >= 3
    pixels = preprocess(np.roll(photograph, 50 * seed, 0), size=pair.config.vision.image_size)
    return Sample(pixels, masks, ids, labels)


def torch_loss(reference: OspreyReference, sample: Sample, pixels: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy of one dialogue: the mean over its labelled tokens."""
    features = reference.tower(pixels.permute(2, 0, 1)[None])
    masks = torch.from_numpy(sample.masks).float()
    places = reference.config.mask_id, reference.config.position_id
    tokens = reference.project(features[2]), *reference.extract(features, masks)
    spliced = reference.splice(sample.ids, *tokens, *places)
    logits = reference.llama(inputs_embeds=spliced, use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1], torch.tensor(sample.labels[1:]), ignore_index=-100)


def test_loss_of_the_whole_model(grouped: Pair, photograph: np.ndarray, regions: np.ndarray) -> None:
    """Two images of a batch with as many regions and ids, the second prompt followed by padding."""
    pair = grouped
    samples = [make_sample(pair, photograph, regions[:4], 0), make_sample(pair, photograph, regions[3:], 1)]
    spliced = [pair.expand(sample.ids) for sample in samples]
    assert len(spliced[0]) == len(spliced[1])
    pads = [[9, IMAGE_ID, 3], [5, 0, 0]]  # read by nobody, whatever they hold
    ids = np.array([row + pad for row, pad in zip(spliced, pads, strict=True)])
    labels = np.array([[*sample.labels, -100, -100, -100] for sample in samples])
    segments = np.array([[1] * len(row) + [0] * 3 for row in spliced])
    pyramids = [pair.pyramid(sample.masks) for sample in samples]
    masks: MaskPyramid = jax.tree.map(lambda *xs: np.concatenate(xs), *pyramids)

    def loss(params: Params, pixels: Array, position_masks: Array) -> Array:
        pyramid = masks._replace(position=position_masks)
        logits = pair.model.apply({"params": params}, pixels, pyramid, ids, segment_ids=segments)
        labelled = (labels[:, 1:] != -100).astype(np.float32)
        targets = np.maximum(labels[:, 1:], 0)[:, :, None]
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), targets, axis=-1)[:, :, 0]
        return -jnp.sum(logprobs * labelled / labelled.sum(1, keepdims=True))

    pixels = np.stack([sample.pixels for sample in samples])
    value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    found, (of_params, of_pixels) = value_and_grad(pair.params, pixels, masks.position)

    pair.reference.zero_grad()
    leaf = torch.from_numpy(pixels).requires_grad_()
    expected = sum(torch_loss(pair.reference, sample, leaf[i]) for i, sample in enumerate(samples))
    expected.backward()
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5)
    assert_gradients_agree(
        release_arrays(of_params) | {"pixels": np.asarray(of_pixels)},
        torch_gradients(pair.reference) | {"pixels": leaf.grad.numpy()},
    )
    assert all(np.abs(x).max() > 0 for x in torch_gradients(pair.reference).values())
