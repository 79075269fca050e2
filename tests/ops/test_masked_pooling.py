"""The mask pyramid and masked pooling against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from osprey_jax import masks as numpy_masks
from osprey_jax.ops import masked_pooling as ops

SIZES = (128, 64, 32, 16)


def torch_resize(masks, side):
    tensor = torch.from_numpy(masks.astype(np.float32))[:, None]
    return F.interpolate(tensor, size=(side, side), mode="bilinear", align_corners=False)[:, 0].numpy()


def example_masks(height, width, seed=0):
    rng = np.random.default_rng(seed)
    masks = np.zeros((7, height, width), bool)
    masks[0, height // 3 : height // 2 + 1, width // 4 : width // 2 + 1] = True
    masks[1, height // 2, :] = True
    masks[2, :, width // 3] = True
    masks[3, rng.integers(height), rng.integers(width)] = True
    masks[4] = True
    masks[5] = rng.random((height, width)) < 0.03
    return masks


@pytest.mark.parametrize(
    ("height", "width"),
    [(480, 640), (427, 640), (512, 512), (333, 1000), (1, 1), (7, 2000), (96, 96), (16, 48), (1365, 2048)],
)
def test_pyramids_equal_torch_interpolate(height, width):
    masks = example_masks(height, width)
    of_numpy = numpy_masks.mask_pyramid(masks, level_sizes=SIZES, position_size=112)
    of_jax = ops.mask_pyramid(jnp.asarray(masks), level_sizes=SIZES, position_size=112)
    for side, level, device_level in zip(SIZES, of_numpy.levels, of_jax.levels, strict=True):
        expected = torch_resize(masks, side) > 0
        np.testing.assert_array_equal(level, expected)
        np.testing.assert_array_equal(np.asarray(device_level), expected)
    # Weights are torch's to the bit; only the order of two additions may differ.
    np.testing.assert_allclose(of_numpy.position, torch_resize(masks, 112), rtol=0, atol=2e-7)
    np.testing.assert_allclose(np.asarray(of_jax.position), torch_resize(masks, 112), rtol=0, atol=2e-7)


@pytest.mark.parametrize("out_size", [3, 6, 12, 16, 24, 32, 64, 112, 128])
def test_taps_of_non_zero_weight_equal_torch_for_every_size(out_size):
    for in_size in range(1, 1400):
        lo, hi, weight = numpy_masks.bilinear_taps(in_size, out_size)
        ramp = torch.arange(in_size, dtype=torch.float32)
        odd = (ramp % 2)[None, None, None]
        picked = F.interpolate(odd, size=(1, out_size), mode="bilinear", align_corners=False)[0, 0, 0].numpy()
        parity = np.where(lo % 2, 1 - weight, weight) * np.where(hi == lo, 0, 1) + np.where(
            hi == lo, lo % 2, 0
        )
        np.testing.assert_array_equal(picked > 0, parity > 0, err_msg=f"{in_size} -> {out_size}")
        even = 1 - odd
        picked = F.interpolate(even, size=(1, out_size), mode="bilinear", align_corners=False)[
            0, 0, 0
        ].numpy()
        np.testing.assert_array_equal(picked > 0, 1 - parity > 0, err_msg=f"{in_size} -> {out_size}")


def pooling_inputs(seed=0):
    rng = np.random.default_rng(seed)
    features = tuple(rng.normal(size=(2, side, side, 5)).astype(np.float32) for side in (16, 8))
    levels = tuple(rng.random((2, 3, side, side)) < 0.2 for side in (16, 8))
    levels[1][:, 1] = False
    return features, levels


def torch_pool(features, mask):
    masked = torch.einsum("byxc,bryx->brc", features, mask.float())
    return masked / (mask.float().sum((2, 3)) + 1e-8)[..., None]


def test_pooling_and_its_gradient_equal_torch():
    features, levels = pooling_inputs()
    pooled, pullback = jax.vjp(lambda x: ops.masked_pooling(x, levels), features)
    cotangents = tuple(np.cos(np.arange(p.size, dtype=np.float32)).reshape(p.shape) for p in pooled)
    (gradients,) = pullback(cotangents)
    for x, mask, out, ct, gradient in zip(features, levels, pooled, cotangents, gradients, strict=True):
        leaf = torch.from_numpy(x).requires_grad_()
        expected = torch_pool(leaf, torch.from_numpy(mask))
        expected.backward(torch.from_numpy(ct))
        np.testing.assert_allclose(np.asarray(out), expected.detach().numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.asarray(gradient), leaf.grad.numpy(), rtol=1e-5, atol=1e-7)


def test_an_empty_level_pools_to_zeros_and_one_pixel_pools_that_pixel():
    features, levels = pooling_inputs()
    one = np.zeros_like(levels[0])
    one[:, :, 5, 7] = True
    pooled = ops.masked_pooling(features, (one, np.zeros_like(levels[1])))
    np.testing.assert_array_equal(np.asarray(pooled[0]), np.repeat(features[0][:, None, 5, 7], 3, axis=1))
    assert not np.asarray(pooled[1]).any()
