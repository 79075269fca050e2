"""Scenes: a few objects with shape, colour, texture, size and parts, and the exact mask of each.

A scene follows from its random generator alone.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from data_pipelines.shapes.drawing import (
    COLOURS,
    PARTS,
    SHAPES,
    TEXTURES,
    background,
    lines,
    outline,
    paint,
)

SIZES = {"small": (24, 28), "large": (36, 42)}
"""Diameter of an object without its part: least and greatest pixels in a scene of 96."""

_MAX_PARTS = 2
_PART_CHANCE = 0.15
"""Of a large object to have a part."""
_LINE = 2
"""Width of the line around objects and parts, in pixels of a scene of 96."""
_REFERENCE = 96
"""Side in pixels of the scenes that lengths are meant for; others scale them."""
_MIN_VISIBLE = 0.8
"""Share of each object and part that nearer objects leave visible."""
_MIN_OVERLAP = 16
"""Objects overlap by this many pixels of a scene of 96 or not at all: which one is in front can be seen."""


@dataclasses.dataclass(frozen=True)
class Region:
    """What is true of one region of a scene: of an object, or of a part of one."""

    name: str
    """One of `SHAPES`, for a part one of `PARTS`."""
    colour: str
    texture: str
    """Parts are plain."""
    size: str | None
    """None for a part."""
    whole: int | None = None
    """Index of the region that a part belongs to; None for an object."""


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """A picture, its regions and their masks.

    Masks hold the visible pixels only. An object's mask contains its part's, as in annotations of parts;
    the masks of two objects are disjoint.
    """

    image: np.ndarray
    """uint8 (size, size, 3)."""
    regions: tuple[Region, ...]
    """The objects from the farthest to the nearest, then the parts in the order of their objects."""
    masks: np.ndarray
    """bool (R, size, size)."""
    hidden: np.ndarray
    """int (objects, objects): how many pixels of object j are hidden by what is visible of object i."""

    @property
    def num_objects(self) -> int:
        """How many of the regions are objects; they come first."""
        return len(self.hidden)

    def is_in_front(self, near: int, far: int) -> bool:
        """Whether one object hides a piece of another one that is large enough to see."""
        return bool(self.hidden[near, far] >= _MIN_OVERLAP * (len(self.image) / _REFERENCE) ** 2)


def render(rng: np.random.Generator, *, size: int, parity: int) -> Scene:
    """Draws a scene of 3 to 5 objects on a square of `size` pixels.

    `parity`, 0 or 1, is that of the sum of all coordinates: scenes that differ in it differ in their layout.
    """
    layout = None
    while layout is None:
        objects, parts = _draw_words(rng)
        forms = [
            (thing.name, part.name if part else None, _diameter(rng, thing, size))
            for thing, part in zip(objects, parts, strict=True)
        ]
        outlines = [outline(*form) for form in forms]
        layout = _arrange(rng, outlines, size=size, parity=parity)
    labels, windows = layout
    image = background(rng, size)
    for thing, label in _labelled(objects, parts):
        window = windows[(label - 1) // 2]
        mask = labels[window] == label
        unit = size / _REFERENCE
        paint(
            rng,
            image[window],
            mask=mask,
            ink=lines(*forms[(label - 1) // 2], max(1, round(_LINE * unit))),
            colour=thing.colour,
            texture=thing.texture,
            unit=unit,
        )
    owners = (labels + 1) // 2
    masks = [owners == index + 1 for index in range(len(objects))]
    masks += [labels == label for thing, label in _labelled(objects, parts) if thing.whole is not None]
    hidden = [
        np.bincount(owners[window][pixels > 0], minlength=len(objects) + 1)[1:]
        for window, pixels in zip(windows, outlines, strict=True)
    ]
    regions = (*objects, *(part for part in parts if part))
    return Scene(
        image, regions, np.stack(masks), np.stack(hidden, axis=1) * ~np.eye(len(objects), dtype=bool)
    )


def _labelled(objects: list[Region], parts: list[Region | None]) -> Iterator[tuple[Region, int]]:
    """Objects and parts with what marks their pixels: 2k+1 for the body of object k, 2k+2 for its part."""
    for index, (thing, part) in enumerate(zip(objects, parts, strict=True)):
        yield thing, 2 * index + 1
        if part:
            yield part, 2 * index + 2


def _draw_words(rng: np.random.Generator) -> tuple[list[Region], list[Region | None]]:
    """Objects, no two alike in both colour and shape, and for each its part or None."""
    count = 3 + int(np.searchsorted((0.2, 0.7), rng.random()))
    shapes, colours = list(SHAPES), list(COLOURS)
    objects: list[Region] = []
    parts: list[Region | None] = []
    for index, pair in enumerate(rng.permutation(len(shapes) * len(colours))[:count]):
        shape, colour = divmod(int(pair), len(colours))
        texture, size = TEXTURES[rng.integers(len(TEXTURES))], tuple(SIZES)[rng.integers(len(SIZES))]
        objects.append(Region(shapes[shape], colours[colour], texture, size))
        part = None
        may_have_part = size == "large" and len(parts) - parts.count(None) < _MAX_PARTS
        if may_have_part and rng.random() < _PART_CHANCE:
            name = "hat" if shapes[shape] == "ring" else PARTS[rng.integers(len(PARTS))]
            other = (colour + 1 + rng.integers(len(colours) - 1)) % len(colours)
            part = Region(name, colours[other], "plain", None, index)
        parts.append(part)
    return objects, parts


def _diameter(rng: np.random.Generator, thing: Region, size: int) -> int:
    assert thing.size is not None
    least, greatest = SIZES[thing.size]
    return round(rng.integers(least, greatest + 1) * size / _REFERENCE)


def _arrange(
    rng: np.random.Generator, outlines: list[np.ndarray], *, size: int, parity: int
) -> tuple[np.ndarray, list[tuple[slice, slice]]] | None:
    """Places objects from the farthest to the nearest: enough of each stays visible, and all of its hole.

    Returns the label of each pixel, 0 for the background, and the window of each outline, or None where it
    found no place for one of them.
    """
    labels = np.zeros((size, size), np.int64)
    windows: list[tuple[slice, slice]] = []
    holes = np.zeros((size, size), bool)
    full = np.zeros((len(outlines), 2), np.int64)  # pixels of body and part
    visible = full.copy()
    least_overlap = _MIN_OVERLAP * (size / _REFERENCE) ** 2
    total = 0
    for index, pixels in enumerate(outlines):
        height, width = pixels.shape
        for _ in range(40):
            y, x = rng.integers(size - height + 1), rng.integers(size - width + 1)
            if index == len(outlines) - 1 and (total + y + x) % 2 != parity:
                continue
            window = slice(y, y + height), slice(x, x + width)
            covered = labels[window][pixels > 0]
            lost = np.bincount(covered, minlength=full.size + 1)[1:].reshape(full.shape)
            left, overlap = visible - lost, lost.sum(axis=1)
            if (
                (left.sum(axis=1) >= _MIN_VISIBLE * full.sum(axis=1)).all()
                and (left[:, 1] >= _MIN_VISIBLE * full[:, 1]).all()
                and ((overlap == 0) | (overlap >= least_overlap)).all()
                and not holes[window][pixels > 0].any()
            ):
                break
        else:
            return None
        total += y + x
        windows.append(window)
        np.copyto(labels[window], pixels + 2 * index, where=pixels > 0)
        holes[window] |= pixels < 0
        visible = left
        visible[index] = full[index] = np.bincount(pixels[pixels > 0], minlength=3)[1:]
    return labels, windows
