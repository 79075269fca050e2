"""Decoding with caches: an image's prefix once, then the rest of each region's prompt and its answer.

Attention is causal, so all that precedes a prompt's first region token is the same for every region of an
image, and is computed, kept and read once for all of them. Buffers have static sizes; true lengths, limits
and sampling settings are traced, so few programs are compiled. `engine` puts these steps together.

Reference: Juravsky et al., Hydragen, arXiv 2402.05099.
Differs: prefix and suffix come under one softmax, which needs no merging of partial results.
"""

from dataclasses import replace
from functools import partial
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp

from osprey_jax.masks import MaskPyramid
from osprey_jax.models.llama import Cache, init_cache
from osprey_jax.models.osprey import Osprey, VisualTokens, apply
from osprey_jax.typing import Array, ArrayLike, Bool, Float, Int, Params

Features = tuple[Array, ...]
"""The tower's four maps, res2 first, each `(P, Y, X, C)`."""


class Sampler(Protocol):
    """Chooses next tokens; implementations are frozen pytrees whose fields are traced."""

    def __call__(self, logits: Float[Array, "B V"], key: Array) -> Int[Array, " B"]:
        """Ids chosen from float32 logits."""


@flax.struct.dataclass
class Greedy:
    """The most likely token, the first one of equals."""

    def __call__(self, logits: Float[Array, "B V"], key: Array) -> Int[Array, " B"]:
        """See `Sampler`; the key is not used."""
        # `argmax` is a scalar loop on CPU, which takes as long as the head's matmul.
        places = jnp.arange(logits.shape[-1], dtype=jnp.int32)
        likeliest = logits == logits.max(axis=-1, keepdims=True)
        return jnp.where(likeliest, places, places[-1]).min(axis=-1)


@flax.struct.dataclass
class TopP:
    """Draws at a temperature from the most likely tokens that together reach the probability `top_p`.

    Reference: Holtzman et al., The Curious Case of Neural Text Degeneration, arXiv 1904.09751.
    """

    temperature: Float[ArrayLike, ""]
    """Above 0."""
    top_p: Float[ArrayLike, ""]
    """In (0, 1]."""

    def __call__(self, logits: Float[Array, "B V"], key: Array) -> Int[Array, " B"]:
        """See `Sampler`."""
        # From the largest on, so that the smallest temperature can't overflow.
        scaled = (logits - logits.max(axis=-1, keepdims=True)) / self.temperature
        ranked = -jnp.sort(-scaled, axis=-1)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The most likely token has nothing before it, so one token at least is kept.
        kept = (before < self.top_p) | (before == 0) | (self.top_p >= 1)
        least = jnp.where(kept, ranked, jnp.inf).min(axis=-1, keepdims=True)
        # Drawn by id: what is drawn for a token doesn't change where rounding makes two change ranks.
        among = jnp.where(scaled >= least, scaled, -jnp.inf)
        return jax.random.categorical(key, among, axis=-1).astype(jnp.int32)


@flax.struct.dataclass
class Prefix:
    """What the regions of each of `P` images share: the cache after the prompts' common beginning."""

    cache: Cache
    length: Int[Array, " P"]
    """Tokens in it, padding not counted: the position of the next token."""


@flax.struct.dataclass
class Rows:
    """`B` answers under way, in buffers of `M` places; row `b` stands behind prefix `b // (B / P)`."""

    cache: Cache
    """What follows the prefix, of each row its own."""
    token: Int[Array, " B"]
    """The last one chosen, which is not in the cache yet."""
    position: Int[Array, " B"]
    """Of that token in its sequence."""
    keys: Array
    """`(B,)` random keys, of each row its own."""
    running: Bool[Array, " B"]
    token_ids: Int[Array, "B M"]
    logprobs: Float[Array, "B M"]
    """Natural logarithms of the model's probabilities, before temperature and top-p."""
    length: Int[Array, " B"]
    """How many of the places count."""


@partial(jax.jit, static_argnames="model")
def encode(model: Osprey, params: Params, images: Float[Array, "P Y X 3"]) -> tuple[Features, Array]:
    """The tower's four feature maps of preprocessed images, and their image tokens `(P, YX, D)`."""
    features = apply(model, params, Osprey.features, images)
    return features, apply(model, params, Osprey.image_tokens, features)


