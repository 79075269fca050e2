"""Image path: from a file to the tower's normalised input (NumPy and Pillow)."""

import io
import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from osprey_jax.masks import Taps, bilinear_taps, interpolate

ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
MAX_ASPECT = 100
"""The long edge in short ones, beyond which images are refused: `preprocess` makes the short one large."""
BLOCK = 64
"""Rows that are normalised and resized at a time."""


def load_image(image: ImageLike) -> np.ndarray:
    """Reads an image as `(h, w, 3)` uint8 RGB.

    Takes a path, a file's bytes, a Pillow image of any mode (16-bit grey is scaled to 8 bits) or an
    `(h, w, 3)` uint8 array. Several threads may read at the same time.
    EXIF orientation is not applied, as in the original: masks belong to the pixels as stored.

    Raises:
      FileNotFoundError: no such file.
      ValueError: an unreadable or truncated file, one of more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, or an
        array of another shape or dtype.
    """
    if isinstance(image, str | os.PathLike) and not os.path.exists(image):
        raise FileNotFoundError(f"no image at {os.fspath(image)}")
    if not isinstance(image, np.ndarray):
        name = "" if isinstance(image, bytes) else f" {getattr(image, 'filename', image)}"
        try:
            image = _read(image)
        except UnidentifiedImageError as error:
            raise ValueError(f"cannot read the image{name}: its format is none that is known") from error
        except Exception as error:  # Pillow's readers raise all kinds of exceptions on broken files
            raise ValueError(f"cannot read the image{name}: {error}") from error
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise ValueError(f"an image array must be (h, w, 3) uint8, got {array.shape} {array.dtype}")
    if max(array.shape[:2]) > MAX_ASPECT * min(array.shape[:2]):
        raise ValueError(f"an image of {array.shape[:2]} (height, width) is too long and narrow")
    return array


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width of an encoded image, read from its header; ValueError where it has none."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return opened.height, opened.width
    except Exception as error:  # as in `load_image`
        raise ValueError(f"cannot read the image: {error}") from error


def preprocess(image: np.ndarray, *, size: int) -> np.ndarray:
    """Maps `(h, w, 3)` uint8 to the tower's `(size, size, 3)` float32.

    Antialiased bicubic until the shortest edge is `size`, normalisation, then bilinear without
    antialiasing to a square: nothing is cropped or padded, the aspect ratio is not kept.
    """
    height, width = image.shape[:2]
    short, long = sorted((height, width))
    longer = int(size * long / short)
    target = (size, longer) if width <= height else (longer, size)
    resized = np.asarray(Image.fromarray(image).resize(target, Image.Resampling.BICUBIC))
    rows, columns = (bilinear_taps(edge, size) for edge in resized.shape[:2])
    colours = _of_colours(columns)
    mean, std = (np.tile(values, resized.shape[1]) for values in (MEAN, STD))

    out = np.empty((size, size, 3), np.float32)
    for start in range(0, size, BLOCK):  # so that all steps find their values in the cache
        lo, hi, weight = (tap[start : start + BLOCK] for tap in rows)
        first = lo[0]
        pixels = resized[first : hi[-1] + 1].reshape(-1, len(mean)).astype(np.float32)
        pixels *= np.float32(1 / 255)
        pixels -= mean
        pixels /= std
        # An edge that has its size already reads each pixel alone.
        if resized.shape[1] != size:
            pixels = interpolate(pixels, colours, axis=1)
        if resized.shape[0] != size:
            pixels = interpolate(pixels, (lo - first, hi - first, weight), axis=0)
        out[start : start + BLOCK] = pixels[: len(lo)].reshape(-1, size, 3)
    return out


def _of_colours(taps: Taps) -> Taps:
    """Taps of pixels made those of rows that are flat, three values a pixel."""
    lo, hi, weight = taps
    colours = np.arange(3)
    return (lo[:, None] * 3 + colours).ravel(), (hi[:, None] * 3 + colours).ravel(), np.repeat(weight, 3)


def _read(image: str | os.PathLike | bytes | Image.Image) -> np.ndarray:
    if isinstance(image, Image.Image):
        return _rgb(image)  # which decodes it, if it was only opened
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        return _rgb(opened)


def _rgb(image: Image.Image) -> np.ndarray:
    # Pillow only warns of up to twice as many; warnings can't be made errors in one thread alone.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise OSError(f"{image.width} x {image.height} are more than {Image.MAX_IMAGE_PIXELS:,} pixels")
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey when it converts; scaling keeps what the picture shows.
        grey = (np.clip(np.asarray(image), 0, 65535) / 257).round().astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))
