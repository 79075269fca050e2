"""Samplers, by literal distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osprey_jax.generate import Greedy, TopP

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32)


def draws(temperature: float, top_p: float, count: int = 4000) -> np.ndarray:
    """Shares of each token among `count` draws."""
    sampler = TopP(temperature=jnp.float32(temperature), top_p=jnp.float32(top_p))
    keys = jax.random.split(jax.random.key(0), count)
    logits = jnp.log(PROBABILITIES)[None, :]
    tokens = jax.jit(jax.vmap(lambda key: sampler(logits, key)[0]))(keys)
    return np.bincount(np.asarray(tokens), minlength=5) / count


def drawn_by_keys(logits: np.ndarray, temperature: float, top_p: float, *, count: int) -> np.ndarray:
    """Tokens drawn from rows of logits, each with the same `count` keys: `(count, rows)`."""
    sampler = TopP(temperature=jnp.float32(temperature), top_p=jnp.float32(top_p))
    keys = jax.random.split(jax.random.key(0), count)

    def draw(key: jax.Array) -> jax.Array:
        return jax.vmap(lambda row: sampler(row[None], key)[0])(jnp.asarray(logits))

    return np.asarray(jax.jit(jax.vmap(draw))(keys))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1.0, [0, 1, 2, 3, 4]), (0.9, [0, 1, 3, 4]), (0.5, [1, 3]), (0.39, [1]), (1e-6, [1])],
)
def test_top_p_draws_from_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    expected = np.zeros(5)
    expected[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    shares = draws(1.0, top_p)
    assert not shares[expected == 0].any()
    np.testing.assert_allclose(shares, expected, atol=0.03)  # four standard deviations of 4,000 draws


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_raises_probabilities_to_its_inverse(temperature: float) -> None:
    expected = PROBABILITIES ** (1 / temperature)
    np.testing.assert_allclose(draws(temperature, 1.0), expected / expected.sum(), atol=0.03)


def kept_by(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Probabilities of what may be drawn: likeliest tokens, one after another until they reach `top_p`."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    probabilities, kept, reached = weights / weights.sum(), np.zeros(len(logits)), 0.0
    for token in sorted(range(len(logits)), key=lambda token: -probabilities[token]):
        if reached >= top_p:
            break
        kept[token] = probabilities[token]
        reached += probabilities[token]
    return kept / reached


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.9), (0.7, 0.6), (1.6, 0.97), (1.0, 1.0)])
def test_many_tokens_are_drawn_as_often_as_they_are_likely_among_those_kept(
    temperature: float, top_p: float
) -> None:
    rows = np.random.default_rng(5).normal(scale=2, size=(4, 40)).astype(np.float32)
    drawn = drawn_by_keys(rows, temperature, top_p, count=4000)
    for logits, tokens in zip(rows, drawn.T, strict=True):
        expected = kept_by(logits, temperature, top_p)
        shares = np.bincount(tokens, minlength=40) / len(tokens)
        assert not shares[expected == 0].any()
        assert shares[expected > 0.005].all()  # 20 draws are expected of the least likely of them
        deviation = np.sqrt(expected * (1 - expected) / len(tokens))
        assert (np.abs(shares - expected) <= 5 * deviation + 1e-3).all()


@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_what_is_drawn_is_the_same_where_rounding_makes_two_tokens_change_ranks(top_p: float) -> None:
    logits = np.random.default_rng(6).normal(size=40).astype(np.float32)
    likely, other = np.argsort(-logits)[2:4]
    logits[other] = logits[likely] - np.float32(1e-6)
    swapped = logits.copy()
    swapped[[likely, other]] = logits[[other, likely]]
    assert np.argsort(-logits).tolist() != np.argsort(-swapped).tolist()
    before, after = drawn_by_keys(np.stack([logits, swapped]), 1.0, top_p, count=4000).T
    np.testing.assert_array_equal(before, after)
    assert min((before == likely).sum(), (before == other).sum()) > 200


def test_greedy_takes_the_first_of_equals() -> None:
    logits = jnp.array([[0.0, 2.0, 2.0], [1.0, -1.0, 0.5]])
    assert Greedy()(logits, jax.random.key(0)).tolist() == [1, 0]
