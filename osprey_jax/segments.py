"""What SAM finds in an image at points, in boxes or everywhere; masks stay on the device for Osprey."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from osprey_jax.image import ImageLike, load_image
from osprey_jax.masks import MaskPyramid, encode_rle, rle_area, rle_box
from osprey_jax.ops.mask_pyramid import mask_pyramid
from osprey_jax.region_lines import region_line
from osprey_jax.sam import everything as automatic
from osprey_jax.sam.nesting import part_of
from osprey_jax.sam.predictor import Sam
from osprey_jax.sam.prompt_places import encode_prompts
from osprey_jax.sam.transforms import frame
from osprey_jax.typing import Array

MAX_HEIGHT = 512
"""Of masks that candidates for everything are judged on, in pixels: the original's demo shrinks images so."""
MASKS = 32
"""Masks that pyramids are made of at a time, where so many of the image's size fit into `PIXELS`."""
PIXELS = 1 << 28


class Segment(NamedTuple):
    """A region that SAM found, and what is said of it."""

    text: str
    segmentation: dict[str, Any]
    """COCO RLE at the image's size; `masks.decode_rles` makes masks of some."""
    box: list[int]
    """x0, y0, x1, y1 in pixels of the image, x1 and y1 exclusive."""
    area: int
    """In pixels."""
    prompt: dict[str, list[float]]
    """What led to it: `point` or `box`, in pixels of the image."""
    predicted_iou: float
    """With what was meant, as SAM expects it."""
    stability_score: float | None = None
    """Of everything: IoU of the masks at a higher and a lower threshold."""
    part_of: int | None = None
    """Of everything: number of the smallest segment that it lies in, from 0."""


@dataclasses.dataclass(frozen=True)
class Segments:
    """Segments without words yet, and their masks."""

    image: np.ndarray
    """`(h, w, 3)` uint8."""
    segments: list[Segment]
    masks: Callable[[int, int], Array]
    """Gives masks `(n, h, w)` from one number to before another, bool, on the device."""

    def pyramid(self, *, level_sizes: Sequence[int], position_size: int) -> MaskPyramid:
        """Of all masks, on the device; empty ones at the end make up one of few numbers."""
        height, width = self.image.shape[:2]
        count = len(self.segments)
        step = min(MASKS, max(1, PIXELS // (height * width)), 1 << (count - 1).bit_length())
        parts = []
        for start in range(0, count, step):
            masks = self.masks(start, min(start + step, count))
            masks = jnp.pad(masks, ((0, step - len(masks)), (0, 0), (0, 0)))
            parts.append(mask_pyramid(masks, level_sizes=tuple(level_sizes), position_size=position_size))
        return jax.tree.map(lambda *levels: jnp.concatenate(levels), *parts)


def at_points(sam: Sam, image: ImageLike, points: Sequence[Sequence[float]]) -> Segments:
    """One segment for each of some points, x and y in pixels; raises ValueError as `Sam.predict` does."""
    given = _places("point", points, 2)
    return _predicted(sam, load_image(image), "point", points, {"points": given[:, None]})


def in_boxes(sam: Sam, image: ImageLike, boxes: Sequence[Sequence[float]]) -> Segments:
    """One segment for each of some boxes, x0, y0, x1 and y1 in pixels; raises as `Sam.predict` does."""
    return _predicted(sam, load_image(image), "box", boxes, {"boxes": _places("box", boxes, 4)})


def everything(
    sam: Sam,
    image: ImageLike,
    options: automatic.Options,
    *,
    progress: Callable[[int], None] | None = None,
) -> Segments:
    """Everything that SAM finds by itself; `progress` is called with how many more points are done."""
    picture = load_image(image)
    found = automatic.find(sam, picture, options, max_height=MAX_HEIGHT, progress=progress)
    wholes = part_of([record["segmentation"] for record in found.records])
    segments = [
        _segment(
            record["segmentation"],
            {"point": record["point_coords"][0]},
            record["predicted_iou"],
            stability_score=record["stability_score"],
            part_of=whole,
        )
        for record, whole in zip(found.records, wholes, strict=True)
    ]
    return Segments(picture, segments, found.masks)


def segment_line(image: str, segment: Segment, *, number: int, question: str) -> dict[str, Any]:
    """A segment as a line of JSON; `number`, like that of the whole it is part of, is from 1."""
    told = {"text": segment.text, "prompt": segment.prompt, "predicted_iou": segment.predicted_iou}
    if segment.stability_score is not None:
        whole = None if segment.part_of is None else segment.part_of + 1
        told |= {"stability_score": segment.stability_score, "part_of": whole}
    return region_line(
        {"image": image},
        region=number,
        label=None,
        box=segment.box,
        area=segment.area,
        segmentation=segment.segmentation,
        question=question,
        answer=told,
    )


def _predicted(
    sam: Sam, image: np.ndarray, kind: str, prompts: Sequence[Sequence[float]], given: dict[str, Any]
) -> Segments:
    where = frame((image.shape[0], image.shape[1]), sam.config.encoder.image_size)
    encode_prompts(
        where, **given, mask_size=sam.config.mask_size
    )  # finds what is wrong before the image is encoded, which takes long
    found = sam.predict(sam.encode(image), **given, multimask=False)
    masks, ious = found.masks[:, 0], np.asarray(found.iou[:, 0])
    segments = [
        _segment(encode_rle(np.asarray(mask)), {kind: [float(x) for x in prompt]}, float(iou))
        for mask, iou, prompt in zip(masks, ious, prompts, strict=True)
    ]
    return Segments(image, segments, lambda start, stop: masks[start:stop])


def _segment(rle: dict[str, Any], prompt: dict[str, list[float]], iou: float, **more: Any) -> Segment:
    return Segment("", rle, rle_box(rle), rle_area(rle), prompt, iou, **more)


def _places(kind: str, places: Sequence[Sequence[float]], size: int) -> np.ndarray:
    for place in places:
        if np.shape(place) != (size,):
            raise ValueError(f"a {kind} has {size} numbers, got {place!r}")
    return np.asarray(places)
