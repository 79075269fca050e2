"""Recognising regions: the decoder walks down a vocabulary's trie to one of its labels, many regions at once.

At a branching the next token is the likeliest of those that lead on; the tokens up to the next branching are
forced and run together with it. So a region costs as many runs of the decoder as its label has branchings on
its way, however many labels there are. The probabilities of the choices, multiplied, are a distribution over
all labels.

Differs from beam search: one way is followed. `benchmarks.calibration` tells how good its probabilities are.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from osprey_jax import engine
from osprey_jax.engine import Asked, Network
from osprey_jax.generate import Features, Prefix, encode, extend, prefill, suffixes
from osprey_jax.masks import MaskPyramid
from osprey_jax.models.llama import Cache
from osprey_jax.models.osprey import Osprey, VisualTokens, apply
from osprey_jax.typing import Array, Bool, Float, Int, Params
from osprey_jax.vocabulary import Trie, Vocabulary


class Recognition(NamedTuple):
    """A region's label and how sure it is."""

    label: str | None
    """None where the limits that were asked for are not reached."""
    probability: float
    """Of the choices that led to the label, each among what the vocabulary allows, multiplied.

    So all labels' probabilities sum to one. How sure the model is provided that a label fits at all: where
    none does, one of them may come out near 1 all the same.
    """
    logprob: float
    """Natural logarithm of the probability that the model answers just this where it may answer anything.

    Below that of `probability` by what goes to answers that are not in the vocabulary: low where no label
    fits, or where the model would spell it in another way.
    """


@flax.struct.dataclass
class Walk:
    """Where `B` rows are in the trie, and what has led them there; behind prefixes as `generate.Rows`."""

    cache: Cache
    """What follows the prefix, of each row its own."""
    position: Int[Array, " B"]
    """Of the token in its sequence that follows those in the cache."""
    node: Int[Array, " B"]
    done: Int[Array, " B"]
    """Tokens of the node that have been run."""
    running: Bool[Array, " B"]
    """Whether there is more to run."""
    log_probability: Float[Array, " B"]
    """Of the choices, each among the tokens that lead on."""
    logprob: Float[Array, " B"]
    """Of the tokens, each among all that there are."""


def recognize(
    network: Network,
    asked: Sequence[Asked],
    vocabulary: Vocabulary,
    *,
    threshold: float = 0.0,
    min_logprob: float = -math.inf,
) -> list[list[Recognition]]:
    """Labels the regions of some images; batches are formed among these images alone.

    Args:
      network: the model.
      asked: images and what is asked of their regions.
      vocabulary: the labels.
      threshold: a region of a lower `probability` gets no label.
      min_logprob: nor does one of a lower `logprob`.
    """
    if not isinstance(threshold, Real) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a probability, got {threshold!r}")
    if not isinstance(min_logprob, Real) or not min_logprob <= 0:
        raise ValueError(f"min_logprob must be the logarithm of a probability, got {min_logprob!r}")

    def named(node: int, log_probability: float, logprob: float) -> Recognition:
        # Sums of rounded logarithms may end above 0.
        probability = math.exp(min(log_probability, 0.0))
        sure = probability >= threshold and logprob >= min_logprob
        label = vocabulary.labels[vocabulary.label_of[node]] if sure else None
        return Recognition(label, probability, min(logprob, 0.0))

    results: list[list[Recognition]] = [[] for _ in asked]
    fits = engine.capacity(network, asked, vocabulary.room)
    for group in engine.groups([len(one.rest) for one in asked], fits):
        for part in _group(network, [asked[number] for number in group], vocabulary, fits):
            for number, ends in zip(group, part, strict=True):
                results[number] += [named(*end) for end in ends]
    return results


End = tuple[int, float, float]
"""A node and what has led there: `Walk.log_probability` and `Walk.logprob`."""


