"""AdamW, schedule and clipping, compared with torch's and transformers', and the freezing of parameters."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from osprey_jax.optim import AdamW, TrainState, init_state, merge, partition

STEPS, WARMUP = 40, 4
SHAPES = {"decoder": {"kernel": (5, 7), "bias": (7,)}, "vision": {"gamma": (11,)}}


def tree(seed: int, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    # Of magnitudes from 1e-6 to 1, as gradients have.
    return jax.tree.map(
        lambda shape: (scale * rng.normal(size=shape) * 10 ** rng.uniform(-6, 0, shape)).astype(np.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def torch_run(gradients: list[dict], *, weight_decay: float, clip_norm: float) -> list[dict]:
    """Parameters after each step of torch's AdamW under transformers' schedule; they begin at zero."""
    leaves = jax.tree.map(lambda g: torch.zeros(g.shape, requires_grad=True), gradients[0])
    flat = jax.tree.leaves(leaves, is_leaf=lambda x: isinstance(x, torch.Tensor))
    optimizer = torch.optim.AdamW(flat, lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    after = []
    for step in gradients:
        for leaf, gradient in zip(flat, jax.tree.leaves(step), strict=True):
            leaf.grad = torch.from_numpy(gradient.copy())
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(flat, clip_norm)
        optimizer.step()
        schedule.step()
        after.append([leaf.detach().numpy().copy() for leaf in flat])
    return after


@pytest.mark.parametrize(
    ("weight_decay", "clip_norm", "scale"),
    [(0.0, 0.0, 1.0), (0.0, 1.0, 3.0), (0.0, 1.0, 0.05), (0.1, 1.0, 3.0)],
)
def test_updates_equal_torchs_adamw(weight_decay: float, clip_norm: float, scale: float) -> None:
    gradients = [tree(seed, scale) for seed in range(STEPS)]
    expected = torch_run(gradients, weight_decay=weight_decay, clip_norm=clip_norm)
    adamw = AdamW(
        peak_learning_rate=3e-3, warmup_steps=WARMUP, total_steps=STEPS, weight_decay=weight_decay,
        clip_norm=clip_norm,
    )  # fmt: skip
    zeros = jax.tree.map(jnp.zeros_like, jax.tree.map(jnp.asarray, gradients[0]))
    state = init_state(zeros, [".*"], frozen_dtype="float32")
    update = jax.jit(adamw.update)
    for gradient, leaves in zip(gradients, expected, strict=True):
        state, _ = update(state, gradient)
        for found, leaf in zip(jax.tree.leaves(state.trained), leaves, strict=True):
            # From zero, what is compared is the sum of the updates.
            assert np.linalg.norm(np.asarray(found) - leaf) <= 1e-6 * np.linalg.norm(leaf)
    assert int(state.step) == STEPS


@pytest.mark.parametrize("b2", [0.95, 0.999])
@pytest.mark.parametrize("step", [0, 7, 900])
def test_every_element_of_one_update_equals_torchs(b2: float, step: int) -> None:
    """From parameters of zero, so that they are the update, and from moments of whatever size."""
    adamw = AdamW(peak_learning_rate=3e-3, warmup_steps=0, total_steps=1000, b2=b2, clip_norm=0.0)
    gradients, moments, squares = tree(1), tree(2), jax.tree.map(np.square, tree(3))
    zeros = jax.tree.map(np.zeros_like, gradients)
    state = init_state(jax.tree.map(jnp.asarray, zeros), [".*"], frozen_dtype="float32")
    if step:
        state = dataclasses.replace(state, step=jnp.int32(step), mu=moments, nu=squares)
    found, _ = jax.jit(adamw.update)(state, gradients)
    leaves = [torch.nn.Parameter(torch.from_numpy(leaf.copy())) for leaf in jax.tree.leaves(zeros)]
    rate = float(adamw.learning_rate(jnp.int32(step)))
    optimizer = torch.optim.AdamW(leaves, lr=rate, betas=(0.9, b2), eps=1e-8, weight_decay=0.0)
    for leaf, gradient, moment, square in zip(
        leaves, *map(jax.tree.leaves, (gradients, moments, squares)), strict=True
    ):
        leaf.grad = torch.from_numpy(gradient.copy())
        if step:
            optimizer.state[leaf] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.from_numpy(moment.copy()),
                "exp_avg_sq": torch.from_numpy(square.copy()),
            }
    optimizer.step()
    for ours, leaf in zip(jax.tree.leaves(found.trained), leaves, strict=True):
        np.testing.assert_allclose(np.asarray(ours), leaf.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 7), (1, 5), (30, 1000), (700, 100_000)])
def test_learning_rate_equals_transformers_schedule_to_the_last_step(warmup: int, steps: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = transformers.get_cosine_schedule_with_warmup(
        torch.optim.SGD([parameter], lr=1.0), warmup, steps
    )
    factor = schedule.lr_lambdas[0]
    adamw = AdamW(peak_learning_rate=2e-3, warmup_steps=warmup, total_steps=steps)
    chosen = np.unique([0, 1, warmup, warmup + 1, steps // 2, steps - 2, steps - 1, steps])
    found = jax.vmap(adamw.learning_rate)(jnp.asarray(chosen))
    expected = [2e-3 * factor(int(step)) for step in chosen]
    # transformers' own double-precision cosine loses 1e-16 of 1, which at the end is 1e-7 of what is left.
    np.testing.assert_allclose(np.asarray(found), expected, rtol=2e-6, atol=1e-18)


@pytest.mark.parametrize("norm", [1e-3, 0.999, 1.0, 1.001, 50.0])
def test_clipping_equals_torchs(norm: float) -> None:
    gradients = tree(0)
    length = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(gradients)))
    gradients = jax.tree.map(lambda g: (g * (norm / length)).astype(np.float32), gradients)
    leaves = [torch.nn.Parameter(torch.zeros(g.shape)) for g in jax.tree.leaves(gradients)]
    for leaf, gradient in zip(leaves, jax.tree.leaves(gradients), strict=True):
        leaf.grad = torch.from_numpy(gradient.copy())
    expected_norm = torch.nn.utils.clip_grad_norm_(leaves, 1.0).item()
    # The first moment then is half of the clipped gradient.
    adamw = AdamW(peak_learning_rate=1.0, warmup_steps=0, total_steps=1, b1=0.5)
    state = init_state(jax.tree.map(jnp.zeros_like, gradients), [".*"], frozen_dtype="float32")
    state, numbers = adamw.update(state, gradients)
    assert float(numbers["grad_norm"]) == pytest.approx(expected_norm, rel=1e-6)
    for found, leaf in zip(jax.tree.leaves(state.mu), leaves, strict=True):
        np.testing.assert_allclose(2 * np.asarray(found), leaf.grad.numpy(), rtol=1e-6)


def test_frozen_parameters_have_no_state_and_keep_their_values_in_their_own_dtype() -> None:
    params = jax.tree.map(jnp.asarray, tree(0))
    state = init_state(params, ["decoder/.*"], frozen_dtype="bfloat16")
    assert set(state.trained) == set(state.mu) == set(state.nu) == {"decoder"}
    assert state.frozen["vision"]["gamma"].dtype == jnp.bfloat16
    adamw = AdamW(peak_learning_rate=1.0, warmup_steps=0, total_steps=9, weight_decay=0.1)
    after, _ = adamw.update(state, {"decoder": tree(1)["decoder"]})
    assert jnp.array_equal(after.frozen["vision"]["gamma"], params["vision"]["gamma"].astype(jnp.bfloat16))
    assert not jnp.array_equal(after.trained["decoder"]["bias"], params["decoder"]["bias"])
    assert set(after.params) == {"decoder", "vision"}


def test_partition_goes_by_whole_paths_and_merge_undoes_it() -> None:
    params = tree(0)
    trained, frozen = partition(params, ["vision/gamma", "decoder/b.*"])
    assert trained == {"decoder": {"bias": params["decoder"]["bias"]}, "vision": params["vision"]}
    assert frozen == {"decoder": {"kernel": params["decoder"]["kernel"]}}
    assert jax.tree.structure(merge(trained, frozen)) == jax.tree.structure(params)
    with pytest.raises(ValueError, match=re.escape("no parameter's path matches 'decoder'")):
        partition(params, ["decoder"])
    with pytest.raises(ValueError, match=re.escape("'(' is no regular expression: missing )")):
        partition(params, ["("])
    with pytest.raises(ValueError, match="no pattern names parameters to train"):
        partition(params, [])


def test_state_goes_through_a_checkpoints_arrays_unchanged() -> None:
    params = jax.tree.map(jnp.asarray, tree(0))
    state = init_state(params, ["decoder/bias"], frozen_dtype="float32")
    arrays = state.to_arrays()
    assert jax.tree.structure(arrays["params"]) == jax.tree.structure(params)
    again = TrainState.from_arrays(arrays, ["decoder/bias"], step=state.step)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True))


def test_first_moments_of_bfloat16_change_an_update_by_their_rounding_alone() -> None:
    """Each update is that of torch's AdamW on moments rounded before it."""
    gradients = [tree(seed) for seed in range(3)]
    params = jax.tree.map(jnp.asarray, tree(9))
    adamw = AdamW(peak_learning_rate=3e-3, warmup_steps=0, total_steps=1000, clip_norm=0.0)
    state = init_state(params, [".*"], frozen_dtype="float32", mu_dtype="bfloat16")
    for step, gradient in enumerate(gradients):
        leaves = [torch.nn.Parameter(torch.tensor(np.array(x))) for x in jax.tree.leaves(state.trained)]
        rate = float(adamw.learning_rate(jnp.int32(step)))
        optimizer = torch.optim.AdamW(leaves, lr=rate, weight_decay=0.0)
        moments = map(jax.tree.leaves, (gradient, state.mu, state.nu))
        for leaf, own, moment, square in zip(leaves, *moments, strict=True):
            leaf.grad = torch.from_numpy(own.copy())
            optimizer.state[leaf] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.tensor(np.array(moment, np.float32)),
                "exp_avg_sq": torch.tensor(np.array(square)),
            }
        optimizer.step()
        state, _ = adamw.update(state, gradient)
        assert {str(x.dtype) for x in jax.tree.leaves(state.mu)} == {"bfloat16"}
        assert {str(x.dtype) for x in jax.tree.leaves((state.nu, state.trained))} == {"float32"}
        for found, leaf in zip(jax.tree.leaves(state.trained), leaves, strict=True):
            # Where parameter and update cancel, what is left has the rounding of what was there.
            np.testing.assert_allclose(np.asarray(found), leaf.detach().numpy(), rtol=1e-6, atol=1e-8)


