"""Counted operations, against numbers that are worked out by hand."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from osprey_jax import flops, sharding
from osprey_jax.config import DecoderConfig
from osprey_jax.models.llama import Llama


def counted(function: object, *arguments: jax.Array) -> int:
    return flops.count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_a_matrix_product_is_two_operations_for_each_of_its_terms() -> None:
    assert counted(lambda x, y: x @ y, jnp.zeros((3, 5)), jnp.zeros((5, 7))) == 2 * 3 * 5 * 7


def test_loops_count_as_often_as_they_run_and_of_branches_the_dearest() -> None:
    x = jnp.zeros((4, 4))

    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda y, _: (y @ y, None), x, None, length=6)[0]

    def branch(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x)

    assert counted(loop, x) == 6 * 2 * 4**3
    assert counted(branch, x) == 2 * 2 * 4**3


def test_what_each_device_does_counts_for_all_of_them() -> None:
    with sharding.use_mesh(sharding.make_mesh(data=8)):
        split = jax.shard_map(lambda x: x @ x.T, in_specs=jax.P("data"), out_specs=jax.P("data"))
        assert counted(split, jnp.zeros((16, 4))) == 8 * 2 * 2 * 2 * 4


def test_a_convolution_with_groups_multiplies_each_group_alone() -> None:
    x, kernel = jnp.zeros((2, 8, 8, 6)), jnp.zeros((3, 3, 1, 6))

    def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=6
        )

    assert counted(depthwise, x, kernel) == 2 * 9 * 2 * 8 * 8 * 6


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_decoders_step_takes_what_its_sizes_say(remat: str) -> None:
    """Two passes' worth backward for one forward, and one more where layers are computed again."""
    config = DecoderConfig(
        vocab_size=64, dim=16, ffn_dim=40, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4
    )
    rows, length = 2, 10
    model = Llama(config, remat=remat)
    x, ids = jnp.zeros((rows, length, 16)), jnp.ones((rows, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x, positions=ids, segment_ids=ids)

    def loss(params: dict, x: jax.Array) -> jax.Array:
        return model.apply(params, x, positions=ids, segment_ids=ids)[0].sum()

    gradients = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, x)
    matrices = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 40
    attention = 2 * length * 16
    forward = 2 * rows * length * 3 * (matrices + attention)
    found = flops.count(gradients.jaxpr)
    if remat == "none":
        assert found == 3 * forward
    else:
        # The last product of a layer, down_proj's, needn't be computed again.
        assert 4 * forward - 2 * rows * length * 3 * 16 * 40 <= found <= 4 * forward


def test_peaks_go_by_a_device_kinds_name() -> None:
    assert flops.peak(SimpleNamespace(device_kind="TPU v5 lite")) == 197e12
    assert flops.peak(SimpleNamespace(device_kind="TPU v5")) == 459e12
    assert flops.peak(SimpleNamespace(device_kind="NVIDIA H200")) == 989e12
    assert flops.peak(jax.devices()[0]) is None
