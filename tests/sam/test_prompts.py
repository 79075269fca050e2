"""Prompts drawn for training: each lies where its region is, and says what it may mean."""

import numpy as np
import pytest

from osprey_jax.sam.prompt_encoder import BACKGROUND, BOTTOM_RIGHT, FOREGROUND, PADDING, TOP_LEFT
from osprey_jax.sam.prompts import JITTER, Examples, Mix, box_of, draw, pixel_of
from tests.sam.scenes import SIDE, scene

MIX = Mix(clicks=5, elsewhere=2, boxes=4, pairs=3)
SCENES = 30


@pytest.fixture(scope="module")
def examples() -> Examples:
    scenes = [scene(number) for number in range(SCENES)]
    return draw(scenes, np.random.default_rng(0), mix=MIX, max_regions=7)


def inside(examples: Examples, places: np.ndarray) -> np.ndarray:
    """The regions `(B, N, R)` that places `(B, N, 2)` lie in."""
    x, y = places.astype(int).transpose(2, 0, 1)
    return np.stack([regions[:, b, a].T for regions, a, b in zip(examples.regions, x, y, strict=True)])


def test_regions_are_the_scenes_and_the_last_is_what_none_covers(examples: Examples) -> None:
    for number, regions in enumerate(examples.regions):
        masks = scene(number)[1]
        np.testing.assert_array_equal(regions[: len(masks)], masks)
        assert not regions[len(masks) : -1].any()
        np.testing.assert_array_equal(regions[-1], ~masks.any(axis=0))


def test_clicks_mean_all_regions_that_they_lie_in(examples: Examples) -> None:
    clicks = examples.places[:, : MIX.points, 0]
    np.testing.assert_array_equal(examples.meant[:, : MIX.points], inside(examples, clicks))
    assert (examples.kinds[:, : MIX.points] == [FOREGROUND, PADDING]).all()
    ambiguous = examples.meant[:, : MIX.points].sum(-1) > 1
    assert 0 < ambiguous.sum() < 0.5 * ambiguous.size  # on parts


def test_clicks_elsewhere_lie_in_no_region(examples: Examples) -> None:
    last = examples.regions.shape[1] - 1
    assert (examples.chosen[:, MIX.clicks : MIX.points] == last).all()
    assert (examples.meant[:, MIX.clicks : MIX.points].argmax(-1) == last).all()


def test_what_is_chosen_may_be_meant(examples: Examples) -> None:
    assert np.take_along_axis(examples.meant, examples.chosen[..., None], -1).all()


def test_boxes_are_around_their_regions_but_for_some_pixels(examples: Examples) -> None:
    boxes = examples.places[:, MIX.points :].reshape(SCENES, MIX.boxes, 4)
    assert (examples.kinds[:, MIX.points :] == [TOP_LEFT, BOTTOM_RIGHT]).all()
    chosen = examples.chosen[:, MIX.points : MIX.points + MIX.boxes]
    exact = np.array(
        [
            [box_of(regions[one]) for one in some]
            for regions, some in zip(examples.regions, chosen, strict=True)
        ]
    )
    off = abs(boxes - exact).max(axis=-1)
    assert off.max() <= JITTER
    assert 0.1 < (off == 0).mean() < 0.4


def test_pairs_begin_in_their_region_and_tell_where_the_other_point_is(examples: Examples) -> None:
    chosen = examples.chosen[:, -MIX.pairs :, None]
    first, second = (
        np.take_along_axis(inside(examples, examples.pair_places[:, :, n]), chosen, -1)[..., 0]
        for n in (0, 1)
    )
    assert first.all()
    np.testing.assert_array_equal(examples.pair_kinds[..., 1], np.where(second, FOREGROUND, BACKGROUND))
    assert (examples.pair_kinds[..., 2] == PADDING).all()
    assert 0 < second.sum() < second.size


def test_every_region_gets_a_prompt_where_there_are_enough(examples: Examples) -> None:
    for number, chosen in enumerate(examples.chosen[:, : MIX.clicks]):
        count = len(scene(number)[1])
        assert len(set(chosen.tolist())) == min(count, MIX.clicks)


def test_the_same_generator_draws_the_same() -> None:
    first, second = (draw([scene(0)], np.random.default_rng(3), mix=Mix(), max_regions=7) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_box_includes_its_last_pixels() -> None:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[3, 5:9] = True
    np.testing.assert_array_equal(box_of(mask), [5, 3, 9, 4])
    assert pixel_of(mask, np.random.default_rng(0))[1] == 3


def test_scenes_that_cannot_be_asked_about_are_refused() -> None:
    image, masks = scene(0)
    rng = np.random.default_rng(0)
    for bad, message in (
        (masks[:0], "1 to 7 regions, got 0"),
        (np.repeat(masks, 8, axis=0), "1 to 7 regions, got"),
        (masks[:, 1:], "don't fit an image"),
        (masks & False, "empty mask"),
        (masks | True, "empty mask"),
    ):
        with pytest.raises(ValueError, match=message):
            draw([(image, bad)], rng, mix=Mix(), max_regions=7)
    with pytest.raises(ValueError, match="clicks must be positive, got 0"):
        Mix(clicks=0)
