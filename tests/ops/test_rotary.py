"""Rotary embedding against transformers' own, at every position a decoder is used at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from osprey_jax.ops.rotary import apply_rotary


def transformers_rotation(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    head_dim = x.shape[-1]
    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_theta=theta)
    heads = torch.from_numpy(x).transpose(1, 2)
    cos, sin = LlamaRotaryEmbedding(config)(heads, torch.from_numpy(positions))
    return apply_rotary_pos_emb(heads, heads, cos, sin)[0].transpose(1, 2).numpy()


@pytest.mark.parametrize(("head_dim", "theta"), [(128, 1e4), (128, 5e5), (12, 5e5), (6, 1e4)])
def test_rotation_equals_transformers(head_dim: int, theta: float) -> None:
    positions = np.random.default_rng(0).permutation(4096)[None]
    x = np.random.default_rng(1).normal(size=(1, 4096, 2, head_dim)).astype(np.float32)
    found = jax.jit(lambda x, positions: apply_rotary(x, positions, theta=theta))(x, positions)
    expected = transformers_rotation(x, positions, theta)
    # Of angles up to 4096 this asks that frequencies are rounded as torch rounds them.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_bfloat16_heads_are_turned_by_angles_of_float32() -> None:
    """Near 4000 bfloat16 has steps of 16: angles of it would be anything."""
    positions = np.array([[3001, 3005, 4095]])
    heads = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 64)), jnp.bfloat16)
    found = apply_rotary(heads, jnp.asarray(positions), theta=1e4)
    assert found.dtype == jnp.bfloat16
    expected = transformers_rotation(np.asarray(heads, np.float32), positions, 1e4)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=2**-8, atol=2e-6)
