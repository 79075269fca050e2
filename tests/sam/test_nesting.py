"""Parts and wholes."""

import numpy as np

from osprey_jax.masks import encode_rle
from osprey_jax.sam.nesting import part_of


def boxes(*corners: tuple[int, int, int, int]) -> list[dict]:
    rles = []
    for x0, y0, x1, y1 in corners:
        mask = np.zeros((50, 60), bool)
        mask[y0:y1, x0:x1] = True
        rles.append(encode_rle(mask))
    return rles


def test_a_mask_is_part_of_the_smallest_that_contains_it() -> None:
    car, wheel, hub, tree = (0, 0, 40, 40), (5, 5, 15, 15), (8, 8, 11, 11), (45, 0, 55, 50)
    assert part_of(boxes(hub, car, tree, wheel)) == [3, None, None, 1]


def test_nine_tenths_inside_are_enough() -> None:
    whole = (0, 0, 30, 40)
    assert part_of(boxes(whole, (21, 0, 31, 10), (20, 20, 32, 30))) == [None, 0, None]


def test_doubles_are_not_parts_of_each_other() -> None:
    # 100, 120 and 125 pixels: the last is 1.25 times the first.
    assert part_of(boxes((0, 0, 10, 10), (0, 0, 12, 10), (0, 0, 10, 10))) == [None, None, None]
    assert part_of([*boxes((0, 0, 10, 10)), *boxes((0, 0, 25, 5))]) == [None, None]
    assert part_of(boxes((0, 0, 20, 5), (0, 0, 25, 5))) == [1, None]


def test_of_wholes_of_equal_size_the_first_counts() -> None:
    assert part_of(boxes((2, 2, 4, 4), (0, 0, 10, 10), (1, 1, 11, 11))) == [1, None, None]


def test_empty_masks_are_neither_parts_nor_wholes() -> None:
    assert part_of(boxes((0, 0, 0, 0), (0, 0, 10, 10), (3, 3, 3, 3))) == [None, None, None]
    assert part_of([]) == []


def test_nothing_is_part_of_itself_by_way_of_others() -> None:
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 30, (200, 2))
    sizes = rng.integers(1, 30, (200, 2))
    wholes = part_of(boxes(*np.concatenate([corners, corners + sizes], axis=1).tolist()))
    assert sum(whole is not None for whole in wholes) > 50
    for start in range(200):
        seen, place = set(), start
        while place is not None:
            assert place not in seen
            seen.add(place)
            place = wholes[place]
