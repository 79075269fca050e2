"""Norms against torch: far from zero mean, nearly constant, in bfloat16, and with the right epsilon."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from osprey_jax.ops.norms import layer_norm, rms_norm
from osprey_jax.typing import Array


def inputs(mean: float, std: float) -> tuple[np.ndarray, ...]:
    """Rows of 192 channels, a scale and a bias, and a cotangent."""
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(mean, std, (2, 5, 192)), rng.normal(size=(2, 5, 192))
    scale, bias = rng.uniform(0.5, 1.5, 192), rng.uniform(-1, 1, 192)
    return tuple(array.astype(np.float32) for array in (x, scale, bias, cotangent))


def assert_agrees(found: Array, expected: torch.Tensor, tolerance: float) -> None:
    expected = expected.detach().numpy()
    assert np.abs(np.asarray(found) - expected).max() <= tolerance * np.abs(expected).max()


# 3e-3 has a variance near epsilon. Far from zero mean the input itself has few digits of what is normalised.
@pytest.mark.parametrize(
    ("mean", "std", "tolerance"), [(0, 1, 2e-6), (0, 3e-3, 2e-6), (100, 1, 2e-5), (-1000, 0.1, 2e-3)]
)
def test_layer_norm_and_its_gradients_equal_torch(mean: float, std: float, tolerance: float) -> None:
    *arrays, cotangent = inputs(mean, std)
    leaves = [torch.from_numpy(array).requires_grad_() for array in arrays]
    expected = F.layer_norm(leaves[0], (192,), *leaves[1:], eps=1e-6)
    expected.backward(torch.from_numpy(cotangent))
    found, pullback = jax.vjp(lambda *args: layer_norm(*args, eps=1e-6), *map(jnp.asarray, arrays))
    assert_agrees(found, expected, tolerance)
    for gradient, leaf in zip(pullback(jnp.asarray(cotangent)), leaves, strict=True):
        assert_agrees(gradient, leaf.grad, tolerance)


@pytest.mark.parametrize(("std", "eps"), [(1, 1e-5), (3e-3, 1e-5), (1e-2, 1e-3), (1e3, 1e-5)])
def test_rms_norm_and_its_gradients_equal_transformers(std: float, eps: float) -> None:
    x, scale, _, cotangent = inputs(0, std)
    module = LlamaRMSNorm(192, eps)
    module.weight.data = torch.from_numpy(scale)
    leaf = torch.from_numpy(x).requires_grad_()
    expected = module(leaf)
    expected.backward(torch.from_numpy(cotangent))
    found, pullback = jax.vjp(lambda *args: rms_norm(*args, eps=eps), jnp.asarray(x), jnp.asarray(scale))
    assert_agrees(found, expected, 2e-6)
    of_x, of_scale = pullback(jnp.asarray(cotangent))
    assert_agrees(of_x, leaf.grad, 2e-6)
    assert_agrees(of_scale, module.weight.grad, 2e-6)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_bfloat16_is_normalised_in_float32_and_rounded_once(norm: str) -> None:
    x, scale, bias, _ = inputs(3, 1)
    x = jnp.asarray(x, jnp.bfloat16)
    wide = torch.from_numpy(np.array(x, np.float32))
    if norm == "layer":
        found = layer_norm(x, jnp.asarray(scale), jnp.asarray(bias), eps=1e-6)
        expected = F.layer_norm(wide, (192,), torch.from_numpy(scale), torch.from_numpy(bias), eps=1e-6)
    else:
        found = rms_norm(x, jnp.asarray(scale), eps=1e-5)
        expected = F.rms_norm(wide, (192,), torch.from_numpy(scale), eps=1e-5)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), expected.numpy(), rtol=2**-8, atol=1e-6)