def _group(
    network: Network, asked: Sequence[Asked], vocabulary: Vocabulary, fits: engine.Capacity
) -> Iterator[list[list[End]]]:
    """Where walks end, in batches of regions: for each batch, those of every image."""
    features, image_tokens = network.run(encode, np.stack([one.prepared.pixels for one in asked]))
    ids, length = engine.padded([one.prefix for one in asked], engine.PREFIX_STEP, vocabulary.pad_id)
    prefix = network.run(prefill, ids, length, image_tokens, features)
    starts = engine.portions(asked, fits.rows)
    width = engine.row_bucket(starts.step)
    for first in starts:
        rests = [one.rest[first : first + starts.step] for one in asked]
        filled = [ids for rest in rests for ids in [*rest, *[[vocabulary.pad_id]] * (width - len(rest))]]
        ids, length = engine.padded(filled, engine.SUFFIX_STEP, vocabulary.pad_id)
        number = np.arange(width)
        owner = np.stack([np.where(number < len(rest), number, -1) for rest in rests])
        walk = network.run(
            start,
            prefix,
            ids,
            length,
            features,
            engine.stacked([one.prepared.masks for one in asked], first, width),
            vocabulary.trie,
            wanted=(owner >= 0).reshape(-1),
            width=vocabulary.widths[0],
            room=vocabulary.room,
        )
        yield _finish(network, prefix, walk, vocabulary, owner)


def _finish(
    network: Network, prefix: Prefix, walk: Walk, vocabulary: Vocabulary, owner: np.ndarray
) -> list[list[End]]:
    """Walks on in ever fewer rows; `owner` says which region of its image a row is, -1 for none any more."""
    ends: list[dict[int, End]] = [{} for _ in owner]
    while True:
        width = owner.shape[1]
        walk = network.run(
            descend,
            prefix,
            walk,
            vocabulary.trie,
            enough=np.int32(engine.smaller(width)),
            width=vocabulary.widths[1],
            step=vocabulary.step,
        )
        fetched = jax.device_get((walk.running, walk.node, walk.log_probability, walk.logprob))
        running, *end = (x.reshape(owner.shape) for x in fetched)
        for image, row in np.argwhere((owner >= 0) & ~running):
            node, log_probability, logprob = (x[image, row].item() for x in end)
            ends[image][owner[image, row]] = node, log_probability, logprob
        owner = np.where(running, owner, -1)
        left = running.sum(axis=1).max()
        if left == 0:
            return [[found[number] for number in sorted(found)] for found in ends]
        narrower = width
        while left <= engine.smaller(narrower):
            narrower = engine.smaller(narrower)
        order = np.argsort(~running, axis=1, kind="stable")[:, :narrower]
        owner = np.take_along_axis(owner, order, axis=1)
        flat = (order + width * np.arange(len(order))[:, None]).reshape(-1)
        walk = take(walk, flat.astype(np.int32))