@partial(jax.jit, static_argnames="model")
def prefill(
    model: Osprey,
    params: Params,
    input_ids: Int[Array, "P T"],
    length: Int[Array, " P"],
    image: Float[Array, "P YX D"],
    features: Features,
    masks: MaskPyramid | None = None,
) -> Prefix:
    """Runs the beginnings of prompts, `length` ids each and then padding, into caches of `T` slots.

    Args:
      model: the network; its dtype is what the cache holds.
      params: its parameters.
      input_ids: an image's places in it, and the region placeholders where `masks` are given.
      length: how many of the ids count.
      image: image tokens.
      features: what the tower makes of the images.
      masks: `(P, R, …)`, the regions that the beginnings name.
    """
    cache = init_cache(model.config.decoder, *input_ids.shape, dtype=model.dtype)
    index = jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None, :]
    if masks is None:
        tokens = VisualTokens(image=image, mask=image[:, :0], position=image[:, :0])
    else:
        mask, position = apply(model, params, Osprey.region_tokens, features, masks)
        tokens = VisualTokens(image=image, mask=mask, position=position)
    _, cache = apply(
        model,
        params,
        Osprey.decode,
        input_ids,
        tokens,
        positions=jnp.broadcast_to(index, input_ids.shape),
        segment_ids=(index < length[:, None]).astype(jnp.int32),
        cache=cache,
        in_order=True,
    )
    return Prefix(cache=cache, length=length)


@partial(jax.jit, static_argnames=("model", "room", "places"))
def begin(
    model: Osprey,
    params: Params,
    prefix: Prefix,
    input_ids: Int[Array, "B T"],
    length: Int[Array, " B"],
    features: Features,
    masks: MaskPyramid,
    *,
    sampler: Sampler,
    keys: Array,
    limit: Int[Array, ""],
    eos_id: Int[Array, ""],
    room: int,
    places: int,
) -> Rows:
    """Runs the rest of each region's prompt behind its image's prefix, and chooses a first token.

    Args:
      model: the network.
      params: its parameters.
      prefix: what precedes; it is only read.
      input_ids: the rest of each prompt, then padding.
      length: how many of the ids count; at least one.
      features: what the tower makes of the images.
      masks: `(P, R, …)` with `P · R = B`: the region that the placeholders of each row stand for.
      sampler: chooses each token.
      keys: `(B,)` random keys.
      limit: tokens to generate at most, at most `places`.
      eos_id: the token that ends an answer, and is kept.
      room: slots of the cache for what is generated; `resize` makes more.
      places: size of the buffers of answers.
    """
    logits, cache = suffixes(model, params, prefix, input_ids, length, features, masks, room=room)
    rows = input_ids.shape[0]
    empty = Rows(
        cache=cache,
        token=jnp.zeros(rows, jnp.int32),
        position=jnp.repeat(prefix.length, rows // prefix.length.shape[0]) + length - 1,
        keys=keys,
        running=jnp.ones(rows, bool),
        token_ids=jnp.zeros((rows, places), jnp.int32),
        logprobs=jnp.zeros((rows, places), jnp.float32),
        length=jnp.zeros(rows, jnp.int32),
    )
    return _choose(empty, logits, sampler=sampler, limit=limit, eos_id=eos_id)


def suffixes(
    model: Osprey,
    params: Params,
    prefix: Prefix,
    input_ids: Int[Array, "B T"],
    length: Int[Array, " B"],
    features: Features,
    masks: MaskPyramid,
    *,
    room: int,
) -> tuple[Float[Array, "B V"], Cache]:
    """Runs the rest of each region's prompt; the arguments are those of `begin`.

    Returns the logits behind each prompt, and caches with `room` more slots.
    """
    rows, width = input_ids.shape
    mask, position = (
        x.reshape(rows, 1, -1) for x in apply(model, params, Osprey.region_tokens, features, masks)
    )
    hidden, cache = extend(
        model,
        params,
        prefix,
        init_cache(model.config.decoder, rows, width + room, dtype=model.dtype),
        input_ids,
        VisualTokens(image=mask[:, :0], mask=mask, position=position),
        start=jnp.repeat(prefix.length, rows // prefix.length.shape[0]),
        count=length,
    )
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)
    return apply(model, params, Osprey.logits, last)[:, 0], cache


@partial(jax.jit, static_argnames="model", donate_argnames="rows")
def decode(
    model: Osprey,
    params: Params,
    prefix: Prefix,
    rows: Rows,
    *,
    sampler: Sampler,
    limit: Int[Array, ""],
    eos_id: Int[Array, ""],
    wanted: Bool[Array, " B"],
    enough: Int[Array, ""],
    steps: Int[Array, ""],
) -> Rows:
    """Goes on token by token while any image has more than `enough` rows running, for at most `steps` steps.

    It also stops where the cache is full. Rows that are not `wanted` stop at once. The other arguments are
    those of `begin`.
    """
    images = prefix.length.shape[0]
    end = jnp.minimum(rows.cache.end + steps, rows.cache.positions.shape[1])

    def going(rows: Rows) -> Array:
        running = rows.running.reshape(images, -1).sum(axis=1)
        return (running.max() > enough) & (rows.cache.end < end)

    def step(rows: Rows) -> Rows:
        nothing = jnp.zeros((rows.token.shape[0], 0, 1), model.dtype)
        hidden, cache = extend(
            model,
            params,
            prefix,
            rows.cache,
            rows.token[:, None],
            # What is generated is text; nothing is spliced into it.
            VisualTokens(image=nothing, mask=nothing, position=nothing),
            start=rows.position,
            count=rows.running.astype(jnp.int32),
        )
        logits = apply(model, params, Osprey.logits, hidden)[:, 0]
        return _choose(replace(rows, cache=cache), logits, sampler=sampler, limit=limit, eos_id=eos_id)

    return jax.lax.while_loop(going, step, replace(rows, running=rows.running & wanted))


@partial(jax.jit, static_argnames="more_slots")
def resize(rows: Rows, order: Int[Array, " B"], *, more_slots: int) -> Rows:
    """The rows that `order` names, with `more_slots` slots of cache behind those that there are."""
    taken = jax.tree.map(lambda x: x[order] if x.ndim else x, rows)

    def roomier(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, more_slots if number == axis else 0) for number in range(x.ndim)])

    cache = replace(
        taken.cache,
        keys=tuple(roomier(x, 2) for x in taken.cache.keys),
        values=tuple(roomier(x, 2) for x in taken.cache.values),
        positions=roomier(taken.cache.positions, 1),
        segment_ids=roomier(taken.cache.segment_ids, 1),
    )
    return replace(taken, cache=cache)


