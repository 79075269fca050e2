"""Answers about many regions of many images, in batches that share what can be shared.

Of each image the tower runs once and the prompts' common beginning is computed once; its regions go on in
batches of rows behind it. Sizes of batches and buffers come from short lists, so few programs are compiled,
and rows that are done leave the batch. What a row answers depends on no other row.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from osprey_jax.config import OspreyConfig
from osprey_jax.generate import Features, Prefix, Rows, Sampler, begin, decode, encode, prefill, resize
from osprey_jax.masks import MaskPyramid
from osprey_jax.models import osprey as architecture
from osprey_jax.models.osprey import Osprey
from osprey_jax.sharding import GENERATION_RULES, param_shardings, use_mesh
from osprey_jax.typing import Array, Float, Params

T = TypeVar("T")

MAX_ROWS = 128
"""Regions that are answered at a time, where memory allows."""
WINDOW_IMAGES, WINDOW_REGIONS = 16, 512
"""So many images of a stream are answered together, or fewer if they have so many regions."""
MAX_IMAGES = 8
"""Images whose regions share a batch, where memory allows."""
PREFIX_STEP, SUFFIX_STEP = 64, 8
"""Prompts' beginnings and ends are padded to multiples of these."""
FIRST_ROOM, ROOM_GROWTH = 16, 4
"""Slots for generated tokens at first, and what they are multiplied by when they are full."""
_FEW_ROWS = 8
"""Batches don't shrink below this."""
_STOP_STEPS = 8
"""Tokens between two searches for stop strings."""
_CACHES = 0.5
"""Of a device's memory beside the parameters: what caches may take."""


class Network(NamedTuple):
    """A model with its parameters, and the mesh that these lie on."""

    model: Osprey
    params: Params
    mesh: Mesh | None = None

    def run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What a function of `generate` makes of this model."""
        with contextlib.nullcontext() if self.mesh is None else use_mesh(self.mesh, GENERATION_RULES):
            return function(self.model, self.params, *args, **kwargs)


def placed_params(config: OspreyConfig, dtype: str, quantization: str | None, mesh: Mesh | None) -> Params:
    """Shapes, dtypes and, on a mesh, places of the parameters for generation; the extractor's are float32."""
    shapes = architecture.abstract_params(config, dtype, quantization=quantization)
    shapes = {**shapes, "extractor": architecture.abstract_params(config, "float32")["extractor"]}
    if mesh is None:
        return shapes
    places = param_shardings(
        architecture.boxed_params(config, quantization=quantization), mesh, GENERATION_RULES
    )
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
    )


class Prepared(NamedTuple):
    """An image and its regions as the network takes them; `Osprey.prepare` makes it, on the host."""

    pixels: Float[np.ndarray, "Y X 3"]
    masks: MaskPyramid
    """`(R, …)`; of masks that are on the device it is there, too."""
    filled: int | None = None
    """How many of the masks are regions, where the last ones are padding."""

    @property
    def regions(self) -> int:
        """How many there are."""
        return len(self.masks.position) if self.filled is None else self.filled


class Asked(NamedTuple):
    """What is asked of one image's regions, as token ids with the image's places."""

    prepared: Prepared
    prefix: list[int]
    """What all prompts begin with."""
    rest: list[list[int]]
    """What follows it for each region, at least one id; may be fewer than regions where `in_prefix`."""
    in_prefix: bool = False
    """Whether `prefix` names all regions and `rest` none; otherwise each of `rest` names its own."""


class Rules(NamedTuple):
    """How answers are decoded."""

    sampler: Sampler
    limit: int
    """Tokens of an answer at most, its end token included."""
    seed: int
    """An answer depends on it and on its region's number."""
    eos_id: int
    pad_id: int
    stop: Callable[[list[int]], int | None] | None = None
    """Tells from an answer's ids how many of them are kept, or None where it goes on."""


class Answer(NamedTuple):
    """The tokens of one region's answer; the last is the end token unless it was cut off."""

    token_ids: list[int]
    logprobs: list[float]
    """Natural logarithms of the model's probabilities, before temperature and top-p."""


def row_bucket(count: int) -> int:
    """The batch size, of those that programs are compiled for, which holds `count` rows."""
    assert 0 < count <= MAX_ROWS, count
    if count <= _FEW_ROWS:
        return 1 << (count - 1).bit_length()
    step = 4 if count <= 2 * _FEW_ROWS else 8
    return math.ceil(count / step) * step


class Capacity(NamedTuple):
    """What fits a device's memory at a time."""

    rows: int = MAX_ROWS
    images: int = MAX_IMAGES


def capacity(network: Network, asked: Sequence[Asked], limit: int) -> Capacity:
    """So many rows and images that their caches fit even if every answer has `limit` tokens.

    It depends on the device's size, not on what is in use, so that batches and their rounding repeat. A
    device that doesn't tell its size, such as a CPU, sets no limit.
    """
    device = jax.local_devices()[0] if network.mesh is None else network.mesh.local_devices[0]
    size = (device.memory_stats() or {}).get("bytes_limit")
    if size is None:
        return Capacity()
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(network.params)
    )
    prefix = max(len(one.prefix) for one in asked)
    rest = max(len(ids) for one in asked for ids in one.rest)
    return fitting(network.model, size - held, prefix=prefix, rest=rest, limit=limit, images=len(asked))


