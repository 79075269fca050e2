"""Holes and islands, drawn, and against a flood fill."""

import numpy as np
import pytest

from osprey_jax.sam.small_regions import remove_small_regions
from tests.sam import everything_reference as reference


def drawn(rows: str) -> np.ndarray:
    return np.array([[pixel == "#" for pixel in row] for row in rows.split()])


@pytest.mark.parametrize(
    ("mask", "area", "expected"),
    [
        (drawn("##### #.#.# ##### ..... ....."), 2, drawn("##### ##### ##### ..... .....")),
        (drawn("##... ##... ..... ....# ....."), 2, drawn("##... ##... ..... ..... .....")),
        # What touches at a corner is one.
        (drawn("##... ##... ..#.. ..... ....."), 2, drawn("##... ##... ..#.. ..... .....")),
        # Of islands that are all too small the first of the largest stays.
        (drawn("#.... ...## ..... ##... ....."), 4, drawn("..... ...## ..... ..... .....")),
        # A corner outside that the mask cuts off is a hole as well.
        (drawn(".#... ##... ..... ..... ....."), 2, drawn("##... ##... ..... ..... .....")),
        # Holes first: an island that is large enough once its hole is filled stays.
        (drawn("..... .###. .#.#. .###. ....."), 9, drawn("..... .###. .###. .###. .....")),
    ],
)  # fmt: skip
def test_small_holes_are_filled_and_small_islands_go(
    mask: np.ndarray, area: int, expected: np.ndarray
) -> None:
    cleared, changed = remove_small_regions(mask, area=area)
    np.testing.assert_array_equal(cleared, expected)
    assert changed == (mask != expected).any()


@pytest.mark.parametrize("full", [False, True])
def test_a_mask_of_one_piece_stays_as_it_is(full: bool) -> None:
    mask = np.full((4, 6), full)
    cleared, changed = remove_small_regions(mask, area=10)
    assert not changed
    np.testing.assert_array_equal(cleared, mask)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("area", [1, 4, 9, 40, 1000])
def test_noise_is_cleared_as_by_flood_fill(density: float, area: int) -> None:
    mask = np.random.default_rng(3).random((23, 31)) < density
    expected, holes = reference.remove_small_regions(mask, area, "holes")
    expected, islands = reference.remove_small_regions(expected, area, "islands")
    cleared, changed = remove_small_regions(mask, area=area)
    np.testing.assert_array_equal(cleared, expected)
    assert changed == (holes or islands)
