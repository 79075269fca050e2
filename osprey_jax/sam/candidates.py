"""The masks that a grid of points leads to in one crop, and which of them are good."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from osprey_jax.ops.nms import nms
from osprey_jax.sam.config import SamConfig
from osprey_jax.sam.crops import Crop
from osprey_jax.sam.options import Options
from osprey_jax.sam.predictor import Embedding, Sam
from osprey_jax.sam.prompt_encoder import FOREGROUND, PADDING
from osprey_jax.sam.surface import MAX_MASKS, Surface, chunks, marks, surface, upscale
from osprey_jax.sam.transforms import Frame, to_input
from osprey_jax.typing import Array, ArrayLike, Float, Int

EDGE = 20
"""A box that ends within so many pixels of a crop's edge is cut off by it."""
T = TypeVar("T")


class Candidates(NamedTuple):
    """Masks of one or several crops, as arrays on the host."""

    iou: Float[np.ndarray, "K"]
    stability: Float[np.ndarray, "K"]
    boxes: Float[np.ndarray, "K 4"]
    """x0, y0, x1 and y1 of pixels, all inclusive, in those of the image as it is judged."""
    points: Float[np.ndarray, "K 2"]
    """x and y in the image's pixels, float64."""
    crops: Int[np.ndarray, "K"]
    slots: Int[np.ndarray, "K"]
    """Rows of the crop's logits."""

    def take(self, indices: np.ndarray) -> "Candidates":
        """Some of them."""
        return Candidates(*(field[indices] for field in self))

    @classmethod
    def concatenate(cls, parts: "list[Candidates]") -> "Candidates":
        """All of several, at least one."""
        return cls(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))


class Sheet(NamedTuple):
    """What a crop's masks are made of at the image's size."""

    logits: Float[Array, "K Y X"]
    where: Frame
    corner: tuple[int, int]
    """Row and column of the crop in the image."""

    def surface(self, config: SamConfig, size: tuple[int, int]) -> Surface:
        """Where the masks are computed in an image of a size."""
        return surface(self.where, config, corner=self.corner, whole=size)


class _Judged(NamedTuple):
    """One batch of points, whose marks may still be computed."""

    logits: Float[Array, "N Y X"]
    chosen: Int[np.ndarray, "K"]
    """Rows of logits, three for each point, that expect enough of themselves."""
    iou: Float[np.ndarray, "K"]
    points: Float[np.ndarray, "K 2"]
    marks: list[Array]
    """For chunks of them: see `surface.marks`."""


