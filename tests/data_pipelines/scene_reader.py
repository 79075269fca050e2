"""Reads a rendered scene off its pixels, with outlines of its own, for comparison with what is said of it."""

import colorsys
import dataclasses
import functools
import itertools

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.conversation import converse
from data_pipelines.records import Record
from data_pipelines.shapes import Scene, Shapes


def turns_of(record: Record) -> tuple[tuple[str, str], ...]:
    """Questions and answers of a scene's record, which has nothing to draw."""
    return converse(record, np.random.default_rng(0)).turns


@dataclasses.dataclass
class Seen:
    """An object or a part as it was read off the picture."""

    name: str
    colour: str
    texture: str = "plain"
    size: str = ""
    centre: tuple[float, float] = (0.0, 0.0)  # row, column
    outline: np.ndarray | None = None  # of an object's body, what is hidden of it included
    whole: "Seen | None" = None

    @property
    def phrase(self) -> str:
        if self.whole:
            return f"a {self.name}, {self.texture} {self.colour}"
        return f"a {self.size} {self.name}, {self.texture} {self.colour}"


@functools.cache
def drawn(shape: str, diameter: int) -> np.ndarray:
    """A shape drawn by Pillow, 16 times as large and then reduced."""
    side = 16 * diameter
    image = Image.new("1", (side, side))
    pen = ImageDraw.Draw(image)

    def polygon(*corners: tuple[float, float]) -> None:
        pen.polygon([((u + 1) / 2 * side, (v + 1) / 2 * side) for u, v in corners], fill=1)

    def disc(radius: float, fill: int = 1) -> None:
        corners = (-radius, -radius, radius, radius)
        pen.ellipse([(corner + 1) / 2 * side for corner in corners], fill=fill)

    if shape == "ring":
        disc(1)
        disc(0.35, fill=0)
    elif shape == "triangle":
        polygon((0, -1), (1, 1), (-1, 1))
    else:
        across, down = {"square": (1, 1), "bar": (1, 0.5), "pillar": (0.5, 1)}[shape]
        polygon((-across, -down), (across, -down), (across, down), (-across, down))
    return np.asarray(image).reshape(diameter, 16, diameter, 16).mean(axis=(1, 3)) >= 0.5


SHAPES = ("square", "triangle", "ring", "bar", "pillar")


EDGE = 12
LINE = 2  # width of the line around bodies and parts, in pixels


def read_outline(body: np.ndarray, covered: np.ndarray) -> tuple[str, str, np.ndarray]:
    """The shape, size and outline that leave exactly this body where nothing covers them."""
    # Shapes are drawn in squares, which reach beyond the picture where a bar or a pillar is near its edge.
    body, covered = np.pad(body, EDGE), np.pad(covered, EDGE)
    rows, columns = np.flatnonzero(body.any(axis=1)), np.flatnonzero(body.any(axis=0))
    best: tuple[float, str, int, np.ndarray] | None = None
    for shape, diameter in itertools.product(SHAPES, [*range(23, 30), *range(35, 44)]):
        tops = range(max(0, rows[-1] - diameter), min(rows[0], len(body) - diameter) + 1)
        lefts = range(max(0, columns[-1] - diameter), min(columns[0], len(body) - diameter) + 1)
        for top, left in itertools.product(tops, lefts):
            window = slice(top, top + diameter), slice(left, left + diameter)
            seen = drawn(shape, diameter) & ~covered[window]
            wrong = (seen ^ body[window]).sum() + body.sum() - body[window].sum()
            if best is None or wrong < best[0]:
                outline = np.zeros_like(body)
                outline[window] = drawn(shape, diameter)
                best = wrong, shape, diameter, outline[EDGE:-EDGE, EDGE:-EDGE]
    assert best is not None
    wrong, shape, diameter, outline = best
    assert wrong <= 0.09 * body.sum(), (shape, wrong, body.sum())
    return shape, "small" if diameter < 32 else "large", outline


def read_colour(pixels: np.ndarray) -> str:
    """The name of the brightest of these pixels, by hue."""
    brightest = pixels[pixels.astype(int).sum(axis=1).argmax()] / 255
    hue, saturation, _ = colorsys.rgb_to_hsv(*brightest)
    if saturation < 0.12:
        return "white"
    names = {0: "red", 54: "yellow", 129: "green", 184: "cyan", 228: "blue", 280: "purple", 327: "pink"}
    distance, name = min(
        (abs((hue * 360 - degrees + 180) % 360 - 180), name) for degrees, name in names.items()
    )
    assert distance < 12
    return name