def extend(
    model: Osprey,
    params: Params,
    prefix: Prefix,
    cache: Cache,
    input_ids: Int[Array, "B T"],
    tokens: VisualTokens,
    *,
    start: Int[Array, " B"],
    count: Int[Array, " B"],
) -> tuple[Float[Array, "B T D"], Cache]:
    """Appends each row's first `count` ids, at positions from `start` on."""
    index = jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None, :]
    return apply(
        model,
        params,
        Osprey.decode,
        input_ids,
        tokens,
        positions=start[:, None] + index,
        segment_ids=(index < count[:, None]).astype(jnp.int32),
        prefix=prefix.cache,
        cache=cache,
    )


def _choose(
    rows: Rows, logits: Float[Array, "B V"], *, sampler: Sampler, limit: Array, eos_id: Array
) -> Rows:
    """Appends a token to each running row's answer and stops the rows that are at their end."""
    keys = jax.vmap(jax.random.fold_in)(rows.keys, rows.length)
    token = jax.vmap(lambda row, key: sampler(row[None], key)[0])(logits, keys)
    logprob = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)
    # Behind the buffer, so dropped, for rows that are not running.
    place = jnp.where(rows.running, rows.length, rows.token_ids.shape[1])
    index = jnp.arange(token.shape[0])
    length = rows.length + rows.running.astype(jnp.int32)
    return replace(
        rows,
        token=token,
        position=rows.position + 1,
        running=rows.running & (token != eos_id) & (length < limit),
        token_ids=rows.token_ids.at[index, place].set(token, mode="drop"),
        logprobs=rows.logprobs.at[index, place].set(logprob, mode="drop"),
        length=length,
    )


@partial(jax.jit, static_argnames="model")
def mask_tokens(
    model: Osprey, params: Params, images: Float[Array, "P Y X 3"], masks: MaskPyramid
) -> Float[Array, "P R D"]:
    """The regions' mask tokens."""
    features = apply(model, params, Osprey.features, images)
    return apply(model, params, Osprey.region_tokens, features, masks)[0]


@partial(jax.jit, static_argnames="model")
def logits(
    model: Osprey,
    params: Params,
    images: Float[Array, "P Y X 3"],
    masks: MaskPyramid,
    input_ids: Int[Array, "P T"],
) -> Float[Array, "P T V"]:
    """Next-token logits over whole sequences."""
    return apply(model, params, Osprey.__call__, images, masks, input_ids)
