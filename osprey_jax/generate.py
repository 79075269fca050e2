"""Decoding with a cache: an image's prefix once, then each region's rest of the prompt and its answer.

Attention is causal, so all that precedes a prompt's first region token is the same for every region of an
image. Buffers have static sizes; true lengths, limits and sampling settings are traced, so few programs are
compiled.
"""

from functools import partial
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp

from osprey_jax.models.llama import Cache, init_cache
from osprey_jax.models.osprey import Osprey, VisualTokens, apply
from osprey_jax.typing import Array, ArrayLike, Float, Int, Params


class Sampler(Protocol):
    """Chooses next tokens; implementations are frozen pytrees whose fields are traced."""

    def __call__(self, logits: Float[Array, "B V"], key: Array) -> Int[Array, " B"]:
        """Ids chosen from float32 logits."""


@flax.struct.dataclass
class Greedy:
    """The most likely token, the first one of equals."""

    def __call__(self, logits: Float[Array, "B V"], key: Array) -> Int[Array, " B"]:
        """See `Sampler`; the key is not used."""
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


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
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        # From the largest on, so that the smallest temperature can't overflow.
        ranked = (ranked - ranked[:, :1]) / self.temperature
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The most likely token has nothing before it, so one token at least is kept.
        ranked = jnp.where((before < self.top_p) | (before == 0), ranked, -jnp.inf)
        rank = jax.random.categorical(key, ranked, axis=-1)
        return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


@flax.struct.dataclass
class Prefix:
    """What is shared by all regions of an image: the cache after the prompt's common beginning."""

    cache: Cache
    length: Int[Array, ""]
    """Tokens in it, padding not counted: the position of the next token."""


@flax.struct.dataclass
class Answer:
    """One region's answer in a buffer of `M` places, of which the first `length` count."""

    token_ids: Int[Array, " M"]
    logprobs: Float[Array, " M"]
    """Natural logarithms of the model's probabilities, before temperature and top-p."""
    length: Int[Array, ""]


@partial(jax.jit, static_argnames="model")
def prefill(
    model: Osprey, params: Params, input_ids: Int[Array, "1 T"], length: Int[Array, ""], tokens: VisualTokens
) -> Prefix:
    """Runs a prompt's beginning, `length` ids and then padding, into a cache of `T` slots."""
    cache = init_cache(model.config.decoder, 1, input_ids.shape[1], dtype=model.dtype)
    index = jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None, :]
    segment_ids = (index < length).astype(jnp.int32)
    _, cache = apply(
        model, params, Osprey.decode, input_ids, tokens, positions=index, segment_ids=segment_ids, cache=cache
    )
    return Prefix(cache=cache, length=length)


@partial(jax.jit, static_argnames=("model", "room"))
def answer(
    model: Osprey,
    params: Params,
    prefix: Prefix,
    input_ids: Int[Array, "1 T"],
    length: Int[Array, ""],
    tokens: VisualTokens,
    *,
    region: Int[Array, ""],
    sampler: Sampler,
    key: Array,
    limit: Int[Array, ""],
    eos_id: Int[Array, ""],
    room: int,
) -> Answer:
    """Runs the rest of a prompt for one region, then decodes until `eos_id`, which is kept, or a limit.

    Args:
      model: the network; its dtype is what the cache holds.
      params: its parameters.
      prefix: what precedes; it is only read.
      input_ids: the rest of the prompt, then padding.
      length: how many of them count; at least one.
      tokens: visual tokens of all regions.
      region: which one the placeholders in `input_ids` stand for.
      sampler: chooses each token.
      key: randomness of this region's sampling.
      limit: tokens to generate at most, at most `room`.
      eos_id: the token that ends an answer.
      room: size of the result's buffer.
    """
    own = VisualTokens(
        image=tokens.image,
        mask=jax.lax.dynamic_slice_in_dim(tokens.mask, region, 1, axis=1),
        position=jax.lax.dynamic_slice_in_dim(tokens.position, region, 1, axis=1),
    )
    # Later tokens are text; their step splices nothing.
    nothing = jax.tree.map(lambda x: x[:, :0], own)

    def extend(
        cache: Cache, used: Array, ids: Array, count: Array, tokens: VisualTokens
    ) -> tuple[Float[Array, " V"], Cache]:
        """Appends `count` tokens behind the `used` ones; the logits are those after the last of them."""
        index = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
        hidden, cache = apply(
            model,
            params,
            Osprey.decode,
            ids,
            tokens,
            positions=prefix.length + used + index,
            segment_ids=(index < count).astype(jnp.int32),
            prefix=prefix.cache,
            cache=cache,
        )
        last = jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)
        return apply(model, params, Osprey.logits, last)[0, 0], cache

    def choose(logits: Array, out: Answer) -> tuple[Array, Answer]:
        place = out.length
        token = sampler(logits[None], jax.random.fold_in(key, place))[0]
        return token, Answer(
            token_ids=out.token_ids.at[place].set(token),
            logprobs=out.logprobs.at[place].set(jax.nn.log_softmax(logits)[token]),
            length=place + 1,
        )

    def running(state: tuple) -> Array:
        token, out, _ = state
        return (out.length < limit) & (token != eos_id)

    def decode(state: tuple) -> tuple:
        token, out, cache = state
        used, one = length + out.length - 1, jnp.ones((), jnp.int32)
        logits, cache = extend(cache, used, token[None, None], one, nothing)
        return (*choose(logits, out), cache)

    zero = jnp.zeros((), jnp.int32)
    cache = init_cache(model.config.decoder, 1, input_ids.shape[1] + room, dtype=model.dtype)
    logits, cache = extend(cache, zero, input_ids, length, own)
    empty = Answer(token_ids=jnp.zeros(room, jnp.int32), logprobs=jnp.zeros(room, jnp.float32), length=zero)
    return jax.lax.while_loop(running, decode, (*choose(logits, empty), cache))[1]
