"""Images to SAM's input, places to its pixels, and its masks back to the image's (NumPy and Pillow)."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from osprey_jax.masks import bilinear_taps

MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)
THRESHOLD = 0.0
"""Logits above it are inside a mask."""


class Frame(NamedTuple):
    """An image's size `(h, w)`, and the one that it has inside the encoder's input."""

    size: tuple[int, int]
    resized: tuple[int, int]


def frame(size: tuple[int, int], side: int) -> Frame:
    """The frame of an image whose longer side becomes `side`, the other one at least 1."""
    scale = side / max(size)
    return Frame(size, (max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))))


def preprocess(image: np.ndarray, *, side: int) -> np.ndarray:
    """Maps `(h, w, 3)` uint8 to the encoder's `(side, side, 3)` float32.

    Antialiased bilinear until the longer side is `side`, normalisation, zeros at the right or below.
    """
    rows, columns = frame((image.shape[0], image.shape[1]), side).resized
    resized = Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR)
    out = np.zeros((side, side, 3), np.float32)
    out[:rows, :columns] = (np.asarray(resized, np.float32) - MEAN) / STD
    return out


def to_input(places: np.ndarray, where: Frame) -> np.ndarray:
    """Maps `(…, 2)` x and y in the image's pixels to those of the encoder's input, float32."""
    scale = np.array(where.resized[::-1], np.float64) / where.size[::-1]
    return (np.asarray(places, np.float64) * scale).astype(np.float32)


def upscaling(where: Frame, *, mask_size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Two matrices, `(h, mask_size)` and `(w, mask_size)` float32, that bring logits to an image's size.

    `rows @ logits @ columns.T` is bilinear without antialiasing to the encoder's input, there cut to the
    image, and from that to the image's size, as in the original.
    """
    grow = bilinear_matrix(mask_size, side)
    rows, columns = (
        (bilinear_matrix(inside, outside) @ grow[:inside]).astype(np.float32)
        for inside, outside in zip(where.resized, where.size, strict=True)
    )
    return rows, columns


def bilinear_matrix(in_size: int, out_size: int) -> np.ndarray:
    """`masks.bilinear_taps` as a matrix `(out_size, in_size)`, float64."""
    lo, hi, weight = bilinear_taps(in_size, out_size)
    matrix = np.zeros((out_size, in_size))
    places = np.arange(out_size)
    np.add.at(matrix, (places, lo), 1 - weight.astype(np.float64))
    np.add.at(matrix, (places, hi), weight)
    return matrix
