"""How the things of a scene are drawn: outlines, textures, backgrounds.

Edges are hard and only additions, multiplications and divisions of float64 decide them, so that every machine
draws the same pixels.
"""

import functools
from collections.abc import Callable

import numpy as np

COLOURS = {
    "red": (222, 36, 36),
    "yellow": (250, 226, 44),
    "green": (36, 168, 56),
    "cyan": (44, 214, 226),
    "blue": (48, 84, 232),
    "purple": (146, 46, 196),
    "pink": (252, 136, 200),
    "white": (244, 244, 244),
}
TEXTURES = ("plain", "striped", "dotted")
PARTS = ("hat", "core")

_INK = 24
"""What the lines around objects and parts are drawn in: all channels."""
_JITTER = 10
"""Greatest difference of an object's colour from the table's, per channel."""
_SHADE = 0.32
"""What the dark half of a texture keeps of the colour."""

SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "square": lambda u, v: (abs(u) <= 1) & (abs(v) <= 1),
    "triangle": lambda u, v: 2 * abs(u) <= v + 1,
    "ring": lambda u, v: (u * u + v * v <= 1) & (u * u + v * v >= 0.12),
    "bar": lambda u, v: (abs(u) <= 1) & (abs(v) <= 0.5),
    "pillar": lambda u, v: (abs(u) <= 0.5) & (abs(v) <= 1),
}
"""Whether points with u and v from -1 to 1 are in the shape; `v` points down."""

_CORE_CENTRE = {"triangle": 0.38}
_HAT_BRIM = {"triangle": -0.55, "bar": -0.35}
"""How low a hat is put on, in the shape's coordinates; where nothing is said, at -0.85."""


@functools.lru_cache(maxsize=1024)
def outline(shape: str, part: str | None, diameter: int) -> np.ndarray:
    """The smallest box around an object: 1 at its body, 2 at its part, -1 at a hole in it, else 0."""
    radius = diameter / 2
    brim = _HAT_BRIM.get(shape, -0.85)
    rise = max(0, round(radius * (-1 - (brim - 0.6)))) if part == "hat" else 0
    u = ((np.arange(diameter) + 0.5) / radius - 1)[None, :]
    v = ((np.arange(-rise, diameter) + 0.5) / radius - 1)[:, None]
    pixels = (SHAPES[shape](u, v) & (v >= -1)).astype(np.int64)
    if part == "hat":
        crown = (abs(u) <= 0.34) & (v >= brim - 0.6) & (v <= brim)
        pixels[crown | ((abs(u) <= 0.56) & (v >= brim - 0.18) & (v <= brim))] = 2
    elif part == "core":
        v = v - _CORE_CENTRE.get(shape, 0.0)
        pixels[u * u + v * v <= 0.115] = 2
    pixels[_enclosed(pixels > 0)] = -1
    rows, columns = (np.flatnonzero(pixels.any(axis=axis)) for axis in (1, 0))
    pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    pixels.setflags(write=False)  # the cache hands it out again
    return pixels


@functools.lru_cache(maxsize=1024)
def lines(shape: str, part: str | None, diameter: int, width: int) -> np.ndarray:
    """Which pixels of an `outline` are within `width` steps of something that isn't the same body or part."""
    inner = pixels = outline(shape, part, diameter)
    for _ in range(width):
        around = np.pad(inner, 1)
        sides = around[2:, 1:-1], around[:-2, 1:-1], around[1:-1, 2:], around[1:-1, :-2]
        inner = inner * np.all([inner == side for side in sides], axis=0)
    found = (pixels > 0) & (inner == 0)
    found.setflags(write=False)
    return found


def _enclosed(solid: np.ndarray) -> np.ndarray:
    """Pixels that are not solid but have solid ones to the left, to the right, above and below."""
    hole = ~solid
    for side in (solid, solid[::-1, ::-1]):
        for axis in (0, 1):
            passed = np.logical_or.accumulate(side, axis=axis)
            hole &= passed if side is solid else passed[::-1, ::-1]
    return hole


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """uint8 (size, size, 3): a muted colour, a gradient between two of them, or one with noise."""
    first, second = (rng.integers(92, 148, (2, 1)) + rng.integers(-14, 15, (2, 3))).astype(np.int16)
    kind = rng.integers(3)
    if kind == 0:
        image = np.broadcast_to(first, (size, size, 3))
    elif kind == 1:
        across, down = rng.integers(1, 5, 2)
        steps = np.arange(size)
        steps = across * steps + down * steps[:: -1 if rng.random() < 0.5 else 1, None]
        image = first + (second - first) * steps[:, :, None] // steps.max()
    else:
        image = first + rng.integers(-16, 17, (size, size, 1), np.int16)
    return image.astype(np.uint8)


def paint(
    rng: np.random.Generator,
    image: np.ndarray,
    *,
    mask: np.ndarray,
    ink: np.ndarray,
    colour: str,
    texture: str,
    unit: float,
) -> None:
    """Colours the pixels of a bool (h, w) mask of a uint8 (h, w, 3) image, in place.

    Those of them that are in `ink`, too, belong to lines, which are dark whatever the colour.
    `unit` is the length in pixels that stands for one pixel of a scene of 96.
    """
    light = np.clip(np.array(COLOURS[colour]) + rng.integers(-_JITTER, _JITTER + 1, 3), 0, 255)
    shades = np.stack([light, light * _SHADE, np.full(3, _INK)]).astype(np.uint8)
    dark = _pattern(rng, texture, mask.shape, unit)
    np.copyto(image, shades[np.where(ink, 2, dark)], where=mask[:, :, None])


def _pattern(rng: np.random.Generator, texture: str, shape: tuple[int, ...], unit: float) -> np.ndarray:
    """Which pixels of a box a texture darkens."""
    if texture == "plain":
        return np.zeros(shape, bool)
    half = max(2, round(3 * unit))
    y = np.arange(shape[0])[:, None] + rng.integers(4 * half)
    x = np.arange(shape[1])[None, :] + rng.integers(4 * half)
    if texture == "dotted":
        return (y % (2 * half) < half) & (x % (2 * half) < half)
    slope = rng.integers(4)
    across = (x + 0 * y, y + 0 * x, x + y, x - y)[slope]
    # What is counted along a row is longer than the distance across slanted stripes.
    return across // (half if slope < 2 else max(3, round(4 * unit))) % 2 == 0
