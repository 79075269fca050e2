"""Removes small holes in masks and small islands beside them (SciPy).

Reference: `remove_small_regions` of the original Segment Anything, there with OpenCV.
"""

import numpy as np
from scipy import ndimage

CONNECTED = np.ones((3, 3), bool)
"""Pixels that touch at a corner are connected."""


def remove_small_regions(mask: np.ndarray, *, area: int) -> tuple[np.ndarray, bool]:
    """Fills holes of an `(h, w)` bool mask, then drops islands, of fewer than `area` pixels.

    Where all islands are so small, the largest stays, the first of equals in reading order. What surrounds a
    mask counts as a hole too, if it is small.

    Returns: the mask, and whether anything changed.
    """
    filled, with_holes = _fill_holes(mask, area)
    cleared, with_islands = _drop_islands(filled, area)
    return cleared, with_holes or with_islands


def _fill_holes(mask: np.ndarray, area: int) -> tuple[np.ndarray, bool]:
    labels, sizes = _components(~mask)
    small = sizes < area
    if not small.any():
        return mask, False
    return np.append(True, small)[labels], True


def _drop_islands(mask: np.ndarray, area: int) -> tuple[np.ndarray, bool]:
    labels, sizes = _components(mask)
    large = sizes >= area
    if large.all():
        return mask, False
    if not large.any():
        large[sizes.argmax()] = True
    return np.append(False, large)[labels], True


def _components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels `(h, w)`, 0 outside of the mask, and the sizes of components from 1 on."""
    labels, count = ndimage.label(mask, structure=CONNECTED)
    return labels, np.bincount(labels.ravel(), minlength=count + 1)[1:]
