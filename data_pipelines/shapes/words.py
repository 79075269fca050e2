"""What is true of a scene, in words: descriptions of its regions and how two objects stand to each other.

Descriptions keep one order: size, shape, texture, colour.
"""

import numpy as np

from data_pipelines.shapes.scene import Region, Scene

_PLACES = (
    ("in the upper left", "at the top", "in the upper right"),
    ("on the left", "in the centre", "on the right"),
    ("in the lower left", "at the bottom", "in the lower right"),
)
_CLEARLY = 0.08
"""Share of the picture's side by which middles differ where one object is surely left of or above another."""


def short_description(scene: Scene, region: int) -> str:
    """The phrase for a region: `a small ring, striped red`, for a part `a hat, plain blue`."""
    return f"a {_full_name(scene.regions[region])}"


def detailed_description(scene: Scene, region: int) -> str:
    """A few sentences: the region, its place in the picture, its part and its nearest neighbour."""
    thing, where = scene.regions[region], f"{place(scene, region)} of the picture"
    if thing.whole is not None:
        whole = _full_name(scene.regions[thing.whole])
        return f"The {thing.colour} {thing.name} of a {whole}, {where}."
    parts = [f" It has a {part.colour} {part.name}." for part in scene.regions if part.whole == region]
    return f"A {_full_name(thing)}, {where}.{''.join(parts)} It is {neighbour(scene, region)}."


def referring_expression(scene: Scene, region: int) -> str:
    """A phrase that tells an object from the others: attributes, place and nearest neighbour."""
    thing = scene.regions[region]
    return f"{thing.colour} {thing.name} {place(scene, region)}, {neighbour(scene, region)}"


def category(scene: Scene, region: int) -> str:
    """An object's shape; for a part, that of the whole and the part: `square:hat`."""
    thing = scene.regions[region]
    return thing.name if thing.whole is None else f"{scene.regions[thing.whole].name}:{thing.name}"


def place(scene: Scene, region: int) -> str:
    """Where the middle of a region's visible pixels is, by thirds of the picture."""
    row, column = (3 * _centre(scene, region) / len(scene.image)).astype(int)
    return _PLACES[row][column]


def neighbour(scene: Scene, region: int) -> str:
    """How an object stands to the one with the nearest middle, called by the colour and shape only it has."""
    here = _centre(scene, region)
    others = [index for index in range(scene.num_objects) if index != region]
    steps = [_centre(scene, index) - here for index in others]
    nearest = others[int(np.argmin([down * down + right * right for down, right in steps]))]
    thing = scene.regions[nearest]
    return f"{relation(scene, region, nearest)} the {thing.colour} {thing.name}"


def relation(scene: Scene, first: int, second: int) -> str:
    """How an object stands to another one: by depth where they overlap, else by direction."""
    if scene.is_in_front(first, second):
        return "in front of"
    if scene.is_in_front(second, first):
        return "behind"
    down, right = _centre(scene, first) - _centre(scene, second)
    vertical = "below" if down > 0 else "above"
    horizontal = "right of" if right > 0 else "left of"
    if 2 * abs(down) < abs(right):
        return horizontal
    return vertical if 2 * abs(right) < abs(down) else f"{vertical} and {horizontal}"


def common(first: Region, second: Region) -> str:
    """A sentence that names all that two objects have in common."""
    attributes = ("size", "texture", "colour")
    words = [str(getattr(first, name)) for name in attributes if alike(first, second, name)]
    if first.name == second.name:
        return f"Both are {' '.join([*words, f'{first.name}s'])}."
    if not words:
        return "They have nothing in common."
    return f"Both are {' and '.join(filter(None, (', '.join(words[:-1]), words[-1])))}."


def alike(first: Region, second: Region, attribute: str) -> bool:
    """Whether two regions have the same value of a field of `Region`."""
    return bool(getattr(first, attribute) == getattr(second, attribute))


def is_before(scene: Scene, first: int, second: int, *, axis: int) -> bool | None:
    """Whether one object is above another (axis 0) or left of it (axis 1); None where it's a close call."""
    step = (_centre(scene, second) - _centre(scene, first))[axis]
    return None if abs(step) < _CLEARLY * len(scene.image) else bool(step > 0)


def is_larger(scene: Scene, first: int, second: int) -> bool | None:
    """Whether one object is larger than another; None for two of a size."""
    sizes = scene.regions[first].size, scene.regions[second].size
    return None if sizes[0] == sizes[1] else sizes[0] == "large"


def is_in_front(scene: Scene, first: int, second: int) -> bool | None:
    """Whether one object hides a piece of another; None where a look leaves a doubt."""
    if scene.is_in_front(first, second):
        return True
    touching = scene.hidden[first, second] or scene.hidden[second, first]
    return None if touching and not scene.is_in_front(second, first) else False


def _full_name(thing: Region) -> str:
    name = thing.name if thing.size is None else f"{thing.size} {thing.name}"
    return f"{name}, {thing.texture} {thing.colour}"


def _centre(scene: Scene, region: int) -> np.ndarray:
    """Row and column of the middle of a region's visible pixels."""
    mask = scene.masks[region]
    steps = np.arange(len(mask)) + 0.5
    return np.array([mask.sum(axis=1) @ steps, mask.sum(axis=0) @ steps]) / mask.sum()
