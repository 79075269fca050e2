"""Splicing as literal numbers, the regions' order, and the tree of parameters."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osprey_jax.checkpoint import flatten
from osprey_jax.config import osprey_7b, tiny
from osprey_jax.masks import MaskPyramid, mask_pyramid
from osprey_jax.models.mask_extractor import MaskExtractor
from osprey_jax.models.osprey import abstract_params, boxed_params, init_params, splice
from osprey_jax.typing import Params


def test_splice_replaces_marked_places_in_order_row_by_row() -> None:
    x = jnp.zeros((2, 4, 1))
    places = jnp.array([[0, 1, 0, 1], [1, 1, 0, 0]], bool)
    values = jnp.array([[[1.0], [2.0]], [[3.0], [4.0]]])
    assert splice(x, places, values)[:, :, 0].tolist() == [[0, 1, 0, 2], [3, 4, 0, 0]]


def test_splice_leaves_values_over_that_have_no_place() -> None:
    """Rows of a batch have fewer regions than the widest one."""
    x, values = jnp.full((1, 3, 1), 9.0), jnp.array([[[1.0], [2.0], [3.0]]])
    assert splice(x, jnp.array([[False, True, False]]), values)[0, :, 0].tolist() == [9, 1, 9]
    assert splice(x, jnp.array([[True, False, False]]), values[:, :0])[0, :, 0].tolist() == [9, 9, 9]


def test_values_without_a_place_get_no_gradient_and_replaced_embeddings_none() -> None:
    places = jnp.array([[False, True, False]])

    def total(x: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.sum(splice(x, places, values))

    of_x, of_values = jax.grad(total, argnums=(0, 1))(jnp.ones((1, 3, 1)), jnp.ones((1, 2, 1)))
    assert of_x[0, :, 0].tolist() == [1, 0, 1]
    assert of_values[0, :, 0].tolist() == [1, 0]


def test_values_take_the_dtype_of_what_they_are_spliced_into() -> None:
    x, places = jnp.zeros((1, 2, 1), jnp.bfloat16), jnp.array([[False, True]])
    assert splice(x, places, jnp.ones((1, 1, 1), jnp.float32)).dtype == jnp.bfloat16


@pytest.fixture(scope="module")
def fresh() -> Params:
    """Fresh parameters of the preset `tiny`."""
    return init_params(tiny(), jax.random.key(0))


def test_permuting_regions_permutes_their_tokens(fresh: Params) -> None:
    config = tiny()
    rng = np.random.default_rng(0)
    sides = zip(config.vision.level_sizes, config.vision.dims, strict=True)
    features = [rng.normal(size=(1, side, side, dim)).astype(np.float32) for side, dim in sides]
    masks = np.zeros((5, 60, 80), bool)
    for index in range(5):
        masks[index, 10 * index : 10 * index + 15, 9 * index :] = True
    order = rng.permutation(5)

    def tokens(masks: np.ndarray) -> np.ndarray:
        pyramid = mask_pyramid(masks, level_sizes=config.vision.level_sizes, position_size=112)
        batched: MaskPyramid = jax.tree.map(lambda x: x[None], pyramid)
        extractor = MaskExtractor(config.extractor, config.decoder.dim)
        return np.stack(extractor.apply({"params": fresh["extractor"]}, features, batched))

    before, after = tokens(masks), tokens(masks[order])
    np.testing.assert_allclose(after, before[:, :, order], rtol=1e-5, atol=1e-6)
    assert np.abs(after - before).max() > 1e-3


def test_fresh_parameters_have_the_abstract_ones_shapes_and_start_sanely(fresh: Params) -> None:
    leaves, shapes = flatten(fresh), flatten(abstract_params(tiny()))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in leaves.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in shapes.items()
    }
    for path, leaf in leaves.items():
        name = path.rsplit("/", 1)[1]
        if name in ("bias", "scale", "gamma"):
            assert np.ptp(leaf) == 0, path
        else:
            assert abs(float(leaf.mean())) < 0.1 * float(leaf.std()), path
    # Of stacked layers each has its own draw.
    query = leaves["decoder/layers/self_attn/q_proj/kernel"]
    assert np.abs(query[0] - query[1]).max() > 1e-2


def test_fresh_linear_kernels_have_torch_s_spread(fresh: Params) -> None:
    """`nn.Linear` draws from ±1/√inputs, the heads' axes folded: a deviation of 1/√(3·inputs)."""
    leaves = flatten(fresh)
    inputs = {
        "decoder/layers/self_attn/q_proj/kernel": 128,
        "decoder/layers/self_attn/o_proj/kernel": 4 * 32,
        "decoder/layers/mlp/down_proj/kernel": 256,
        "vision/stages_2/blocks/fc2/kernel": 4 * 128,
        "extractor/mask_linear_0/kernel": 112 * 112,
        "decoder/lm_head/kernel": 128,
    }
    for path, count in inputs.items():
        np.testing.assert_allclose(leaves[path].std(), 1 / math.sqrt(3 * count), rtol=0.03, err_msg=path)


def test_every_parameter_names_an_axis_for_each_of_its_dimensions() -> None:
    boxed = boxed_params(osprey_7b())
    boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(box, nn.LogicallyPartitioned) for box in boxes)
    assert all(len(box.names) == box.unbox().ndim and all(box.names) for box in boxes)


def test_abstract_parameters_take_any_dtype() -> None:
    leaves = jax.tree.leaves(abstract_params(tiny(), "bfloat16"))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
