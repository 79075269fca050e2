"""Prompts in the form of the prompt encoder, and those that are refused."""

import numpy as np
import pytest

from osprey_jax.sam.prompt_places import encode_prompts
from osprey_jax.sam.transforms import frame

WHERE = frame((50, 100), 1024)
"""An image of 100 by 50 pixels, of which each becomes 10.24."""
NONE = {"points": None, "labels": None, "boxes": None, "masks": None}


def encoded(**given: object) -> tuple:
    return encode_prompts(WHERE, **{**NONE, **given}, mask_size=4)


def test_points_are_followed_by_one_place_that_is_none() -> None:
    places, kinds, masks = encoded(points=[[[10, 20], [0, 50]]], labels=[[1, 0]])
    np.testing.assert_allclose(places, [[[102.4, 204.8], [0, 512], [0, 0]]], rtol=1e-6)
    np.testing.assert_array_equal(kinds, [[1, 0, -1]])
    assert masks is None


def test_points_without_labels_are_inside() -> None:
    np.testing.assert_array_equal(encoded(points=[[[10, 20]], [[1, 2]]])[1], [[1, -1], [1, -1]])


def test_boxes_are_two_corners_and_points_beside_them_have_no_padding() -> None:
    places, kinds, _ = encoded(boxes=[[0, 10, 100, 50]])
    np.testing.assert_allclose(places, [[[0, 102.4], [1024, 512]]], rtol=1e-6)
    np.testing.assert_array_equal(kinds, [[2, 3]])
    places, kinds, _ = encoded(points=[[[10, 20]]], boxes=[[0, 10, 100, 50]])
    np.testing.assert_allclose(places, [[[102.4, 204.8], [0, 102.4], [1024, 512]]], rtol=1e-6)
    np.testing.assert_array_equal(kinds, [[1, 2, 3]])


def test_masks_alone_have_no_places() -> None:
    places, kinds, masks = encoded(masks=np.ones((3, 4, 4)))
    assert (places.shape, kinds.shape, masks.shape) == ((3, 0, 2), (3, 0), (3, 4, 4))
    assert masks.dtype == np.float32


def test_a_padding_points_place_does_not_matter() -> None:
    places, kinds, _ = encoded(points=[[[10, 20], [-7, 900]]], labels=[[1, -1]])
    np.testing.assert_allclose(places, [[[102.4, 204.8], [0, 0], [0, 0]]], rtol=1e-6)
    np.testing.assert_array_equal(kinds, [[1, -1, -1]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give points, boxes or masks"),
        ({"labels": [[1]]}, "give points, boxes or masks"),
        ({"boxes": [[1, 2, 3, 4]], "labels": [[1]]}, "labels are those of points"),
        ({"points": [[3, 4]]}, r"points must be \(N, P, 2\).*got \(1, 2\)"),
        ({"points": np.zeros((2, 0, 2))}, r"points must be \(N, P, 2\).*got \(2, 0, 2\)"),
        ({"points": 3}, "points must have an axis of prompts, got 3"),
        ({"points": [[["a", 4]]]}, "points must be numbers"),
        ({"points": [[[1, 2]], [[1, 2], [3, 4]]]}, "points must be numbers, as many for each prompt"),
        ({"points": [[[np.nan, 4]]]}, "points must be finite"),
        ({"points": np.zeros((0, 1, 2))}, "at least one prompt, got 0 points"),
        ({"points": [[[1, 2]], [[100.5, 4]]]}, "point 1: x, y = 100.5, 4 lies outside.*100 wide and 50 high"),
        ({"points": [[[1, -1]]]}, "point 0: x, y = 1, -1 lies outside"),
        ({"points": [[[1, 2]]], "labels": [[2]]}, r"labels must be 1 \(inside\)"),
        ({"points": [[[1, 2]]], "labels": [1]}, r"labels must be \(1, 1\)"),
        ({"points": [[[1, 2]]], "boxes": [[1, 2, 3, 4]] * 2}, "got 1 points and 2 boxes"),
        ({"boxes": [1, 2, 3, 4]}, r"boxes must be \(N, 4\)"),
        ({"boxes": [[1, 2, 3, 4], [5, 6, 5, 9]]}, "box 1 is empty: x0, y0, x1, y1 = 5, 6, 5, 9"),
        ({"boxes": [[9, 2, 3, 4]]}, "box 0 is empty"),
        ({"boxes": [[1, 2, 30, 51]]}, "box 0:.*goes beyond the image"),
        ({"masks": np.zeros((1, 5, 4))}, r"masks must be \(N, 4, 4\).*got \(1, 5, 4\)"),
        ({"masks": np.full((1, 4, 4), np.inf)}, "masks must be finite"),
    ],
)  # fmt: skip
def test_wrong_prompts_are_refused_with_what_is_wrong(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoded(**given)
