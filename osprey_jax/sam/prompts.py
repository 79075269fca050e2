"""Prompts for training and evaluation, drawn from masks that are known (NumPy)."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from osprey_jax.sam.prompt_encoder import BACKGROUND, BOTTOM_RIGHT, FOREGROUND, PADDING, TOP_LEFT
from osprey_jax.typing import Bool, Float, Int, UInt8

JITTER = 2.0
"""Pixels by which the sides of most drawn boxes are off, at most: users don't draw them exactly either."""
_EXACT = 0.25
"""Share of boxes that aren't off."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """How many prompts of each kind an image gets; in a batch they stand in this order."""

    clicks: int = 5
    """One point inside a region."""
    elsewhere: int = 1
    """One point outside of all regions."""
    boxes: int = 3
    pairs: int = 1
    """Two points: one in a region, and another one in it or, as background, outside."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be positive, got {getattr(self, field.name)}")

    @property
    def points(self) -> int:
        """Prompts of one point."""
        return self.clicks + self.elsewhere


class Examples(NamedTuple):
    """Images, their regions and prompts about them: `P` of two places, and `Q` pairs of points of three.

    What regions a prompt may mean is in two parts as well, those of the first `P` before those of the pairs.
    """

    images: UInt8[np.ndarray, "B h w 3"]
    regions: Bool[np.ndarray, "B R h w"]
    """The image's, then empty ones; the last one is what none of them covers."""
    places: Float[np.ndarray, "B P 2 2"]
    """x and y in pixels."""
    kinds: Int[np.ndarray, "B P 2"]
    """See `prompt_encoder.PADDING` and the others."""
    pair_places: Float[np.ndarray, "B Q 3 2"]
    pair_kinds: Int[np.ndarray, "B Q 3"]
    meant: Bool[np.ndarray, "B P+Q R"]
    """What a prompt may mean: for a single point, each region that it lies in."""
    chosen: Int[np.ndarray, "B P+Q"]
    """The one of these that the prompt was drawn for."""


class _Prompt(NamedTuple):
    places: np.ndarray
    kinds: list[int]
    meant: np.ndarray
    chosen: int


def pixel_of(mask: Bool[np.ndarray, "h w"], rng: np.random.Generator) -> Float[np.ndarray, "2"]:
    """x and y of a random pixel of a mask. Raises ValueError where it is empty."""
    places = np.flatnonzero(mask)
    if not len(places):
        raise ValueError("no pixel can be drawn from an empty mask")
    row, column = divmod(int(places[rng.integers(len(places))]), mask.shape[1])
    return np.array([column, row], np.float32)


def box_of(mask: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "4"]:
    """x0, y0, x1 and y1 around a mask, the last two exclusive. Raises ValueError where it is empty."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        raise ValueError("there is no box around an empty mask")
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def draw(
    scenes: Sequence[tuple[np.ndarray, np.ndarray]],
    rng: np.random.Generator,
    *,
    mix: Mix,
    max_regions: int,
) -> Examples:
    """Draws prompts about scenes, each an image `(h, w, 3)` uint8 and its masks `(regions, h, w)` bool.

    Regions take turns, in an order of their own for each image. Raises ValueError where a scene has no
    region, an empty one or more than `max_regions`, or where they leave nothing uncovered.
    """
    drawn = [_draw(image, masks, rng, mix, max_regions) for image, masks in scenes]
    return Examples(*(np.stack(part) for part in zip(*drawn, strict=True)))


def _draw(
    image: np.ndarray, masks: np.ndarray, rng: np.random.Generator, mix: Mix, max_regions: int
) -> Examples:
    """What `draw` does for one scene, without the axis of images."""
    count = len(masks)
    if masks.shape[1:] != image.shape[:2]:
        raise ValueError(f"masks {masks.shape} don't fit an image {image.shape}")
    if not 0 < count <= max_regions:
        raise ValueError(f"a scene must have 1 to {max_regions} regions, got {count}")
    regions = np.zeros((max_regions + 1, *image.shape[:2]), bool)
    regions[:count], regions[-1] = masks, ~masks.any(axis=0)
    alone = np.eye(max_regions + 1, dtype=bool)

    def turns(times: int) -> list[int]:
        return [int(region) for region in np.resize(rng.permutation(count), times)]

    def click(region: int) -> _Prompt:
        place = pixel_of(regions[region], rng)
        x, y = place.astype(int)
        return _Prompt(np.stack([place, np.zeros(2)]), [FOREGROUND, PADDING], regions[:, y, x], region)

    def box(region: int) -> _Prompt:
        corners = box_of(regions[region])
        if rng.random() >= _EXACT:
            corners = corners + rng.uniform(-JITTER, JITTER, 4)
        return _Prompt(corners.reshape(2, 2), [TOP_LEFT, BOTTOM_RIGHT], alone[region], region)

    def pair(region: int) -> _Prompt:
        inside = bool(rng.random() < 0.5)
        second = pixel_of(regions[region] if inside else ~regions[region], rng)
        places = np.stack([pixel_of(regions[region], rng), second, np.zeros(2)])
        kinds = [FOREGROUND, FOREGROUND if inside else BACKGROUND, PADDING]
        return _Prompt(places, kinds, alone[region], region)

    short = [click(region) for region in turns(mix.clicks)]
    short += [click(max_regions) for _ in range(mix.elsewhere)]
    short += [box(region) for region in turns(mix.boxes)]
    pairs = [pair(region) for region in turns(mix.pairs)]
    return Examples(
        images=image,
        regions=regions,
        places=np.stack([prompt.places for prompt in short]).astype(np.float32),
        kinds=np.array([prompt.kinds for prompt in short], np.int32),
        pair_places=np.stack([prompt.places for prompt in pairs]).astype(np.float32),
        pair_kinds=np.array([prompt.kinds for prompt in pairs], np.int32),
        meant=np.stack([prompt.meant for prompt in short + pairs]),
        chosen=np.array([prompt.chosen for prompt in short + pairs], np.int32),
    )
