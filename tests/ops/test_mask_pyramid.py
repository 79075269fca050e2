"""Mask pyramids on the device against torch's interpolation, and against those of the host."""

import jax
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from osprey_jax.masks import mask_pyramid as on_host
from osprey_jax.ops.mask_pyramid import mask_pyramid

SIDES = (24, 12, 6, 3)


def some_masks(height: int, width: int) -> np.ndarray:
    """Blobs, a thin line, a single pixel, nothing and all."""
    rng = np.random.default_rng(height * width)
    masks = np.zeros((6, height, width), bool)
    masks[0] = rng.random((height, width)) < 0.02
    masks[1, : height // 2 + 1, width // 3 :] = True
    masks[2, :, width // 2] = True
    masks[3, height - 1, 0] = True
    masks[5] = True
    return masks


@pytest.mark.parametrize("size", [(70, 133), (24, 24), (1, 9), (300, 7)])
def test_every_level_and_the_position_are_torchs(size: tuple[int, int]) -> None:
    masks = some_masks(*size)
    found = mask_pyramid(jax.device_put(masks), level_sizes=SIDES, position_size=112)
    given = torch.from_numpy(masks).float()[None]

    def resized(side: int) -> np.ndarray:
        return F.interpolate(given, size=(side, side), mode="bilinear", align_corners=False)[0].numpy()

    for level, side in zip(found.levels, SIDES, strict=True):
        assert (level.shape, level.dtype) == ((6, side, side), bool)
        np.testing.assert_array_equal(level, resized(side) > 0)
    np.testing.assert_allclose(found.position, resized(112), rtol=0, atol=1e-6)


def test_levels_on_device_and_host_are_the_same_bit_by_bit() -> None:
    masks = some_masks(97, 61)
    ours = mask_pyramid(jax.device_put(masks), level_sizes=(128, 64, 32, 16), position_size=112)
    hosts = on_host(masks, level_sizes=(128, 64, 32, 16), position_size=112)
    for ours_level, hosts_level in zip(ours.levels, hosts.levels, strict=True):
        np.testing.assert_array_equal(ours_level, hosts_level)
    np.testing.assert_allclose(ours.position, hosts.position, rtol=0, atol=2e-7)
