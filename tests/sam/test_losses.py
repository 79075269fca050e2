"""Distances between masks against torch's, pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from osprey_jax.sam.losses import distances

P, M, R, H, W = 3, 4, 5, 9, 7


@pytest.fixture
def masks() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    regions = (rng.random((R, H, W)) < 0.4).astype(np.float32)
    regions[-1] = 0
    return 4 * rng.standard_normal((P, M, H, W), np.float32), regions


def torch_distances(logits: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, ...]:
    p, inside = logits.sigmoid(), logits > 0
    dice = 1 - (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)
    both, either = (inside & (truth > 0)).sum(), (inside | (truth > 0)).sum()
    return F.binary_cross_entropy_with_logits(logits, truth), dice, both / either.clamp(min=1)


def test_all_pairs_are_as_in_torch(masks: tuple[np.ndarray, np.ndarray]) -> None:
    logits, regions = masks
    found = distances(jnp.asarray(logits), jnp.asarray(regions))
    for place in np.ndindex(P, M, R):
        expected = torch_distances(torch.tensor(logits[place[:2]]), torch.tensor(regions[place[2]]))
        for ours, theirs in zip(found, expected, strict=True):
            # Sums of some 60 float32 numbers, in another order.
            np.testing.assert_allclose(ours[place], theirs, rtol=1e-5, atol=1e-6)


def test_gradients_are_as_in_torch(masks: tuple[np.ndarray, np.ndarray]) -> None:
    logits, regions = masks
    weights = np.random.default_rng(1).random((2, P, M, R), np.float32)

    def loss(x: jax.Array) -> jax.Array:
        found = distances(x, jnp.asarray(regions))
        return (weights[0] * found.cross_entropy + weights[1] * found.dice + found.iou).sum()

    x = torch.tensor(logits, requires_grad=True)
    for place in np.ndindex(P, M, R):
        cross_entropy, dice, _ = torch_distances(x[place[:2]], torch.tensor(regions[place[2]]))
        (weights[0][place].item() * cross_entropy + weights[1][place].item() * dice).backward()
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(logits)), x.grad, rtol=1e-4, atol=1e-6)


def test_a_mask_that_is_right_is_near_and_its_opposite_far(masks: tuple[np.ndarray, np.ndarray]) -> None:
    regions = jnp.asarray(masks[1][:1])
    sure = jnp.stack([40 * regions - 20, 20 - 40 * regions], axis=1)
    found = distances(sure, regions)
    np.testing.assert_allclose(found.cross_entropy[0, :, 0], [0, 20], atol=1e-5)
    assert found.dice[0, 0, 0] < 1e-4 < 0.9 < found.dice[0, 1, 0]
    np.testing.assert_array_equal(found.iou[0, :, 0], [1, 0])


def test_two_empty_masks_have_no_overlap_and_no_division_by_zero() -> None:
    found = distances(jnp.full((1, 1, H, W), -50.0), jnp.zeros((1, H, W)))
    assert [float(x[0, 0, 0]) for x in found] == pytest.approx([0, 0, 0], abs=1e-6)