def read_texture(image: np.ndarray, body: np.ndarray) -> str:
    """By what is dark inside the dark line around a body."""
    values = image.astype(int).sum(axis=2)
    dark = values < 0.6 * values[body].max()
    inside = body
    for _ in range(LINE):
        padded = np.pad(inside, 1)
        inside = inside & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    if not (dark & inside).any():
        return "plain"
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        both = inside & np.roll(inside, (down, right), (0, 1))
        if (dark == np.roll(dark, (down, right), (0, 1)))[both].all():
            return "striped"
    assert dark[inside].mean() < 0.4
    return "dotted"


def centre_of(mask: np.ndarray) -> tuple[float, float]:
    row, column = np.argwhere(mask).mean(axis=0) + 0.5
    return float(row), float(column)


@functools.cache
def seen(index: int) -> tuple[Scene, tuple[Seen, ...]]:
    """A held-out scene and what its pixels show in each of its masks; a part is a mask within another one."""
    scene = Shapes(split="held_out").scene(index)
    masks, image = scene.masks, scene.image
    holders = [
        next((o for o, outer in enumerate(masks) if o != i and not (mask & ~outer).any()), None)
        for i, mask in enumerate(masks)
    ]
    objects = [i for i, holder in enumerate(holders) if holder is None]
    read: dict[int, Seen] = {}
    for i in objects:
        parts = [masks[j] for j, holder in enumerate(holders) if holder == i]
        body = masks[i] & ~np.any([*parts, np.zeros_like(masks[i])], axis=0)
        # Objects come from the farthest to the nearest; what covers one is its part or nearer.
        covered = np.any([*parts, *(masks[j] for j in objects if j > i), np.zeros_like(body)], axis=0)
        shape, size, outline = read_outline(body, covered)
        texture = read_texture(image, body)
        read[i] = Seen(shape, read_colour(image[body]), texture, size, centre_of(masks[i]), outline)
    for i in [i for i, holder in enumerate(holders) if holder is not None]:
        whole = read[holders[i]]
        on_top = (masks[i] & ~whole.outline).sum() > 0.3 * masks[i].sum()
        assert read_texture(image, masks[i]) == "plain"
        name = "hat" if on_top else "core"
        read[i] = Seen(name, read_colour(image[masks[i]]), centre=centre_of(masks[i]), whole=whole)
    return scene, tuple(read[i] for i in range(len(masks)))


INDICES = range(12)


def is_in_front(scene: Scene, things: tuple[Seen, ...], near: int, far: int) -> bool:
    """By the piece of the farther outline that the nearer object's visible pixels lie on."""
    return (things[far].outline & scene.masks[near]).sum() >= 12


def stands(scene: Scene, things: tuple[Seen, ...], first: int, relation: str, second: int) -> bool:
    """Whether a relation such as `above and left of` holds between two objects."""
    if relation in ("in front of", "behind"):
        near, far = (first, second) if relation == "in front of" else (second, first)
        return is_in_front(scene, things, near, far)
    down, right = np.subtract(things[first].centre, things[second].centre)
    holds = {"above": down < 0, "below": down > 0, "left of": right < 0, "right of": right > 0}
    return all(holds[word] for word in relation.split(" and "))


PLACES = (
    *("in the upper left", "at the top", "in the upper right"),
    *("on the left", "in the centre", "on the right"),
    *("in the lower left", "at the bottom", "in the lower right"),
)


def in_place(thing: Seen, place: str) -> bool:
    row, column = (int(3 * value // 96) for value in thing.centre)
    return place == PLACES[3 * row + column]


def by_phrase(things: tuple[Seen, ...], phrase: str) -> int:
    """The only object of this colour and shape."""
    (index,) = [
        i for i, thing in enumerate(things) if phrase == f"{thing.colour} {thing.name}" and not thing.whole
    ]
    return index


def nearest(things: tuple[Seen, ...], index: int) -> int:
    others = [i for i, thing in enumerate(things) if i != index and not thing.whole]
    return min(others, key=lambda i: np.hypot(*np.subtract(things[i].centre, things[index].centre)))


def words_of(thing: Seen) -> set[str]:
    return {thing.size, thing.texture, thing.colour, thing.name} - {""}
