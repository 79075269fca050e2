"""Crops and grids of points by numbers from the original's formulas."""

import numpy as np
import pytest

from osprey_jax.sam.crops import crop_boxes, crops, point_grid
from osprey_jax.sam.options import Options
from tests.sam import everything_reference as reference

RATIO = 512 / 1500


def test_a_grid_has_the_centres_of_cells_row_by_row() -> None:
    expected = [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    np.testing.assert_array_equal(point_grid(2), expected)
    np.testing.assert_array_equal(point_grid(1), [[0.5, 0.5]])


def test_crops_of_a_known_image() -> None:
    assert crop_boxes((480, 640), layer=0, overlap_ratio=RATIO) == [(0, 0, 640, 480)]
    # Overlapping by int(480 × 512 / 1500) = 163 pixels, (163 + 640) / 2 wide, rounded up, and so on.
    expected = [(0, 0, 402, 322), (0, 159, 402, 480), (239, 0, 640, 322), (239, 159, 640, 480)]
    assert crop_boxes((480, 640), layer=1, overlap_ratio=RATIO) == expected


@pytest.mark.parametrize("size", [(480, 640), (96, 97), (1000, 31), (7, 5)])
@pytest.mark.parametrize("ratio", [0.0, RATIO, 0.9])
def test_crops_are_those_of_the_plain_formula(size: tuple[int, int], ratio: float) -> None:
    boxes, layers = reference.generate_crop_boxes(*size, 3, ratio)
    for layer in range(4):
        expected = [tuple(box) for box, of in zip(boxes, layers, strict=True) if of == layer]
        expected = [box for box in expected if box[0] < box[2] and box[1] < box[3]]
        assert crop_boxes(size, layer=layer, overlap_ratio=ratio) == expected


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (50, 64)])
def test_every_pixel_is_in_a_crop_and_no_crop_is_empty(size: tuple[int, int]) -> None:
    for layer in range(4):
        covered = np.zeros(size, bool)
        for x0, y0, x1, y1 in crop_boxes(size, layer=layer, overlap_ratio=RATIO):
            assert 0 <= x0 < x1 <= size[1]
            assert 0 <= y0 < y1 <= size[0]
            covered[y0:y1, x0:x1] = True
        assert covered.all()


def test_deeper_layers_have_fewer_points() -> None:
    options = Options(points_per_side=9, crop_n_layers=2, crop_n_points_downscale_factor=2)
    found = crops((60, 90), options)
    assert [len(crop.points) for crop in found] == [81] + 4 * [16] + 16 * [4]
    x0, y0, x1, y1 = found[1].box
    np.testing.assert_allclose(found[1].points[0], [(x1 - x0) / 8, (y1 - y0) / 8])