def fitting(model: Osprey, free: float, *, prefix: int, rest: int, limit: int, images: int) -> Capacity:
    """`capacity` where `free` bytes are left beside the parameters.

    Args:
      model: the network.
      free: bytes.
      prefix: tokens that an image's prompts begin with.
      rest: tokens that follow in a prompt, at most.
      limit: tokens of an answer at most.
      images: how many are asked about.
    """
    decoder, dtype = model.config.decoder, jnp.dtype(model.dtype)
    of_slot = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * dtype.itemsize
    slots = max(free, 0) * _CACHES / of_slot
    # A cache is there twice while it grows, and compilers may copy it while it is written.
    row = 2 * (math.ceil(rest / SUFFIX_STEP) * SUFFIX_STEP + places_for(limit))
    images = max(1, min(MAX_IMAGES, images, int(slots / 2 / prefix)))
    return Capacity(_bucket_within(max(1, min(MAX_ROWS, int((slots - images * prefix) / row)))), images)


def places_for(limit: int) -> int:
    """Places of the buffers for answers of at most `limit` tokens."""
    return max(FIRST_ROOM, 1 << (limit - 1).bit_length())


def _bucket_within(count: int) -> int:
    """The largest batch size of at most `count` rows."""
    return max(size for size in range(1, count + 1) if row_bucket(size) == size)


def portions(asked: Sequence[Asked], most: int) -> range:
    """Where batches of at most `most` of each image's regions begin; its step is how many go together."""
    count = max(len(one.rest) for one in asked)
    return range(0, count, math.ceil(count / math.ceil(count / most)))


def groups(regions: Sequence[int], fits: Capacity) -> Iterator[list[int]]:
    """Which images go together, by their numbers of regions: powers of two of images of similar numbers."""
    waiting = sorted(range(len(regions)), key=lambda number: (-regions[number], number))
    while waiting:
        largest = regions[waiting[0]]
        together = [number for number in waiting if 2 * regions[number] > largest or largest <= _FEW_ROWS]
        room = fits.rows // row_bucket(min(largest, fits.rows))
        size = 1 << (min(len(together), room, fits.images).bit_length() - 1)
        yield together[:size]
        waiting = [number for number in waiting if number not in together[:size]]


def answer(network: Network, asked: Sequence[Asked], how: Rules) -> list[list[Answer]]:
    """Answers all that is asked of some images; batches are formed among these images alone."""
    results: list[list[Answer]] = [[] for _ in asked]
    fits = capacity(network, asked, how.limit)
    for group in groups([len(one.rest) for one in asked], fits):
        for part in _answer_group(network, [asked[number] for number in group], how, fits):
            for number, answers in zip(group, part, strict=True):
                results[number] += answers
    return results


def stream(network: Network, asked: Asked, how: Rules) -> Iterator[Answer]:
    """Answers about one image, as soon as a batch of them is done."""
    for [answers] in _answer_group(network, [asked], how, capacity(network, [asked], how.limit)):
        yield from answers


def _answer_group(
    network: Network, asked: Sequence[Asked], how: Rules, fits: Capacity
) -> Iterator[list[list[Answer]]]:
    """Answers in batches of regions: for each batch, those of every image."""
    images = np.stack([one.prepared.pixels for one in asked])
    features, image_tokens = network.run(encode, images)
    ids, length = padded([one.prefix for one in asked], PREFIX_STEP, how.pad_id)
    named = None
    if asked[0].in_prefix:
        count = 1 << (max(one.prepared.regions for one in asked) - 1).bit_length()
        named = stacked([one.prepared.masks for one in asked], 0, count)
    prefix = network.run(prefill, ids, length, image_tokens, features, named)
    starts = portions(asked, fits.rows)
    for start in starts:
        yield _answer_batch(network, asked, how, features, prefix, start, starts.step)


