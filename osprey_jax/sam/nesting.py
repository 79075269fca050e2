"""Which masks are parts of which: the granularities that Segment Anything finds, as a forest."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

INSIDE = 0.9
"""What a whole contains at least of its part's pixels."""
LARGER = 1.25
"""How many times larger than its part a whole is at least, so that doubles aren't parts of each other."""


def part_of(rles: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """For each mask, the index of the smallest one that it is a part of, or None.

    Of wholes of equal size, the one with the lower index. As a whole is always the larger, no mask is a part
    of itself by way of others. Empty masks are neither.

    Args:
      rles: compressed RLEs of one size, as `masks.encode_rle` gives them.
    """
    if not rles:
        return []
    encoded = list(rles)
    areas = coco_mask.area(encoded).astype(np.float64)
    # With crowds, COCO's IoU is the intersection as a part of the first mask; no mask is held decoded.
    contained = np.asarray(coco_mask.iou(encoded, encoded, [1] * len(encoded)))
    whole = (contained >= INSIDE) & (areas >= LARGER * areas[:, None]) & (areas[:, None] > 0)
    smallest = np.where(whole, areas, np.inf).argmin(axis=1)
    return [int(index) if whole[row, index] else None for row, index in enumerate(smallest)]
