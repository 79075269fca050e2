"""Packed sequences against literals, and against the same ones alone, through the model."""

import itertools

import jax
import numpy as np
import pytest

from data_pipelines.packing import Bucket, behind_one_prefix, collate, side_by_side
from data_pipelines.records import Record, Turn
from data_pipelines.transforms import Example, Tokens, encode
from osprey_jax import train_step
from osprey_jax.batch import Batch
from osprey_jax.config import DecoderConfig, ExtractorConfig, OspreyConfig, VisionConfig
from osprey_jax.masks import encode_rle
from osprey_jax.models.osprey import Osprey, init_params
from osprey_jax.prompt import Tokenizer

MASK, POS, IMAGE = 11, 12, -200
QUICKLY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Compiling takes longer than running here."""


def sequence(ids: list[int], labelled: set[int]) -> Tokens:
    index, labels = np.arange(len(ids), dtype=np.int32), np.full(len(ids), -100, np.int32)
    labels[list(labelled)] = np.array(ids)[list(labelled)]
    return Tokens(
        np.array(ids, np.int32),
        labels,
        (labels != -100) / np.float32(len(labelled)),
        index,
        np.ones_like(index),
        np.zeros_like(index),
    )


FIRST = sequence([1, IMAGE, IMAGE, 3, 4, MASK, POS, 8, 2], {7, 8})
SECOND = sequence([1, IMAGE, IMAGE, 3, 4, MASK, POS, 9, 8, 2], {7, 8, 9})
THIRD = sequence([1, IMAGE, IMAGE, 3, 5, 2], {5})


def test_what_sequences_share_is_kept_once_up_to_their_regions() -> None:
    packed = behind_one_prefix([FIRST, SECOND], region_ids=(MASK, POS))
    assert packed.input_ids.tolist() == [1, IMAGE, IMAGE, 3, 4, MASK, POS, 8, 2, MASK, POS, 9, 8, 2]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8, 9]
    assert packed.segment_ids.tolist() == [1] * 5 + [2] * 4 + [3] * 5
    assert packed.prefix_segment_ids.tolist() == [0] * 5 + [1] * 9
    assert packed.labels.tolist() == [-100] * 7 + [8, 2] + [-100] * 2 + [9, 8, 2]
    np.testing.assert_allclose(packed.loss_weights, [0] * 7 + [0.5] * 2 + [0] * 2 + [1 / 3] * 3, rtol=1e-6)


def test_a_prefix_ends_where_one_of_three_differs() -> None:
    packed = behind_one_prefix([FIRST, SECOND, THIRD], region_ids=(MASK, POS))
    assert packed.segment_ids.tolist() == [1] * 4 + [2] * 5 + [3] * 6 + [4] * 2
    assert packed.input_ids[-2:].tolist() == [5, 2]


def test_the_token_that_predicts_a_first_label_is_not_part_of_the_prefix() -> None:
    captions = [sequence([1, IMAGE, IMAGE, 8, 9], {3, 4}), sequence([1, IMAGE, IMAGE, 8, 7], {3, 4})]
    packed = behind_one_prefix(captions, region_ids=(MASK, POS))
    assert packed.segment_ids.tolist() == [1, 1, 2, 2, 2, 3, 3, 3]
    assert packed.labels.tolist() == [-100, -100, -100, 8, 9, -100, 8, 7]


def test_sequences_side_by_side_keep_their_positions_and_see_none_of_each_other() -> None:
    shared = behind_one_prefix([FIRST, THIRD], region_ids=(MASK, POS))
    packed = side_by_side([SECOND, shared, THIRD])
    lengths = [10, 4, 5, 2, 6]
    assert packed.segment_ids.tolist() == list(
        itertools.chain(*([number] * length for number, length in enumerate(lengths, 1)))
    )
    assert packed.prefix_segment_ids.tolist() == [0] * 14 + [2] * 7 + [0] * 6
    assert packed.positions.tolist() == [*range(10), *range(9), 4, 5, *range(6)]


def records(rng: np.random.Generator) -> list[Record]:
    """Three conversations about one image, one about another, one about none, one with another opening."""
    pixels = [rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(3)]
    masks = [encode_rle(rng.random((32, 32)) < 0.4) for _ in range(6)]
    ask, both = "What is <mask><pos>", "is <mask><pos> <mask><pos> blue"
    red, blue = "red car", "blue"
    look, what = "<image>\n", "<image>\nWhat car "
    return [
        Record("a", pixels[0], tuple(masks[:2]), (Turn(ask, red, (0,)), Turn(ask, blue, (1,))), look),
        Record("b", pixels[0], tuple(masks[2:4]), (Turn(both, blue, (1, 0)),), look),
        Record("c", pixels[0], (), (Turn("What is car", red), Turn("is blue", "red")), look),
        Record("d", pixels[1], tuple(masks[4:5]), (Turn("is red", blue), Turn(ask, red, (0,))), what),
        Record("e", None, (), (Turn("What is red", "blue car"),)),
        Record("f", pixels[2], tuple(masks[3:]), (Turn(both, red, (2, 1)), Turn(ask, red, (0,))), look),
    ]


def losses(model: Osprey, params: object, batch: Batch) -> dict[tuple[int, ...], float]:
    """Each labelled token's cross-entropy, by row and place."""
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (batch.images, batch.masks))
    logits = jax.jit(model.apply, compiler_options=QUICKLY)(
        {"params": params},
        *flat,
        batch.input_ids,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        prefix_segment_ids=batch.prefix_segment_ids,
    )
    logits = np.asarray(logits, np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return {
        (row, place): -float(log_probabilities[row, place - 1, batch.labels[row, place]])
        for row, place in np.argwhere(batch.labels != -100).tolist()
    }


def test_packed_conversations_have_the_losses_of_separate_ones_term_by_term(
    tokenizer: Tokenizer,
) -> None:
    config = OspreyConfig(
        vision=VisionConfig(image_size=32, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
        extractor=ExtractorConfig(dim=16, position_size=4),
        decoder=DecoderConfig(
            vocab_size=11, dim=32, ffn_dim=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16
        ),
        mask_token_id=11,
        position_token_id=12,
    )
    rng = np.random.default_rng(0)
    settings = {"rng": rng, "length": 99, "regions": 9, "system": "Sys"}
    alone = [encode(record, tokenizer, config, **settings) for record in records(rng)]
    a, b, c, d, e, f = alone
    tokens = behind_one_prefix([one.tokens for one in (a, b, c)], region_ids=(MASK, POS))
    masks = jax.tree.map(lambda *x: np.concatenate(x), *(one.masks for one in (a, b, c)))
    assert tokens.prefix_segment_ids.max() == 1
    shared = Example(("a", "b", "c"), a.image, masks, tokens)
    sizes = {"image_size": config.vision.image_size, "pad_id": 0}

    model = Osprey(config)
    params = init_params(config, jax.random.key(0))
    # Regions and places weigh enough to be told apart.
    params = jax.tree.map(lambda x: 2.0 * x, params)
    separate = collate([[one] for one in alone], Bucket(64, 4), images=1, **sizes)
    # Text comes between images, and the second row has fewer images than there is room for.
    packed = collate([[d, e, shared], [f]], Bucket(110, 6), images=2, **sizes)
    assert packed.images.shape[:2] == (2, 2)
    one_by_one, together = (losses(model, params, batch) for batch in (separate, packed))
    rows = [3, 4, 0, 1, 2, 5]
    expected = [loss for row in rows for (r, _), loss in one_by_one.items() if r == row]
    found = list(together.values())
    assert len(set(np.round(expected, 3))) > 20
    np.testing.assert_allclose(found, expected, rtol=2e-5)

    loss_sums = jax.jit(train_step.make_loss_sums(model), compiler_options=QUICKLY)
    sums = [loss_sums(params, {}, batch) for batch in (separate, packed)]
    np.testing.assert_allclose(sums[1], sums[0], rtol=1e-5)
    assert sums[0][1] == pytest.approx(6)
