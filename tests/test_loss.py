"""The loss, compared with torch's cross-entropy dialogue by dialogue."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from osprey_jax.loss import loss_sums

VOCAB, LENGTH = 37, 24
# Where the answers of four dialogues stand: several turns, one token, and lengths that differ a lot.
ANSWERS = ([(3, 7), (10, 11), (15, 24)], [(20, 21)], [(1, 24)], [(5, 9)])


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, labels and weights: each dialogue's labelled tokens weigh 1 together."""
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(len(ANSWERS), LENGTH, VOCAB)).astype(np.float32)
    labels = np.full((len(ANSWERS), LENGTH), -100, np.int32)
    weights = np.zeros((len(ANSWERS), LENGTH), np.float32)
    for row, spans in enumerate(ANSWERS):
        for start, end in spans:
            labels[row, start:end] = rng.integers(0, VOCAB, end - start)
        labelled = labels[row] != -100
        weights[row, labelled] = 1 / labelled.sum()
    return logits, labels, weights


def torch_mean(logits: "torch.Tensor", labels: np.ndarray) -> "torch.Tensor":
    """What the original computes, one dialogue per device, averaged over the devices."""
    losses = [
        torch.nn.functional.cross_entropy(one[:-1], torch.from_numpy(label[1:]).long(), ignore_index=-100)
        for one, label in zip(logits, labels, strict=True)
    ]
    return torch.stack(losses).mean()


def ours(logits: jax.Array, labels: np.ndarray, weights: np.ndarray) -> jax.Array:
    total, weight = loss_sums(logits, jnp.asarray(labels), jnp.asarray(weights))
    return total / weight


def test_loss_is_the_mean_over_dialogues_of_torchs_mean_over_labelled_tokens() -> None:
    logits, labels, weights = batch()
    expected = torch_mean(torch.from_numpy(logits), labels).item()
    assert float(ours(jnp.asarray(logits), labels, weights)) == pytest.approx(expected, rel=1e-6)


def test_loss_per_token_is_torchs_mean_over_all_labelled_tokens() -> None:
    logits, labels, _ = batch()
    shifted = torch.from_numpy(logits[:, :-1]).reshape(-1, VOCAB), torch.from_numpy(labels[:, 1:]).reshape(-1)
    expected = torch.nn.functional.cross_entropy(shifted[0], shifted[1].long(), ignore_index=-100).item()
    weights = (labels != -100).astype(np.float32)
    assert float(ours(jnp.asarray(logits), labels, weights)) == pytest.approx(expected, rel=1e-6)


def test_gradient_equals_torchs_and_is_zero_where_nothing_is_labelled() -> None:
    logits, labels, weights = batch()
    leaf = torch.from_numpy(logits).requires_grad_()
    torch_mean(leaf, labels).backward()
    found = np.asarray(jax.grad(ours)(jnp.asarray(logits), labels, weights))
    np.testing.assert_allclose(found, leaf.grad.numpy(), atol=1e-7)
    assert not found[:, :-1][labels[:, 1:] == -100].any()
    assert not found[:, -1].any()


def test_sums_of_parts_add_up_to_the_sums_of_the_batch() -> None:
    logits, labels, weights = batch()
    whole = loss_sums(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(weights))
    parts = [
        loss_sums(jnp.asarray(logits[i:j]), jnp.asarray(labels[i:j]), jnp.asarray(weights[i:j]))
        for i, j in ((0, 1), (1, 4))
    ]
    np.testing.assert_allclose(np.sum(parts, axis=0), np.asarray(whole), rtol=1e-6)


def test_what_stands_at_unlabelled_places_does_not_matter() -> None:
    logits, labels, weights = batch()
    expected = float(ours(jnp.asarray(logits), labels, weights))
    logits[:, :-1][labels[:, 1:] == -100] = np.inf
    assert float(ours(jnp.asarray(logits), labels, weights)) == expected


def test_logits_of_bfloat16_are_reduced_in_float32() -> None:
    logits, labels, weights = batch()
    half = jnp.asarray(logits, jnp.bfloat16)
    expected = torch_mean(torch.from_numpy(np.array(half, np.float32)), labels).item()
    found = ours(half, labels, weights)
    assert found.dtype == jnp.float32
    assert float(found) == pytest.approx(expected, rel=1e-6)