def settled_run(adamw: AdamW, scales: list[float]) -> tuple[list[TrainState], list[dict]]:
    """States and numbers after each of many updates with gradients of one norm, times these at the end."""
    state = init_state(jax.tree.map(jnp.asarray, tree(0)), [".*"], frozen_dtype="float32")
    update, states, numbers = jax.jit(adamw.update), [], []
    for scale in [1.0] * 60 + scales:
        state, found = update(state, jax.tree.map(lambda g, scale=scale: g * np.float32(scale), tree(1)))
        states.append(state)
        numbers.append({name: float(value) for name, value in found.items()})
    return states, numbers


@pytest.mark.parametrize("bad", [30.0, float("nan"), float("inf")])
def test_skipped_updates_change_nothing_but_the_count(bad: float) -> None:
    adamw = AdamW(peak_learning_rate=1e-3, warmup_steps=0, total_steps=99, spike=10.0, skip_spikes=True)
    states, numbers = settled_run(adamw, [bad, 1.0])
    before, left_out, after = states[-3:]
    assert int(left_out.step) == int(before.step) + 1
    for found, expected in zip(
        *(jax.tree.leaves(x.replace(step=0, log_norm=0)) for x in (left_out, before)), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    assert [row["skipped"] for row in numbers[-3:]] == [0, 1, 0]
    assert not np.array_equal(after.trained["vision"]["gamma"], left_out.trained["vision"]["gamma"])
    # What is no number is no spike: without skipping it must end a run.
    assert numbers[-2]["spike"] == (pytest.approx(30.0, rel=1e-4) if bad == 30.0 else 0)


def test_without_skipping_a_spike_is_told_and_taken() -> None:
    adamw = AdamW(peak_learning_rate=1e-3, warmup_steps=0, total_steps=99, spike=10.0)
    states, numbers = settled_run(adamw, [9.0, 30.0])
    assert [row["spike"] > 0 for row in numbers[-3:]] == [False, False, True]
    assert not any(row["skipped"] for row in numbers)
    assert not np.array_equal(states[-1].trained["vision"]["gamma"], states[-2].trained["vision"]["gamma"])


def test_a_lasting_rise_becomes_usual() -> None:
    adamw = AdamW(peak_learning_rate=1e-3, warmup_steps=0, total_steps=999, spike=10.0, skip_spikes=True)
    _, numbers = settled_run(adamw, [30.0] * 60)
    skipped = [row["skipped"] for row in numbers[60:]]
    assert skipped[0] == 1
    assert skipped[-1] == 0
