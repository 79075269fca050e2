"""The decoder's positions, segments and cache, against torch runs of each conversation alone.

Reference: `transformers`' Llama, one unpadded sequence at a time, which knows none of the three.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from osprey_jax.models.layers import unstack
from osprey_jax.models.llama import Cache, Llama, init_cache
from osprey_jax.typing import Array
from tests.parity.bridge import Pair, assert_steps_agree

Decode = Callable[..., tuple[Array, Cache | None]]
SLOTS = 24


def alone(pair: Pair, *pieces: np.ndarray) -> np.ndarray:
    """Torch's logits `(T, V)` of the concatenated ids."""
    ids = torch.from_numpy(np.concatenate(pieces))[None]
    with torch.no_grad():
        return pair.reference.llama(input_ids=ids, use_cache=False).logits[0].numpy()


def text(pair: Pair, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, pair.config.decoder.vocab_size, length)


@pytest.fixture(scope="module")
def decode(grouped: Pair) -> Decode:
    """`decode(ids, positions, segment_ids, prefix_segment_ids=None)` to logits and cache.

    With `cache` and, for the decoder's `prefix`, `shared`.
    """
    decoder = Llama(grouped.config.decoder, scan_layers=False)
    variables = {"params": unstack(dict(grouped.params["decoder"]), "layers")}

    @jax.jit
    def run(
        ids: Array,
        positions: Array,
        segments: Array,
        prefix: Array | None,
        cache: Cache | None,
        shared: Cache | None,
    ) -> tuple:
        hidden, cache = decoder.apply(
            variables,
            decoder.apply(variables, ids, method=Llama.embed),
            positions=positions,
            segment_ids=segments,
            prefix_segment_ids=prefix,
            prefix=shared,
            cache=cache,
        )
        return decoder.apply(variables, hidden, method=Llama.logits), cache

    def on_lists(
        ids: object,
        positions: object,
        segments: object,
        prefix: object = None,
        *,
        cache: Cache | None = None,
        shared: Cache | None = None,
    ) -> tuple[Array, Cache | None]:
        arrays = [
            None if x is None else jnp.asarray(np.array(x), jnp.int32)
            for x in (ids, positions, segments, prefix)
        ]
        return run(*arrays, cache, shared)

    return on_lists


def empty_cache(pair: Pair, batch: int = 1) -> Cache:
    return init_cache(pair.config.decoder, batch, SLOTS, dtype=jnp.dtype("float32"))


def test_prefill_then_single_tokens_equal_the_whole_sequence(grouped: Pair, decode: Decode) -> None:
    rows = [text(grouped, 14, 1), text(grouped, 14, 2)]
    ids = np.stack(rows)
    prefilled, cache = decode(ids[:, :9], [range(9)] * 2, np.ones((2, 9)), cache=empty_cache(grouped, 2))
    logits = [prefilled]
    for step in range(9, 14):
        next_logits, cache = decode(ids[:, step : step + 1], [[step]] * 2, np.ones((2, 1)), cache=cache)
        logits.append(next_logits)
    found = np.concatenate(logits, axis=1)
    for row in range(2):
        assert_steps_agree({"logits": found[row]}, {"logits": alone(grouped, rows[row])})
    assert int(cache.end) == 14
    assert np.asarray(cache.segment_ids).tolist() == [[1] * 14 + [0] * (SLOTS - 14)] * 2


def test_padding_anywhere_changes_nothing(grouped: Pair, decode: Decode) -> None:
    """Before, between and after the tokens, whatever its ids and positions."""
    ids = text(grouped, 8, 3)
    rows = [
        [7, 7, 7, *ids],
        [*ids[:3], 9, 9, *ids[3:], 60],
        [*ids, 1, 2, 3],
    ]
    positions = [
        [0, 0, 0, *range(8)],
        [*range(3), 0, 5, *range(3, 8), 2],
        [*range(8), 0, 3, 7],
    ]
    segments = np.array([[0] * 3 + [1] * 8, [1] * 3 + [0] * 2 + [1] * 5 + [0], [1] * 8 + [0] * 3])
    found, _ = decode(rows, positions, segments)
    expected = alone(grouped, ids)
    for row, segment in zip(np.asarray(found), segments, strict=True):
        assert_steps_agree({"logits": row[segment == 1]}, {"logits": expected})
    assert np.isfinite(found).all()


