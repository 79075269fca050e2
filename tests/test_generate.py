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


def test_greedy_takes_the_first_of_equals() -> None:
    logits = jnp.array([[0.0, 2.0, 2.0], [1.0, -1.0, 0.5]])
    assert Greedy()(logits, jax.random.key(0)).tolist() == [1, 0]
