"""How good masks are, as a user gets them: a click's of the highest expected IoU, and a box's only one."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from osprey_jax.sam.predictor import Sam
from osprey_jax.sam.prompts import box_of, pixel_of

OBJECT, OBJECT_AT_PART, PART = "objects", "objects, at their part", "parts"
"""Kinds of regions, for clicks: an object that is clicked where its part is may as well be the part."""


class Truth(NamedTuple):
    """An image and what is in it."""

    image: np.ndarray
    """`(h, w, 3)` uint8."""
    masks: np.ndarray
    """`(R, h, w)` bool."""
    is_part: Sequence[bool]
    """Whether a region is a part of another one."""


class Score(NamedTuple):
    """One prompt's IoUs with the region that it was drawn for."""

    prompt: str
    """`click` or `box`."""
    kind: str
    iou: float
    """Of a click's mask with the highest expected IoU, of a box's only one."""
    expected: float
    """What the model expects that to be."""
    best: float
    """The best of a click's masks."""
    single: float
    """Of the mask that isn't for ambiguous prompts."""


class Row(NamedTuple):
    """The means of some scores."""

    prompt: str
    kind: str
    """`all` for all kinds."""
    regions: int
    iou: float
    best: float
    single: float


def evaluate(sam: Sam, truths: Iterable[Truth], *, seed: int) -> Iterator[list[Score]]:
    """Clicks on a random pixel of each region of each image, and the boxes around them, image by image."""
    for number, truth in enumerate(truths):
        rng = np.random.default_rng([seed, number])
        embedding = sam.encode(truth.image)
        points = np.stack([pixel_of(mask, rng) for mask in truth.masks])[:, None]
        boxes = np.stack([box_of(mask) for mask in truth.masks])
        several = sam.predict(embedding, points=points)
        singles = sam.predict(embedding, points=points, multimask=False)
        boxed = sam.predict(embedding, boxes=boxes, multimask=False)
        found = np.concatenate([np.asarray(each.masks) for each in (several, singles, boxed)], axis=1)
        overlaps = _iou(found, truth.masks[:, None])  # three masks of a click, its single one, a box's
        expected, chosen = np.asarray(several.iou), np.asarray(several.iou).argmax(axis=1)
        scores = []
        parts = truth.masks[np.asarray(truth.is_part, bool)].any(axis=0)
        for region, iou in enumerate(overlaps):
            x, y = points[region, 0].astype(int)
            kind = box_kind = PART if truth.is_part[region] else OBJECT
            if kind == OBJECT and parts[y, x]:
                kind = OBJECT_AT_PART
            best = chosen[region]
            click = float(iou[best]), float(expected[region, best]), float(iou[:3].max()), float(iou[3])
            box = float(iou[4]), float(boxed.iou[region, 0]), float(iou[4]), float(iou[4])
            scores += [Score("click", kind, *click), Score("box", box_kind, *box)]
        yield scores


def _iou(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    both, either = (found & truth).sum((-2, -1)), (found | truth).sum((-2, -1))
    return both / np.maximum(either, 1)


def summarise(scores: Sequence[Score]) -> list[Row]:
    """Means by prompt and kind, and over all kinds, for what there is."""
    rows = []
    for prompt in ("click", "box"):
        for kind in (OBJECT, OBJECT_AT_PART, PART, "all"):
            some = [each for each in scores if each.prompt == prompt and kind in (each.kind, "all")]
            if some:
                means = (
                    float(np.mean([getattr(s, name) for s in some])) for name in ("iou", "best", "single")
                )
                rows.append(Row(prompt, kind, len(some), *means))
    return rows