def test_padding_in_the_cache_changes_nothing(grouped: Pair, decode: Decode) -> None:
    """Prompts of two lengths, padded on the right to one buffer, then decoded together."""
    prompts, answers = [text(grouped, 7, 4), text(grouped, 4, 5)], [text(grouped, 3, 6), text(grouped, 3, 7)]
    ids = [prompts[0], [*prompts[1], 9, 9, 9]]
    segments = [[1] * 7, [1] * 4 + [0] * 3]
    _, cache = decode(ids, [range(7)] * 2, segments, cache=empty_cache(grouped, 2))
    found, _ = decode(answers, [[7, 8, 9], [4, 5, 6]], np.ones((2, 3)), cache=cache)
    for row in range(2):
        expected = alone(grouped, prompts[row], answers[row])[-3:]
        assert_steps_agree({"logits": found[row]}, {"logits": expected})


def test_packed_sequences_equal_each_alone(grouped: Pair, decode: Decode) -> None:
    """Also interleaved: a token's place in the buffer means nothing."""
    first, second = text(grouped, 6, 8), text(grouped, 5, 9)
    ids = np.concatenate([first, second])
    positions, segments = np.array([*range(6), *range(5)]), np.array([1] * 6 + [2] * 5)
    order = np.random.default_rng(0).permutation(11)
    found, _ = decode([ids, ids[order]], [positions, positions[order]], [segments, segments[order]])
    unshuffled = np.empty_like(found[1])
    unshuffled[order] = found[1]
    for row in (found[0], unshuffled):
        assert_steps_agree(
            {"first": row[:6], "second": row[6:]},
            {"first": alone(grouped, first), "second": alone(grouped, second)},
        )


def test_conversations_behind_one_prefix_equal_each_alone_behind_it(grouped: Pair, decode: Decode) -> None:
    prefix, first, second = text(grouped, 6, 10), text(grouped, 5, 11), text(grouped, 4, 12)
    found, _ = decode(
        [[*prefix, *first, *second]],
        [[*range(6), *range(6, 11), *range(6, 10)]],
        [[1] * 6 + [2] * 5 + [3] * 4],
        [[0] * 6 + [1] * 9],
    )
    assert_steps_agree(
        {"prefix": found[0, :6], "first": found[0, 6:11], "second": found[0, 11:]},
        {
            "prefix": alone(grouped, prefix),
            "first": alone(grouped, prefix, first)[6:],
            "second": alone(grouped, prefix, second)[6:],
        },
    )


def test_a_cached_prefix_serves_several_conversations(grouped: Pair, decode: Decode) -> None:
    """Prefix, then two questions, then one token of each answer, all in one cache."""
    prefix, first, second = text(grouped, 6, 10), text(grouped, 4, 11), text(grouped, 3, 12)
    _, cache = decode([prefix], [range(6)], np.ones((1, 6)), cache=empty_cache(grouped))
    asked = [[*first[:-1], *second[:-1]]], [[6, 7, 8, 6, 7]], [[2, 2, 2, 3, 3]], np.ones((1, 5))
    _, cache = decode(*asked, cache=cache)
    found, _ = decode([[first[-1], second[-1]]], [[9, 8]], [[2, 3]], np.ones((1, 2)), cache=cache)
    assert_steps_agree(
        {"first": found[0, 0], "second": found[0, 1]},
        {"first": alone(grouped, prefix, first)[-1], "second": alone(grouped, prefix, second)[-1]},
    )


def test_rows_that_share_a_read_only_prefix_equal_each_alone_behind_it(grouped: Pair, decode: Decode) -> None:
    """Two prefixes of different lengths, two rows each; then one more token through the rows' own cache."""
    prefixes = [text(grouped, 6, 10), text(grouped, 4, 11)]
    rows = [text(grouped, 4, seed) for seed in range(20, 24)]
    padded = [prefixes[0], [*prefixes[1], 9, 9]]
    _, shared = decode(padded, [range(6)] * 2, [[1] * 6, [1] * 4 + [0] * 2], cache=empty_cache(grouped, 2))
    starts = np.array([6, 6, 4, 4])[:, None]
    own = empty_cache(grouped, 4)
    asked = [row[:3] for row in rows], starts + np.arange(3), np.ones((4, 3))
    found, own = decode(*asked, cache=own, shared=shared)
    last, _ = decode([row[3:] for row in rows], starts + 3, np.ones((4, 1)), cache=own, shared=shared)
    for row in range(4):
        expected = alone(grouped, prefixes[row // 2], rows[row])[-4:]
        assert_steps_agree({"logits": np.concatenate([found[row], last[row]])}, {"logits": expected})


def test_without_a_prefix_segment_the_prefix_is_not_seen(grouped: Pair, decode: Decode) -> None:
    """What makes the tests above able to fail."""
    prefix, first = text(grouped, 6, 10), text(grouped, 5, 11)
    found, _ = decode([[*prefix, *first]], [[*range(6), *range(5)]], [[1] * 6 + [2] * 5], np.zeros((1, 11)))
    assert_steps_agree({"first": found[0, 6:]}, {"first": alone(grouped, first)})
