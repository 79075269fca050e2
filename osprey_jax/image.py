"""Image path: from a file to the tower's normalised input (NumPy and Pillow)."""

import os
import warnings

import numpy as np
from PIL import Image

from osprey_jax.masks import resize_square

ImageLike = str | os.PathLike | Image.Image | np.ndarray

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def load_image(image: ImageLike) -> np.ndarray:
    """Reads an image as `(h, w, 3)` uint8 RGB.

    Takes a path, a Pillow image of any mode (16-bit grey is scaled to 8 bits) or an `(h, w, 3)` uint8 array.
    EXIF orientation is not applied, as in the original: masks belong to the pixels as stored.

    Raises:
      FileNotFoundError: no such file.
      ValueError: an unreadable or truncated file, or an array of another shape or dtype.
    """
    if isinstance(image, str | os.PathLike) and not os.path.exists(image):
        raise FileNotFoundError(f"no image at {os.fspath(image)}")
    if isinstance(image, str | os.PathLike | Image.Image):
        try:
            image = _read(image)
        except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"cannot read the image {getattr(image, 'filename', image)}: {error}") from error
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise ValueError(f"an image array must be (h, w, 3) uint8, got {array.shape} {array.dtype}")
    return array


def preprocess(image: np.ndarray, *, size: int) -> np.ndarray:
    """Maps `(h, w, 3)` uint8 to the tower's `(size, size, 3)` float32.

    Antialiased bicubic until the shortest edge is `size`, normalisation, then bilinear without
    antialiasing to a square: nothing is cropped or padded, the aspect ratio is not kept.
    """
    height, width = image.shape[:2]
    short, long = sorted((height, width))
    longer = int(size * long / short)
    target = (size, longer) if width <= height else (longer, size)
    resized = Image.fromarray(image).resize(target, Image.Resampling.BICUBIC)
    pixels = (np.asarray(resized).astype(np.float32) * np.float32(1 / 255) - MEAN) / STD
    return resize_square(pixels, size, rows=0)


def _read(image: str | os.PathLike | Image.Image) -> np.ndarray:
    if isinstance(image, Image.Image):
        return _rgb(image)  # which decodes it, if it was only opened
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(image) as opened:
            return _rgb(opened)


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey when it converts; scaling keeps what the picture shows.
        grey = (np.clip(np.asarray(image), 0, 65535) / 257).round().astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))