def search(
    sam: Sam,
    image: np.ndarray,
    crop: Crop,
    options: Options,
    *,
    number: int,
    scale: float,
    progress: Callable[[int], None],
) -> tuple[Candidates, Sheet]:
    """What is found in one crop, by descending expected IoU, and what masks of it are made of.

    Args:
      sam: the network.
      image: `(h, w, 3)` uint8, from which the crop is cut.
      crop: where to look.
      options: what is good enough.
      number: of the crop.
      scale: at most 1, of the size at which masks are judged to the crop's.
      progress: is called with how many more points are done.
    """
    x0, y0, x1, y1 = crop.box
    embedding = sam.encode(np.ascontiguousarray(image[y0:y1, x0:x1]))
    high, wide = (max(1, int(side * scale + 0.5)) for side in embedding.where.size)
    at = surface(Frame((high, wide), embedding.where.resized), sam.config)
    size = np.array([high, wide], np.int32)

    def judged(logits: Array, iou: Array, points: np.ndarray) -> _Judged:
        expected = np.asarray(iou).reshape(-1)[: len(points) * iou.shape[1]]
        chosen = np.arange(len(expected))
        if options.pred_iou_thresh > 0:
            chosen = np.flatnonzero(expected > np.float32(options.pred_iou_thresh))
        flat = logits.reshape(-1, *logits.shape[2:])
        offset = np.float32(options.stability_score_offset)
        found = [
            marks(upscale(flat, chunk, at.rows, at.columns), size, offset)
            for chunk, _ in chunks(chosen, at.masks)
        ]
        return _Judged(flat, chosen, expected[chosen], points[chosen // iou.shape[1]], found)

    pool, parts = _Pool(sam.config.mask_size), []
    batches = _decode(
        sam, embedding, crop.points, batch=min(options.points_per_batch, options.points_per_side**2)
    )
    for batch, points in ahead((judged(*one), len(one[2])) for one in ahead(batches)):
        found, stable = _assess(batch, options)
        edges = np.float32(scale) * np.array([crop.box, (0, 0, image.shape[1], image.shape[0])], np.float32)
        boxes = found.boxes + edges[0, [0, 1, 0, 1]]
        stable &= ~cut_off(boxes, edges[0], edges[1])
        slots = pool.add(batch.logits, batch.chosen[stable])
        found = found._replace(
            boxes=boxes, points=found.points + np.array([[x0, y0]]), crops=np.full(len(boxes), number)
        ).take(np.flatnonzero(stable))
        parts.append(found._replace(slots=slots))
        progress(points)
    found = Candidates.concatenate(parts)
    found = found.take(nms(found.boxes, found.iou, threshold=options.box_nms_thresh))
    sheet = Sheet(pool.take(found.slots), embedding.where, (y0, x0))
    return found._replace(slots=np.arange(len(found.slots))), sheet


def cut_off(boxes: np.ndarray, crop: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Which boxes `(K, 4)` end at the edge of a crop and not at the image's."""
    at_crop, at_image = (np.abs(boxes - edges) <= EDGE for edges in (crop, image))
    return (at_crop & ~at_image).any(axis=1)


def _decode(
    sam: Sam, embedding: Embedding, points: np.ndarray, *, batch: int
) -> Iterator[tuple[Array, Array, np.ndarray]]:
    """Logits `(batch, 3, Y, X)` and expected IoUs `(batch, 3)` for some points at a time, and the points."""
    kinds = np.tile(np.array([FOREGROUND, PADDING], np.int32), (batch, 1))
    for start in range(0, len(points), batch):
        some = points[start : start + batch]
        places = np.zeros((batch, 2, 2), np.float32)
        places[: len(some), 0] = to_input(some, embedding.where)
        yield *sam.decode(embedding, places, kinds, multimask=True), some


def _assess(batch: _Judged, options: Options) -> tuple[Candidates, np.ndarray]:
    """What the device has found out about a batch, boxes in the crop, and which masks are stable."""
    marked = np.concatenate([np.zeros((0, 6), np.int32), *map(np.asarray, batch.marks)])[: len(batch.chosen)]
    high, low = marked[:, 0].astype(np.float32), marked[:, 1].astype(np.float32)
    stability = np.divide(high, low, out=np.full_like(high, np.nan), where=low > 0)
    none = np.zeros(len(marked), np.int64)
    found = Candidates(batch.iou, stability, marked[:, 2:].astype(np.float32), batch.points, none, none)
    return found, stability >= np.float32(options.stability_score_thresh)  # never without a pixel


class _Pool:
    """Logits of candidates in one array on the device, which doubles when it is full."""

    def __init__(self, side: int):
        self._logits, self._count = jnp.zeros((MAX_MASKS, side, side)), 0

    def add(self, logits: Float[Array, "N Y X"], chosen: np.ndarray) -> np.ndarray:
        """Keeps some; gives their places."""
        slots = self._count + np.arange(len(chosen))
        self._count += len(chosen)
        while self._count > len(self._logits):
            self._logits = jnp.concatenate([self._logits, jnp.zeros_like(self._logits)])
        if len(chosen):
            unused = len(logits) - len(chosen)
            places = np.pad(slots, (0, unused), constant_values=len(self._logits))  # beyond, so not written
            self._logits = _put(self._logits, logits, np.pad(chosen, (0, unused)), places)
        return slots

    def take(self, slots: np.ndarray) -> Array:
        """Those in some places, filled up at the end to a power of two."""
        full = 1 << max(0, len(slots) - 1).bit_length()
        return _take(self._logits, np.pad(slots, (0, full - len(slots))))


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Asks for one item more before it gives one, so that the device has work while the host reads."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


@partial(jax.jit, donate_argnums=0)
def _put(pool: Array, logits: Array, chosen: ArrayLike, slots: ArrayLike) -> Array:
    return pool.at[slots].set(logits[chosen], mode="drop")


@jax.jit
def _take(pool: Array, slots: ArrayLike) -> Array:
    return pool[slots]