@partial(jax.jit, static_argnames=("model", "width", "room"))
def start(
    model: Osprey,
    params: Params,
    prefix: Prefix,
    input_ids: Int[Array, "B T"],
    length: Int[Array, " B"],
    features: Features,
    masks: MaskPyramid,
    trie: Trie,
    *,
    wanted: Bool[Array, " B"],
    width: int,
    room: int,
) -> Walk:
    """Runs the rest of each region's prompt behind its image's prefix, and makes the first choice.

    The first arguments are those of `generate.begin`.

    Args:
      model: the network.
      params: its parameters.
      prefix: what precedes.
      input_ids: the rest of each prompt.
      length: how many of the ids count.
      features: of the images.
      masks: of the regions.
      trie: of the vocabulary.
      wanted: rows that walk.
      width: see `Vocabulary`.
      room: slots of the cache for the tokens of labels.
    """
    logits, cache = suffixes(model, params, prefix, input_ids, length, features, masks, room=room)
    rows = input_ids.shape[0]
    none = jnp.zeros(rows, jnp.int32)
    walk = Walk(
        cache=cache,
        position=jnp.repeat(prefix.length, rows // prefix.length.shape[0]) + length,
        node=none,
        done=none,
        running=wanted,
        log_probability=none.astype(jnp.float32),
        logprob=none.astype(jnp.float32),
    )
    return _choose(walk, trie, logits, wanted, width=width)


@partial(jax.jit, static_argnames=("model", "width", "step"), donate_argnames="walk")
def descend(
    model: Osprey,
    params: Params,
    prefix: Prefix,
    walk: Walk,
    trie: Trie,
    *,
    enough: Int[Array, ""],
    width: int,
    step: int,
) -> Walk:
    """Walks on as long as any image has more than `enough` rows running, `step` tokens at a time."""
    images = prefix.length.shape[0]

    def going(walk: Walk) -> Array:
        return walk.running.reshape(images, -1).sum(axis=1).max() > enough

    def run(walk: Walk) -> Walk:
        place = walk.done[:, None] + jnp.arange(step, dtype=jnp.int32)[None, :]
        count = jnp.where(walk.running, jnp.minimum(_to_run(walk, trie) - walk.done, step), 0)
        nothing = jnp.zeros((place.shape[0], 0, 1), model.dtype)
        hidden, cache = extend(
            model,
            params,
            prefix,
            walk.cache,
            _tokens(walk, trie, place),
            # Labels are text; nothing is spliced into it.
            VisualTokens(image=nothing, mask=nothing, position=nothing),
            start=walk.position,
            count=count,
        )
        logits = apply(model, params, Osprey.logits, hidden)
        following = jnp.take_along_axis(logits, _tokens(walk, trie, place + 1)[:, :, None], axis=2)[:, :, 0]
        logprob = following - jax.nn.logsumexp(logits, axis=2)
        forced = (place < (walk.done + count)[:, None]) & (place + 1 < trie.num_tokens[walk.node][:, None])
        walk = replace(
            walk,
            cache=cache,
            position=walk.position + count,
            done=walk.done + count,
            logprob=walk.logprob + jnp.where(forced, logprob, 0).sum(axis=1),
        )
        through = walk.running & (walk.done == _to_run(walk, trie))
        at_choice = through & (trie.num_children[walk.node] > 0)
        last = jnp.take_along_axis(logits, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        return _choose(replace(walk, running=walk.running & ~through), trie, last, at_choice, width=width)

    return jax.lax.while_loop(going, run, walk)


@jax.jit
def take(walk: Walk, order: Int[Array, " B"]) -> Walk:
    """The rows that `order` names."""
    return jax.tree.map(lambda x: x[order] if x.ndim else x, walk)


def _to_run(walk: Walk, trie: Trie) -> Int[Array, " B"]:
    """How many of the nodes' tokens have to be run: all, but not a label's last, which nothing follows."""
    return trie.num_tokens[walk.node] - (trie.num_children[walk.node] == 0).astype(jnp.int32)


def _tokens(walk: Walk, trie: Trie, place: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The nodes' tokens by their places; meaningless ones behind the last."""
    return jnp.take(trie.tokens, trie.start[walk.node][:, None] + place, mode="clip")


def _choose(
    walk: Walk, trie: Trie, logits: Float[Array, "B V"], rows: Bool[Array, " B"], *, width: int
) -> Walk:
    """Takes these rows to the likeliest of their children, of which there are at most `width`."""
    number = jnp.arange(width, dtype=jnp.int32)[None, :]
    child = trie.children[walk.node][:, None] + number
    first_token = jnp.take(trie.tokens, jnp.take(trie.start, child, mode="clip"))
    offered = jnp.take_along_axis(logits, first_token, axis=1)
    offered = jnp.where(number < trie.num_children[walk.node][:, None], offered, -jnp.inf)
    best = jnp.argmax(offered, axis=1)[:, None]
    chosen = jnp.take_along_axis(offered, best, axis=1)[:, 0]
    log_probability, logprob = (
        jnp.where(rows, chosen - jax.nn.logsumexp(among, axis=1), 0) for among in (offered, logits)
    )
    walk = replace(
        walk,
        node=jnp.where(rows, jnp.take_along_axis(child, best, axis=1)[:, 0], walk.node),
        done=jnp.where(rows, 0, walk.done),
        log_probability=walk.log_probability + log_probability,
        logprob=walk.logprob + logprob,
    )
    return replace(walk, running=jnp.where(rows, _to_run(walk, trie) > 0, walk.running))
