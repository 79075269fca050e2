"""Where the automatic mask generator looks: crops in layers, and a grid of points over each (NumPy).

Reference: `segment_anything.utils.amg` of Kirillov et al., Segment Anything, arXiv 2304.02643.
Differs: crops without a pixel, which images of a pixel's width lead to, are left out.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

from osprey_jax.sam.options import Options


class Crop(NamedTuple):
    """A part of an image that is searched as an image of its own."""

    box: tuple[int, int, int, int]
    """x0, y0, x1 and y1 in the image's pixels, x1 and y1 exclusive."""
    points: np.ndarray
    """`(P, 2)` float64, x and y in the crop's pixels."""


def crops(size: tuple[int, int], options: Options) -> list[Crop]:
    """The crops of an image of `size` `(h, w)`, the whole image first."""
    found = []
    for layer in range(options.crop_n_layers + 1):
        grid = point_grid(options.points_on_side(layer))
        for box in crop_boxes(size, layer=layer, overlap_ratio=options.crop_overlap_ratio):
            x0, y0, x1, y1 = box
            found.append(Crop(box, grid * (x1 - x0, y1 - y0)))
    return found


def crop_boxes(size: tuple[int, int], *, layer: int, overlap_ratio: float) -> list[tuple[int, int, int, int]]:
    """The boxes of one layer, column by column; layer 0 is the image itself."""
    height, width = size
    if layer == 0:
        return [(0, 0, width, height)]
    count = 2**layer
    overlap = int(overlap_ratio * min(size) * (2 / count))
    wide, high = (math.ceil((overlap * (count - 1) + side) / count) for side in (width, height))
    starts = [[(side - overlap) * number for number in range(count)] for side in (wide, high)]
    boxes = [(x0, y0, min(x0 + wide, width), min(y0 + high, height)) for x0, y0 in itertools.product(*starts)]
    return [box for box in boxes if box[0] < box[2] and box[1] < box[3]]


def point_grid(count: int) -> np.ndarray:
    """The centres of `count` × `count` cells, `(count², 2)` float64 x and y in [0, 1], row by row."""
    places = np.linspace(1 / (2 * count), 1 - 1 / (2 * count), count)
    x, y = np.meshgrid(places, places)
    return np.stack([x, y], axis=-1).reshape(-1, 2)
