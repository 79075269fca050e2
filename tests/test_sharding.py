"""The sharding table, and that a mesh of eight devices computes what one does."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from osprey_jax import generate, sharding
from osprey_jax.config import DecoderConfig, OspreyConfig, VisionConfig, osprey_7b, tiny
from osprey_jax.masks import mask_pyramid
from osprey_jax.models.layers import constrain
from osprey_jax.models.llama import init_cache
from osprey_jax.models.osprey import Osprey, boxed_params, init_params

SMALL = 1 << 16
"""Arrays of fewer elements may be whole on every device."""
TOLERANCE = 1e-5
"""Of logits, relative to the largest: sums over devices are taken in another order."""


def leaves(tree: object) -> dict[str, object]:
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def test_every_large_parameter_of_7b_is_split_over_fsdp_and_tensor() -> None:
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    boxed = boxed_params(osprey_7b())
    found = leaves(sharding.param_shardings(boxed, mesh))
    for path, leaf in leaves(boxed).items():
        used = set(jax.tree.leaves(tuple(found[path].spec)))
        # Convolution kernels and vectors have one wide axis; every other matrix has two.
        wide = sum(size >= 128 for size in leaf.value.shape[("layers" in leaf.names) :])
        if leaf.value.size > SMALL and wide >= 2 and "conv" not in path:
            assert used == {"fsdp", "tensor"}, path
        elif leaf.value.size > SMALL:
            assert used & {"fsdp", "tensor"} or path.endswith("norm/scale"), path


def test_logical_axes_of_activations_are_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    named = set()
    monkeypatch.setattr(nn, "with_logical_constraint", lambda x, names: named.update(names) or x)
    jax.eval_shape(Osprey(tiny()).apply, {"params": nn.unbox(boxed_params(tiny()))}, *inputs(1))
    assert len(named - {None}) >= 5
    assert named - {None} <= sharding.RULES.keys()


def inputs(batch: int) -> tuple:
    config = tiny()
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, 96, 96, 3)).astype(np.float32)
    regions = rng.random((batch, 3, 50, 60)) < 0.2
    size = config.extractor.position_size
    pyramids = [mask_pyramid(r, level_sizes=config.vision.level_sizes, position_size=size) for r in regions]
    ids = rng.integers(3, 500, (batch, 80)).astype(np.int32)
    ids[:, 2:38] = -200
    ids[:, [40, 50, 60]], ids[:, [41, 51, 61]] = config.mask_token_id, config.position_token_id
    return images, jax.tree.map(lambda *x: np.stack(x), *pyramids), ids


@jax.jit
def forward(params: dict, *arguments: jax.Array) -> jax.Array:
    return Osprey(tiny()).apply({"params": params}, *arguments)


def random_params(config: OspreyConfig) -> dict:
    """Like fresh ones, but with no bias at zero, no norm at one and no layer scale that hides its block."""
    rng = np.random.default_rng(0)
    ranges = {"gamma": (0.1, 0.5), "scale": (0.5, 1.5), "bias": (-0.5, 0.5)}

    def draw(path: tuple, leaf: jax.Array) -> jax.Array:
        if (ends := ranges.get(path[-1].key)) is None:
            return leaf * 2
        return jnp.asarray(rng.uniform(*ends, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, init_params(config, jax.random.key(0)))


def relative_difference(found: jax.Array, expected: jax.Array) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def reference() -> tuple[dict, tuple, jax.Array]:
    """Parameters, inputs and the logits of one device."""
    params, arguments = random_params(tiny()), inputs(8)
    return params, arguments, forward(params, *arguments)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2), (8, 1, 1)])
def test_logits_on_eight_devices_equal_those_on_one(
    sizes: tuple[int, int, int], reference: tuple[dict, tuple, jax.Array]
) -> None:
    config = tiny()
    mesh = sharding.make_mesh(**dict(zip(sharding.MESH_AXES, sizes, strict=True)))
    params, arguments, expected = reference
    with sharding.use_mesh(mesh):
        split = jax.device_put(params, sharding.param_shardings(boxed_params(config), mesh))
        found = jax.jit(Osprey(config).apply)({"params": split}, *arguments)
    # The constraint on activations holds, and did not vanish: batch and vocabulary are split.
    shape = (8 // (sizes[0] * sizes[1]), 80, config.decoder.vocab_size // sizes[2])
    assert found.addressable_shards[0].data.shape == shape
    assert relative_difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("stage", range(4))
def test_each_stage_of_the_tower_shows_in_the_logits_that_are_compared(
    stage: int, reference: tuple[dict, tuple, jax.Array]
) -> None:
    params, arguments, expected = reference
    changed = jax.tree.map(lambda x: x, params)
    changed["vision"][f"stages_{stage}"]["blocks"]["gamma"] *= 1.01
    assert relative_difference(forward(changed, *arguments), expected) > 50 * TOLERANCE


def box(value: jax.ShapeDtypeStruct, *names: str) -> dict:
    return {"part": {"kernel": nn.LogicallyPartitioned(value, names)}}


def test_unknown_names_collisions_and_forgotten_parameters_are_errors() -> None:
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    found = sharding.param_shardings(box(square, "embed", "vocab"), mesh)
    assert found["part"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    with pytest.raises(ValueError, match=r"no sharding rule.*\['depth'\]"):
        sharding.param_shardings(box(square, "embed", "depth"), mesh)
    with pytest.raises(ValueError, match=r"\('heads', 'vocab'\) would use a mesh axis twice"):
        sharding.param_shardings(box(square, "heads", "vocab"), mesh)
    with pytest.raises(ValueError, match="part/kernel names no logical axes"):
        sharding.param_shardings({"part": {"kernel": square}}, mesh)
    with pytest.raises(ValueError, match=r"part/kernel of shape \(8, 8\) has the logical axes \('embed',\)"):
        sharding.param_shardings(box(square, "embed"), mesh)
    odd = jax.ShapeDtypeStruct((8, 7), jnp.float32)
    with pytest.raises(ValueError, match=r"part/kernel of shape \(8, 7\).*doesn't divide.*'tensor': 2"):
        sharding.param_shardings(box(odd, "embed", "vocab"), mesh)


def test_too_few_devices_for_a_mesh_is_an_error() -> None:
    with pytest.raises(ValueError, match="data=4, fsdp=4, tensor=1 needs 16 devices, there are 8"):
        sharding.make_mesh(data=4, fsdp=4)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "data": 2}])
def test_decoding_gathers_no_matrix(sizes: dict[str, int]) -> None:
    """None of the decoder's, which is where memory and time of an answer are."""
    config = OspreyConfig(
        vision=VisionConfig(image_size=32, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)),
        decoder=DecoderConfig(
            vocab_size=512, dim=128, ffn_dim=256, num_layers=2, num_heads=8, num_kv_heads=8
        ),
    )
    mesh, rules = sharding.make_mesh(**sizes), sharding.GENERATION_RULES
    boxed = boxed_params(config, scan_layers=False)
    places = sharding.param_shardings(boxed, mesh, rules)
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), nn.unbox(boxed), places
    )
    model, rows = Osprey(config, scan_layers=False), 8
    cache = init_cache(config.decoder, rows, 32, dtype="float32")
    prefix = generate.Prefix(init_cache(config.decoder, 1, 64, dtype="float32"), jnp.ones(1, jnp.int32))
    each = jnp.zeros(rows, jnp.int32)
    answers = generate.Rows(
        cache=cache,
        token=each,
        position=each,
        keys=jax.random.split(jax.random.key(0), rows),
        running=each == 0,
        token_ids=jnp.zeros((rows, 16), jnp.int32),
        logprobs=jnp.zeros((rows, 16)),
        length=each,
    )
    number = jnp.zeros((), jnp.int32)
    given = {"limit": number, "eos_id": number, "enough": number, "steps": number, "wanted": each == 0}
    with sharding.use_mesh(mesh, rules):
        lowered = generate.decode.lower(model, params, prefix, answers, sampler=generate.Greedy(), **given)
        text = lowered.compile().as_text()
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather\(", text)
    matrix = config.decoder.dim * config.decoder.dim
    assert all(math.prod(map(int, shape.split(","))) < matrix for shape in gathered)
    kernel = params["decoder"]["layers_0"]["mlp"]["down_proj"]["kernel"]
    parts = sizes["fsdp"] * sizes.get("tensor", 1)
    assert kernel.sharding.shard_shape(kernel.shape) == (256 // parts, 128)


@pytest.mark.parametrize("rules", [sharding.RULES, sharding.GENERATION_RULES], ids=["training", "generation"])
def test_a_batch_that_does_not_divide_over_the_mesh_stays_whole(rules: sharding.Rules) -> None:
    def axes_of(rows: int) -> PartitionSpec:
        traced = jax.make_jaxpr(lambda x: constrain(x, ("batch", None, None)))(jnp.zeros((rows, 4, 8)))
        [constraint] = [each for each in traced.eqns if each.primitive.name == "sharding_constraint"]
        return constraint.params["sharding"].spec

    with sharding.use_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2), rules):
        assert axes_of(1) == PartitionSpec(None, None, None)
        assert axes_of(4) == PartitionSpec(rules["batch"], None, None)
