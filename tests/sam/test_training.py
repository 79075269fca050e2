"""Training of a segmenter: what its loss asks for, that it learns, and that it goes on after a stop."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osprey_jax.checkpoint import flatten
from osprey_jax.sam import training
from osprey_jax.sam.prompts import Mix
from osprey_jax.sam.train import examples, restore, store, train
from osprey_jax.sam.training import (
    SHARPNESS,
    Settings,
    corrective_clicks,
    judge,
    make_state,
    make_update,
)
from osprey_jax.typing import Array
from tests.sam.scenes import CONFIG, SETTINGS, SIDE, scene

UPDATE = make_update(CONFIG, dataclasses.replace(SETTINGS, steps=40))


@pytest.fixture
def same_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for all trainings here."""
    monkeypatch.setattr("osprey_jax.sam.train.make_update", lambda config, settings: UPDATE)


def masks(*spans: tuple[int, int]) -> Array:
    """A row of eight pixels for each span, ones from its start to before its end."""
    places = jnp.arange(8)
    return jnp.stack([((places >= a) & (places < b)).astype(jnp.float32)[None] for a, b in spans])


REGIONS = masks((0, 4), (0, 2), (4, 8))  # an object, its part and what is no region
SURE = 20.0


def judged(spans: list[tuple[int, int]], iou: list[float], meant: list[bool], chosen: int):
    logits = SURE * (2 * masks(*spans) - 1)[None]
    return judge(
        logits, jnp.array([iou], jnp.float32), REGIONS, jnp.array([meant]), jnp.array([chosen], jnp.int32)
    )


def test_an_ambiguous_click_is_content_with_one_mask_for_each_meaning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "RELAXED", 0.0)
    good = judged([(0, 4), (0, 4), (0, 2), (6, 8)], [1, 1, 1, 0], [True, True, False], 0)
    assert float(good.several[0]) == pytest.approx(0, abs=1e-4)
    assert float(good.single[0]) == pytest.approx(0, abs=1e-4)
    assert float(good.several_iou[0]) == 1
    without = judged([(0, 4), (0, 4), (0, 4), (6, 8)], [1, 1, 1, 0], [True, True, False], 0)
    assert float(without.several[0]) > 1
    assert float(without.several_iou[0]) == pytest.approx(0.75)


def test_the_expected_iou_is_that_with_the_nearest_meaning() -> None:
    found = judged([(0, 4), (0, 3), (0, 2), (4, 8)], [1, 0.75, 1, 0], [True, True, False], 0)
    assert float(found.expectation[0]) == pytest.approx(0, abs=1e-12)
    alone = judged([(0, 4), (0, 3), (0, 2), (4, 8)], [1, 0.75, 0.5, 0], [True, False, False], 0)
    assert float(alone.expectation[0]) == pytest.approx(0, abs=1e-12)


def test_masks_that_are_not_the_best_count_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = [(0, 4), (0, 4), (4, 8), (4, 8)]
    monkeypatch.setattr(training, "RELAXED", 0.1)
    some = judged(spans, [1, 1, 0, 0], [True, False, False], 0)
    monkeypatch.setattr(training, "RELAXED", 1.0)
    all_of_it = judged(spans, [1, 1, 0, 0], [True, False, False], 0)
    assert float(some.several[0]) == pytest.approx(0.1 * float(all_of_it.several[0]), rel=1e-4)


def test_what_is_no_region_has_a_mask_but_no_expected_iou() -> None:
    found = judged([(4, 8)] * 4, [0] * 4, [False, False, True], 2)
    for value in (found.single[0], found.several[0], found.expectation[0]):
        assert float(value) == pytest.approx(0, abs=1e-4)


def test_corrective_clicks_lie_where_a_mask_is_wrong() -> None:
    truth = masks((0, 4), (0, 4), (0, 4)) > 0
    predicted = masks((0, 3), (0, 6), (0, 4)) > 0
    found = [corrective_clicks(predicted, truth, jax.random.key(n)) for n in range(20)]
    places, labels = (np.stack(x) for x in zip(*found, strict=True))
    assert (places[:, :, 1] == 0).all()
    assert (places[:, 0, 0] == 3).all()
    assert set(places[:, 1, 0].tolist()) == {4, 5}
    assert places[:, 2, 0].max() < 4
    np.testing.assert_array_equal(labels, np.tile([1, 0, 1], (20, 1)))


def test_attention_by_place_begins_as_a_look_up() -> None:
    params = flatten(make_state(CONFIG, SETTINGS).params)
    queries = [path for path in params if "image" in path and path.endswith("q_proj/kernel")]
    assert len(queries) == 3  # both directions of a layer, and the last one
    for path in queries:
        np.testing.assert_array_equal(params[path], params[path.replace("q_proj", "k_proj")])
    assert SHARPNESS > 1


def test_the_loss_falls_and_all_but_the_frequencies_of_places_learn() -> None:
    state = make_state(CONFIG, SETTINGS)
    before = {path: np.asarray(leaf) for path, leaf in flatten(state.params).items()}
    batch, losses = examples(scene, SETTINGS, 0), []
    for _ in range(12):
        state, numbers = UPDATE(state, batch)
        losses.append(float(numbers["loss"]))
    assert losses[-1] < 0.97 * losses[0]
    assert all(0 <= numbers[name] <= 1 for name in ("click", "box", "pair", "corrected"))
    still = [path for path, leaf in flatten(state.params).items() if np.array_equal(leaf, before[path])]
    assert still == ["prompt_encoder/frequencies"]


@pytest.mark.usefixtures("same_update")
def test_a_training_that_goes_on_is_the_one_that_was_not_stopped(tmp_path: Path) -> None:
    step, whole = train(CONFIG, SETTINGS, scene, tmp_path / "whole.npz")
    assert step == SETTINGS.steps
    asked = iter([None, None, "SIGINT"])
    stopped, _ = train(CONFIG, SETTINGS, scene, tmp_path / "parts.npz", stopped=lambda: next(asked))
    assert stopped == 2
    step, parts = train(CONFIG, SETTINGS, scene, tmp_path / "parts.npz")
    assert step == SETTINGS.steps
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["parts.npz", "whole.npz"]
    for path, leaf in flatten(whole).items():
        np.testing.assert_array_equal(leaf, flatten(parts)[path], err_msg=path)


def test_a_saved_state_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "saved.npz"
    store(path, make_state(CONFIG, SETTINGS), "these settings")
    state = make_state(CONFIG, SETTINGS)
    restore(path, state, "these settings")
    with pytest.raises(ValueError, match=r"saved\.npz is of a training with other settings; delete it"):
        restore(path, state, "others")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"saved\.npz is damaged, delete it"):
        restore(path, state, "these settings")


def test_scenes_of_another_size_are_refused(tmp_path: Path) -> None:
    def larger(number: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((SIDE + 1, SIDE, 3), np.uint8), np.zeros((1, SIDE + 1, SIDE), bool)

    with pytest.raises(ValueError, match=r"scenes must be \(64, 64, 3\), .* got \(65, 64, 3\)"):
        train(CONFIG, SETTINGS, larger, tmp_path / "saved.npz")


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        Settings(steps=0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        dataclasses.replace(SETTINGS, seed=-1)
    assert Settings(mix=Mix(clicks=1)).mix.points == 2
