"""Bilinear resizing against torch, values and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from osprey_jax.ops.resize import resize_bilinear
from osprey_jax.typing import Array


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((7, 5), (14, 20)),
        ((40, 30), (7, 11)),
        ((16, 16), (16, 16)),
        ((1, 9), (4, 4)),
        ((427, 640), (112, 112)),
    ],
)
def test_values_and_gradient_equal_torch(source: tuple[int, int], target: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x, cotangent = (rng.normal(size=(2, 3, *size)).astype(np.float32) for size in (source, target))
    leaf = torch.from_numpy(x).requires_grad_()
    expected = F.interpolate(leaf, size=target, mode="bilinear", align_corners=False)
    expected.backward(torch.from_numpy(cotangent))

    def run(x: Array) -> tuple[Array, Array]:
        out, pullback = jax.vjp(lambda x: resize_bilinear(x, *target), x)
        return out, pullback(jnp.asarray(cotangent))[0]

    found, gradient = jax.jit(run)(x)
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=0, atol=2e-6)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=0, atol=5e-6)


def test_the_result_is_float32_whatever_the_input_is() -> None:
    ones = np.ones((2, 4, 4))
    for dtype in (jnp.bfloat16, bool, jnp.int32):
        out = resize_bilinear(jnp.asarray(ones, dtype), 3, 5)
        assert (out.shape, out.dtype) == ((2, 3, 5), jnp.float32)
        np.testing.assert_array_equal(out, np.ones((2, 3, 5)))
