"""Who sees whom, as literal matrices, and attention against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from osprey_jax.ops.attention import attention, visibility
from osprey_jax.typing import Array


def seen(
    positions: list[int],
    segments: list[int],
    *,
    keys: tuple[list[int], list[int]] | None = None,
    prefix: list[int] | None = None,
) -> list[list[int]]:
    """One row of a batch; keys are the queries unless given as `(positions, segments)`."""
    key_positions, key_segments = keys or (positions, segments)
    mask = visibility(
        query_positions=jnp.array([positions]),
        key_positions=jnp.array([key_positions]),
        query_segments=jnp.array([segments]),
        key_segments=jnp.array([key_segments]),
        prefix_segments=None if prefix is None else jnp.array([prefix]),
    )
    assert mask.dtype == bool
    return mask[0].astype(int).tolist()


def test_a_token_sees_itself_and_what_precedes() -> None:
    assert seen([0, 1, 2, 3], [1, 1, 1, 1]) == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]


def test_position_counts_and_place_in_the_buffer_does_not() -> None:
    assert seen([2, 0, 1], [1, 1, 1]) == [
        [1, 1, 1],
        [0, 1, 0],
        [0, 1, 1],
    ]


def test_padding_is_seen_by_nobody_and_sees_nothing() -> None:
    assert seen([0, 0, 1, 5], [0, 1, 1, 0]) == [
        [0, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 0, 0],
    ]


def test_packed_segments_do_not_see_each_other() -> None:
    assert seen([0, 1, 2, 0, 1], [1, 1, 1, 2, 2]) == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_conversations_see_their_prefix_and_not_each_other() -> None:
    found = seen([0, 1, 2, 3, 2, 3, 0], [1, 1, 2, 2, 3, 3, 0], prefix=[0, 0, 1, 1, 1, 1, 0])
    assert found == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]


def test_a_prefix_of_zero_names_none_even_where_keys_are_padding() -> None:
    assert seen([1, 1], [2, 2], keys=([0, 0, 1], [1, 0, 2]), prefix=[0, 1]) == [
        [0, 0, 1],
        [1, 0, 1],
    ]


def test_slots_of_a_cache_not_yet_written_are_not_seen() -> None:
    assert seen([2], [1], keys=([0, 1, 2, 0, 0], [1, 1, 1, 0, 0])) == [[1, 1, 1, 0, 0]]


def random_inputs(num_heads: int, num_kv_heads: int) -> tuple[np.ndarray, ...]:
    """Queries, keys and values of 5 and 7 tokens, and a mask in which every query sees a key."""
    rng = np.random.default_rng(0)
    shapes = (2, 5, num_heads, 6), (2, 7, num_kv_heads, 6), (2, 7, num_kv_heads, 6)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    mask = rng.random((2, 5, 7)) < 0.5
    mask[:, :, 3] = True
    return 3 * q, k, v, mask


def by_head(k: Array | np.ndarray, v: Array | np.ndarray) -> tuple[Array, Array]:
    """Keys and values in the order in which attention takes them."""
    return jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_attention_and_its_gradients_equal_torch(num_heads: int, num_kv_heads: int) -> None:
    *inputs, mask = random_inputs(num_heads, num_kv_heads)
    leaves = [torch.from_numpy(x).requires_grad_() for x in inputs]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.from_numpy(mask)[:, None], enable_gqa=True
    ).transpose(1, 2)
    cotangent = np.random.default_rng(1).normal(size=tuple(expected.shape)).astype(np.float32)
    expected.backward(torch.from_numpy(cotangent))

    def run(*inputs: Array) -> tuple[Array, tuple[Array, ...]]:
        out, pullback = jax.vjp(lambda q, k, v: attention(q, *by_head(k, v), mask), *inputs)
        return out, pullback(cotangent)

    found, gradients = jax.jit(run)(*inputs)
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-4, atol=1e-5)


def test_scores_of_bfloat16_inputs_are_not_rounded() -> None:
    """Differences of scores near 200 would vanish in bfloat16, whose steps are 1 there."""
    q, k = np.full((1, 1, 1, 64), 5.0), np.full((1, 2, 1, 64), 5.0)
    k[0, 1, 0, 0] = 5.25
    v = np.array([0.0, 1.0]).reshape(1, 2, 1, 1).repeat(64, axis=3)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    out = attention(q, *by_head(k, v), jnp.ones((1, 1, 2), bool))
    assert out.dtype == jnp.bfloat16
    weight = 1 / (1 + np.exp(-0.25 * 5 / 8))
    np.testing.assert_allclose(np.asarray(out[0, 0, 0], np.float32), weight, rtol=0.004)


def test_a_query_that_sees_nothing_is_finite_and_sends_no_gradient_elsewhere() -> None:
    *inputs, mask = random_inputs(4, 2)
    mask[0, 2] = False

    others_alone = np.ones((2, 5, 1, 1), np.float32)
    others_alone[0, 2] = 0

    def others(q: Array, k: Array, v: Array) -> Array:
        return jnp.sum(others_alone * attention(q, *by_head(k, v), mask) ** 2)

    q, k, v = (jnp.asarray(x) for x in inputs)
    assert np.isfinite(attention(q, *by_head(k, v), mask)).all()
    gradients = jax.grad(others, argnums=(0, 1, 2))(*inputs)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not np.asarray(gradients[0][0, 2]).any()


def test_hidden_keys_change_nothing_to_the_bit() -> None:
    q, k, v, mask = random_inputs(4, 2)
    mask[:, :, 5] = False
    before = attention(jnp.asarray(q), *by_head(k, v), mask)
    k[:, 5], v[:, 5] = 1e4, -1e4
    np.testing.assert_array_equal(attention(jnp.asarray(q), *by_head(k, v), mask), before)


@pytest.mark.parametrize("rows_of_each", [1, 3])
def test_a_shared_prefix_is_attended_to_as_if_each_row_had_a_copy(rows_of_each: int) -> None:
    """Torch attends to the copies, prefix and own keys in one sequence."""
    rng, rows = np.random.default_rng(2), 2 * rows_of_each
    q, k, v = (rng.normal(size=(rows, 4, heads, 6)).astype(np.float32) for heads in (6, 2, 2))
    before = [rng.normal(size=(2, 9, 2, 6)).astype(np.float32) for _ in range(2)]
    own, seen = rng.random((rows, 4, 4)) < 0.5, rng.random((rows, 4, 9)) < 0.5
    seen[:, :, 0] = True
    prefix = (*by_head(*before), jnp.asarray(seen))
    found = attention(jnp.asarray(q), *by_head(k, v), jnp.asarray(own), prefix=prefix)
    copies = [np.repeat(x, rows_of_each, axis=0) for x in before]
    whole = [torch.from_numpy(np.concatenate(x, 1)) for x in zip(copies, (k, v), strict=True)]
    mask = torch.from_numpy(np.concatenate([seen, own], axis=2))[:, None]
    expected = F.scaled_dot_product_attention(
        torch.from_numpy(q).transpose(1, 2), *(x.transpose(1, 2) for x in whole), mask, enable_gqa=True
    )
    np.testing.assert_allclose(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)