def _answer_batch(
    network: Network,
    asked: Sequence[Asked],
    how: Rules,
    features: Features,
    prefix: Prefix,
    start: int,
    count: int,
) -> list[list[Answer]]:
    """Answers about the `count` regions of each image from number `start` on."""
    width, room = row_bucket(count), FIRST_ROOM
    rests = [one.rest[start : start + count] for one in asked]
    filled = [ids for rest in rests for ids in [*rest, *[[how.pad_id]] * (width - len(rest))]]
    ids, length = padded(filled, SUFFIX_STEP, how.pad_id)
    numbers = np.tile(np.arange(start, start + width, dtype=np.uint32), len(asked))
    places = places_for(how.limit)
    # Which of an image's answers a row makes; -1 for none any more.
    owner = np.stack([np.where(np.arange(width) < len(rest), np.arange(width), -1) for rest in rests])
    given = {"sampler": how.sampler, "limit": np.int32(how.limit), "eos_id": np.int32(how.eos_id)}
    rows = network.run(
        begin,
        prefix,
        ids,
        length,
        features,
        stacked([one.prepared.masks for one in asked], start, width),
        keys=_region_keys(jax.random.key(how.seed), numbers),
        room=room,
        places=places,
        **given,
    )
    answers = [[Answer([], [])] * len(rest) for rest in rests]
    while True:
        rows = network.run(
            decode,
            prefix,
            rows,
            wanted=(owner >= 0).reshape(-1),
            enough=np.int32(smaller(width)),
            steps=np.int32(places if how.stop is None else _STOP_STEPS),
            **given,
        )
        owner = _take_finished(rows, owner, how, answers)
        left = (owner >= 0).sum(axis=1).max()
        if left == 0:
            return answers
        narrower = width
        while left <= smaller(narrower):
            narrower = smaller(narrower)
        full = int(rows.cache.end) == rows.cache.positions.shape[1]
        roomier = min(room * ROOM_GROWTH, places) if full else room
        if (narrower, roomier) != (width, room):
            # Rows that are under way come first, in their order.
            order = np.argsort(owner < 0, axis=1, kind="stable")[:, :narrower]
            owner = np.take_along_axis(owner, order, axis=1)
            flat = (order + width * np.arange(len(asked))[:, None]).reshape(-1)
            rows = resize(rows, flat.astype(np.int32), more_slots=roomier - room)
            width, room = narrower, roomier


def _take_finished(rows: Rows, owner: np.ndarray, how: Rules, answers: list[list[Answer]]) -> np.ndarray:
    """Puts the answers that are done among `answers`; their rows have no owner any more."""
    fetched = jax.device_get((rows.running, rows.length, rows.token_ids, rows.logprobs))
    running, length, token_ids, logprobs = (x.reshape(*owner.shape, *x.shape[1:]) for x in fetched)
    owner = owner.copy()
    for image, row in np.argwhere(owner >= 0):
        done = not running[image, row]
        if not done and how.stop is None:
            continue
        size = int(length[image, row])
        ids = token_ids[image, row, :size].tolist()
        kept = None if how.stop is None else how.stop(ids)
        if done or kept is not None:
            probabilities = logprobs[image, row, :size].tolist()
            answers[image][owner[image, row]] = Answer(ids[:kept], probabilities[:kept])
            owner[image, row] = -1
    return owner


def smaller(width: int) -> int:
    """The batch size that a batch of `width` rows shrinks to next; 0 where it doesn't."""
    return 1 << ((width - 1).bit_length() - 1) if width > _FEW_ROWS else 0


def padded(rows: Sequence[list[int]], step: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids as `(B, T)` int32, `T` the next multiple of `step`, and their true lengths, `(B,)` int32."""
    lengths = np.array([len(ids) for ids in rows], np.int32)
    ids = np.full((len(rows), math.ceil(lengths.max() / step) * step), pad_id, np.int32)
    for row, given in zip(ids, rows, strict=True):
        row[: len(given)] = given
    return ids, lengths


def stacked(masks: Sequence[MaskPyramid], start: int, count: int) -> MaskPyramid:
    """`count` regions of each image from number `start` on, `(P, count, …)`; empty ones at the end."""
    if any(isinstance(image.position, jax.Array) for image in masks):
        return _stacked_on_device(tuple(masks), start, count)

    def part(*images: np.ndarray) -> np.ndarray:
        out = np.zeros((len(images), count, *images[0].shape[1:]), images[0].dtype)
        for target, given in zip(out, images, strict=True):
            some = given[start : start + count]
            target[: len(some)] = some
        return out

    return jax.tree.map(part, *masks)


@partial(jax.jit, static_argnums=(1, 2))
def _stacked_on_device(masks: tuple[MaskPyramid, ...], start: int, count: int) -> MaskPyramid:
    def part(*images: Array) -> Array:
        some = [x[start : start + count] for x in images]
        return jnp.stack([jnp.pad(x, ((0, count - len(x)), (0, 0), (0, 0))) for x in some])

    return jax.tree.map(part, *masks)


_region_keys = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


def windows(prepared: Iterable[Prepared]) -> Iterator[list[Prepared]]:
    """Images that are answered together; what `prepared` raises is raised when those before it are done."""
    window: list[Prepared] = []
    try:
        for one in _ahead(prepared, WINDOW_IMAGES):
            window.append(one)
            regions = sum(each.regions for each in window)
            if len(window) == WINDOW_IMAGES or regions >= WINDOW_REGIONS:
                yield window
                window = []
    except Exception:  # whatever the caller's iterable raises
        if window:
            yield window
        raise
    if window:
        yield window


def _ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The items, of which a thread makes up to `count` before they are asked for."""
    iterator = iter(items)
    pool = ThreadPoolExecutor(1, thread_name_prefix="reading ahead")
    try:
        waiting = deque(pool.submit(next, iterator, None) for _ in range(count))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, iterator, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
