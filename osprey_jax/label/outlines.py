"""Masks as paths for SVG: their outlines, smoothed, and where a number is put on them (NumPy)."""

import collections
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

TOLERANCE = 0.7
"""Pixels by which a smoothed outline may stray."""


def shrink(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask at another height and width; what is thinner than a pixel there isn't lost."""
    resized = Image.fromarray(mask.astype(np.uint8) * 255).resize(size[::-1], Image.Resampling.BOX)
    share = np.asarray(resized)
    return share >= 128 if (share >= 128).any() else share > 0


def svg_path(mask: np.ndarray) -> str:
    """The `d` of a path around all parts of an `(h, w)` bool mask and, by the even-odd rule, its holes."""
    return "".join(
        "M" + " ".join(f"{x:g},{y:g}" for x, y in _simplified(outline)) + "z" for outline in _outlines(mask)
    )


def _outlines(mask: np.ndarray) -> Iterable[np.ndarray]:
    """Closed outlines as `(N, 2)` x and y: the middles of the edges between inside and outside."""
    inside = np.pad(mask, 1)
    core = inside[1:-1, 1:-1]
    following = collections.defaultdict[tuple[int, int], list[tuple[int, int]]](list)
    # By the neighbour that is outside: where its edge begins and ends, so that inside is on the right.
    for neighbour, start, stop in (
        (inside[:-2, 1:-1], (0, 0), (1, 0)),
        (inside[1:-1, 2:], (1, 0), (1, 1)),
        (inside[2:, 1:-1], (1, 1), (0, 1)),
        (inside[1:-1, :-2], (0, 1), (0, 0)),
    ):
        ys, xs = np.nonzero(core & ~neighbour)
        for x, y in zip(xs.tolist(), ys.tolist(), strict=True):
            following[x + start[0], y + start[1]].append((x + stop[0], y + stop[1]))
    while following:
        point = first = next(iter(following))
        corners = []
        while True:
            corners.append(point)
            ends = following[point]
            last, point = point, ends.pop()
            if not ends:
                del following[last]
            if point == first:
                break
        points = np.array(corners, np.float64)
        yield (points + np.roll(points, -1, axis=0)) / 2


def _simplified(points: np.ndarray) -> np.ndarray:
    """Fewer points of a closed outline (Ramer, Douglas, Peucker)."""
    far = int(np.argmax(((points - points[0]) ** 2).sum(1)))
    halves = points[: far + 1], np.concatenate([points[far:], points[:1]])
    return np.concatenate([half[_kept(half)][:-1] for half in halves])


def _kept(points: np.ndarray) -> np.ndarray:
    """Which points of a line stay, its ends among them."""
    keep = np.zeros(len(points), bool)
    keep[[0, -1]] = True
    parts = [(0, len(points) - 1)]
    while parts:
        first, last = parts.pop()
        if last - first < 2:
            continue
        x, y = points[last] - points[first]
        offsets = points[first + 1 : last] - points[first]
        length = max(np.hypot(x, y), 1e-9)
        distance = np.abs(offsets[:, 0] * y - offsets[:, 1] * x) / length
        worst = int(np.argmax(distance))
        if distance[worst] > TOLERANCE:
            middle = first + 1 + worst
            keep[middle] = True
            parts += [(first, middle), (middle, last)]
    return keep


def places(masks: Sequence[np.ndarray], *, apart: float) -> list[tuple[float, float] | None]:
    """A point x, y deep inside of each mask, so far `apart` where there is room; None for an empty one."""
    found: list[tuple[float, float] | None] = [None] * len(masks)
    taken = np.zeros((0, 2))
    for index in sorted(range(len(masks)), key=lambda index: int(masks[index].sum())):
        if not masks[index].any():
            continue
        depth = _depth(masks[index])
        ys, xs = np.nonzero(depth)
        points = np.stack([xs, ys], axis=1) + 0.5
        score = np.minimum(depth[ys, xs], apart / 2)
        if len(taken):
            nearest = np.sqrt(((points[:, None] - taken) ** 2).sum(-1)).min(1)
            score = score + 2 * np.minimum(nearest, apart)
        # Of equal ones that in the middle.
        centre = points.mean(0)
        best = np.lexsort((((points - centre) ** 2).sum(1), -score))[0]
        found[index] = (float(points[best, 0]), float(points[best, 1]))
        taken = np.append(taken, points[best][None], axis=0)
    return found


def _depth(inside: np.ndarray) -> np.ndarray:
    """Steps from each pixel to the nearest one outside, the rim counted as 1."""
    depth = np.zeros(inside.shape, np.int32)
    while inside.any():
        depth += inside
        padded = np.pad(inside, 1)
        inside = inside & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    return depth
