"""Computing in bfloat16: dtypes where they matter, errors of its size, gradients in the parameters' dtype.

The strict dtype promotion of `conftest` makes an unintended mixture of dtypes an error.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osprey_jax.config import DecoderConfig, ExtractorConfig, OspreyConfig, VisionConfig
from osprey_jax.masks import MaskPyramid, mask_pyramid
from osprey_jax.models.convnext import Block
from osprey_jax.models.layers import unstack
from osprey_jax.models.llama import Llama, init_cache
from osprey_jax.models.osprey import Osprey, abstract_params
from osprey_jax.prompt import IMAGE_TOKEN_ID
from osprey_jax.typing import Array, Params

BFLOAT16, FLOAT32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
CONFIG = OspreyConfig(
    vision=VisionConfig(image_size=64, depths=(1, 1, 2, 1), dims=(8, 12, 16, 20)),
    extractor=ExtractorConfig(dim=24, position_size=16),
    decoder=DecoderConfig(
        vocab_size=50, dim=32, ffn_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
    ),
    mask_token_id=50,
    position_token_id=51,
)
IDS = np.array([[1, *[IMAGE_TOKEN_ID] * 16, 4, 50, 51, 7, 50, 51, 9]])


@pytest.fixture(scope="module")
def params() -> Params:
    """Random parameters whose every part shows: kernels of unit gain, other leaves around a half."""
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key in ("kernel", "embedding"):
            # A stacked leaf's layers, and a kernel's outputs, share a spread that suits both roughly.
            return rng.normal(0, 0.15, leaf.shape).astype(np.float32)
        return rng.uniform(0.3, 0.7, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(CONFIG))


@pytest.fixture(scope="module")
def inputs() -> tuple[np.ndarray, MaskPyramid]:
    rng = np.random.default_rng(0)
    masks = rng.random((2, 50, 70)) < [[[0.02]], [[0.9]]]
    pyramid = mask_pyramid(masks, level_sizes=CONFIG.vision.level_sizes, position_size=16)
    return rng.normal(size=(1, 64, 64, 3)).astype(np.float32), jax.tree.map(lambda x: x[None], pyramid)


def cast(params: Params, dtype: jnp.dtype) -> Params:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def relative(found: Array, expected: Array) -> float:
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@partial(jax.jit, static_argnums=0)
def run(dtype: jnp.dtype, params: Params, image: Array, masks: MaskPyramid) -> dict[str, Array]:
    model, variables = Osprey(CONFIG, dtype), {"params": params}
    features = model.apply(variables, image, method=Osprey.features)
    tokens = model.apply(variables, features, masks, method=Osprey.visual_tokens)
    embedded = model.apply(variables, IDS, tokens, method=Osprey.embed)
    positions = jnp.arange(IDS.shape[1])[None, :]
    hidden, _ = model.apply(
        variables,
        IDS,
        tokens,
        positions=positions,
        segment_ids=jnp.ones_like(positions),
        method=Osprey.decode,
    )
    logits = model.apply(variables, hidden, method=Osprey.logits)
    named = {f"res{level + 2}": x for level, x in enumerate(features)}
    named |= {"image": tokens.image, "mask": tokens.mask, "position": tokens.position}
    return named | {"embedded": embedded, "logits": logits}


@pytest.mark.parametrize("params_dtype", [FLOAT32, BFLOAT16], ids=str)
def test_bfloat16_differs_from_float32_by_its_rounding(
    params_dtype: jnp.dtype, params: Params, inputs: tuple[np.ndarray, MaskPyramid]
) -> None:
    exact, found = run(FLOAT32, params, *inputs), run(BFLOAT16, cast(params, params_dtype), *inputs)
    assert {name for name, x in found.items() if x.dtype == FLOAT32} == {"mask", "position", "logits"}
    errors = {name: relative(found[name], exact[name]) for name in exact}
    if params_dtype == FLOAT32:
        # The position tokens depend on the masks alone, and the extractor is in float32.
        assert errors.pop("position") < 1e-6
    # One rounding is 2^-9; a handful of blocks in a row add up to a few of them.
    assert all(2**-11 < error < 0.03 for error in errors.values()), errors


def test_gradients_of_a_tower_block(params: Params) -> None:
    block = jax.tree.map(lambda leaf: leaf[1], params["vision"]["stages_2"]["blocks"])

    def loss(dtype: jnp.dtype, block: Params, x: Array) -> Array:
        out, _ = Block(16, 1e-6, dtype).apply({"params": block}, x.astype(dtype))
        assert out.dtype == dtype
        return jnp.sum(out.astype(FLOAT32) ** 2)

    assert_gradients_are_near(loss, block, (2, 8, 8, 16))


def test_gradients_of_the_decoder(params: Params) -> None:
    positions = np.broadcast_to(np.arange(9)[None], (2, 9))
    text_only = {name: tree for name, tree in params["decoder"].items() if name != "embed_tokens"}

    def loss(dtype: jnp.dtype, params: Params, x: Array) -> Array:
        decoder, variables = Llama(CONFIG.decoder, dtype), {"params": params}
        hidden, _ = decoder.apply(variables, x, positions=positions, segment_ids=np.ones_like(positions))
        assert hidden.dtype == dtype
        return jnp.sum(decoder.apply(variables, hidden, method=Llama.logits) ** 2)

    assert_gradients_are_near(loss, text_only, (2, 9, 32))


def assert_gradients_are_near(
    loss: Callable[[jnp.dtype, Params, Array], Array], params: Params, shape: tuple[int, ...]
) -> None:
    """In the parameters' float32 while bfloat16 is computed in, and near those of float32."""
    x = jax.random.normal(jax.random.key(1), shape)
    gradients = jax.jit(jax.grad(loss, argnums=(1, 2)), static_argnums=0)
    exact, found = gradients(FLOAT32, params, x), gradients(BFLOAT16, params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {FLOAT32}
    errors = jax.tree.map(relative, found, exact)
    assert max(jax.tree.leaves(errors)) < 0.05, errors


@pytest.mark.parametrize("cache_dtype", [FLOAT32, BFLOAT16], ids=str)
def test_a_cache_keeps_its_dtype(cache_dtype: jnp.dtype, params: Params) -> None:
    decoder = Llama(CONFIG.decoder, BFLOAT16, scan_layers=False)
    variables = {"params": unstack(dict(params["decoder"]), "layers")}
    cache = init_cache(CONFIG.decoder, 1, 8, dtype=cache_dtype)
    x = jax.random.normal(jax.random.key(1), (1, 5, 32))
    ones, positions = jnp.ones((1, 5), jnp.int32), jnp.arange(5)[None, :]

    @jax.jit
    def whole_and_stepwise(x: Array) -> tuple[Array, Array, jax.Array]:
        whole, _ = decoder.apply(variables, x, positions=positions, segment_ids=ones)
        first, after = decoder.apply(
            variables, x[:, :3], positions=positions[:, :3], segment_ids=ones[:, :3], cache=cache
        )
        second, after = decoder.apply(
            variables, x[:, 3:], positions=positions[:, 3:], segment_ids=ones[:, 3:], cache=after
        )
        return whole, jnp.concatenate([first, second], axis=1), after.keys[0]

    whole, stepwise, keys = whole_and_stepwise(x)
    assert (stepwise.dtype, keys.dtype) == (BFLOAT16, cache_dtype)
    assert relative(stepwise, whole) < 0.01
