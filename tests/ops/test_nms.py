"""Non-maximum suppression against loops."""

import numpy as np
import pytest

from osprey_jax.ops.nms import nms
from tests.sam import everything_reference as reference


@pytest.mark.parametrize("count", [1, 2, 63, 200])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 0.7, 1.0])
def test_what_stays_and_in_which_order_is_as_by_loops(count: int, threshold: float) -> None:
    rng = np.random.default_rng(count)
    corners = rng.integers(0, 12, (count, 2))
    # On a coarse grid, so that equal scores, equal boxes and IoUs at the threshold are common.
    boxes = np.concatenate([corners, corners + rng.integers(0, 11, (count, 2))], axis=1).astype(np.float32)
    scores = rng.integers(0, 10, count).astype(np.float32) / 10
    expected = reference.nms(boxes.tolist(), scores.tolist(), threshold)
    np.testing.assert_array_equal(nms(boxes, scores, threshold=threshold), expected)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
def test_an_iou_at_the_threshold_is_compared_as_a_float32_with_a_float64(threshold: float) -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, round(10 * threshold)]], np.float32)
    kept = nms(boxes, np.array([1, 0], np.float32), threshold=threshold)
    assert len(kept) == (1 if float(np.float32(threshold)) > threshold else 2)


def test_equal_scores_keep_their_order() -> None:
    boxes = np.array([[9, 9, 10, 10], [0, 0, 1, 1], [5, 5, 6, 6]], np.float32)
    np.testing.assert_array_equal(nms(boxes, np.zeros(3, np.float32), threshold=0.5), [0, 1, 2])


def test_boxes_without_an_area_suppress_nothing() -> None:
    boxes = np.zeros((3, 4), np.float32)
    np.testing.assert_array_equal(nms(boxes, np.arange(3, dtype=np.float32), threshold=0.0), [2, 1, 0])


def test_of_no_boxes_none_stay() -> None:
    assert nms(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), threshold=0.5).shape == (0,)
