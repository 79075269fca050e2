"""The loss, compared with torch's cross-entropy dialogue by dialogue."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from osprey_jax import loss
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


@pytest.mark.parametrize("length", [1, LENGTH])
def test_the_loss_in_chunks_and_its_gradients_equal_torchs(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 7 places, which divide neither length."""
    monkeypatch.setattr(loss, "CHUNK", 7)
    rng = np.random.default_rng(3)
    logits, labels, weights = batch()
    if length == 1:
        logits, labels, weights = (x[:, :1] for x in (logits, labels, weights))
    hidden = rng.normal(size=(*labels.shape, 5)).astype(np.float32)
    kernel = rng.normal(size=(5, VOCAB)).astype(np.float32)

    def chunked(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        sums = loss.chunked_loss_sums(lambda x: x @ kernel, hidden, jnp.asarray(labels), jnp.asarray(weights))
        return sums[0] / jnp.maximum(sums[1], 1)

    found, gradients = jax.value_and_grad(chunked, argnums=(0, 1))(jnp.asarray(hidden), jnp.asarray(kernel))
    leaves = [torch.from_numpy(x).requires_grad_() for x in (hidden, kernel)]
    if length == 1:
        assert float(found) == 0
        return
    expected = torch_mean(leaves[0] @ leaves[1], labels)
    expected.backward()
    assert float(found) == pytest.approx(expected.item(), rel=1e-6)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        np.testing.assert_allclose(np.asarray(gradient), leaf.grad.numpy(), atol=1e-6)


def test_no_float32_logits_of_the_whole_length_are_there() -> None:
    """Neither in the forward pass nor among what it keeps for the backward one."""
    rows, length, dim, vocab = 2, 2048, 8, 1000
    hidden, kernel = jnp.zeros((rows, length, dim)), jnp.zeros((dim, vocab))
    labels, weights = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length))

    def total(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return loss.chunked_loss_sums(lambda x: x @ kernel, hidden, labels, weights)[0]

    compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(hidden, kernel).compile()
    whole = rows * length * vocab * 4
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 2
