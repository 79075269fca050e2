"""Several sequences in one, side by side or behind the beginning that they share; batches of padded rows.

What a token sees is what it sees in its own sequence (`osprey_jax.ops.attention.visibility`), at the position
that it has there, so packed and separate sequences have the same loss, term by term.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.transforms import Example, Tokens
from osprey_jax.batch import Batch
from osprey_jax.masks import MaskPyramid
from osprey_jax.prompt import IGNORE_LABEL
from osprey_jax.typing import ArrayLike


class Bucket(NamedTuple):
    """What the rows of a batch are padded to."""

    length: int
    """Tokens of a row."""
    regions: int
    """Regions of an image."""


def behind_one_prefix(sequences: Sequence[Tokens], *, region_ids: Sequence[int]) -> Tokens:
    """Sequences about one image, whose common beginning is kept once.

    The beginning is segment 1; what follows of each is a segment of its own, which sees the beginning and
    goes on from its last position. It ends before any token of a region, for regions differ where their
    tokens don't, and before the first label: the token before a label must be the one that predicts it.

    Args:
      sequences: one segment each.
      region_ids: the tokens of regions, `<mask>` and `<pos>`.
    """
    if len(sequences) == 1:
        return sequences[0]
    shortest = min(len(one.input_ids) for one in sequences)
    ids = np.stack([one.input_ids[:shortest] for one in sequences])
    ends = (ids != ids[0]).any(axis=0) | np.isin(ids, region_ids).any(axis=0)
    prefix = int(np.argmax(ends)) if ends.any() else shortest
    prefix = min(prefix, *(int(np.argmax(one.labels != IGNORE_LABEL)) - 1 for one in sequences))
    parts = [Tokens(*(values[:prefix] for values in sequences[0]))]
    for segment, one in enumerate(sequences, 2):
        rest = Tokens(*(values[prefix:] for values in one))
        alone = np.ones_like(rest.segment_ids)
        parts.append(rest._replace(segment_ids=segment * alone, prefix_segment_ids=alone))
    return Tokens(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def side_by_side(sequences: Sequence[Tokens]) -> Tokens:
    """Sequences one after the other, their segments renumbered so that none sees another's."""
    parts, used = [], 0
    for one in sequences:
        prefixes = np.where(one.prefix_segment_ids > 0, one.prefix_segment_ids + used, 0)
        parts.append(one._replace(segment_ids=one.segment_ids + used, prefix_segment_ids=prefixes))
        used += int(one.segment_ids.max())
    return Tokens(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def fits(row: Sequence[Example], example: Example, *, length: int, images: int) -> bool:
    """Whether a row of at most `length` tokens and `images` images has room for one more example."""
    examples = [*row, example]
    tokens = sum(len(one.tokens.input_ids) for one in examples)
    return tokens <= length and sum(one.image is not None for one in examples) <= images


def collate(
    rows: Sequence[Sequence[Example]], bucket: Bucket, *, images: int, image_size: int, pad_id: int
) -> Batch:
    """Pads rows of examples, with at most `images` images each, to `bucket` and stacks them."""
    length, regions = bucket
    tokens = [side_by_side([example.tokens for example in row]) for row in rows]
    padding = {"input_ids": pad_id, "labels": IGNORE_LABEL}
    stacked = {
        name: _stack([getattr(one, name) for one in tokens], length, padding.get(name, 0))
        for name in Tokens._fields
    }
    pixels = np.zeros((len(rows), images, image_size, image_size, 3), np.float32)
    (example, *_), *_ = rows
    levels = tuple(_empty(level, len(rows), images, regions) for level in example.masks.levels)
    position = _empty(example.masks.position, len(rows), images, regions)
    for number, row in enumerate(rows):
        # In the order in which the sequence has their places.
        for place, one in enumerate(one for one in row if one.image is not None):
            pixels[number, place] = one.image
            for target, values in zip(
                (*levels, position), (*one.masks.levels, one.masks.position), strict=True
            ):
                target[number, place, : len(values)] = values
    return Batch(images=pixels, masks=MaskPyramid(levels=levels, position=position), **stacked)


def _empty(values: ArrayLike, rows: int, images: int, regions: int) -> np.ndarray:
    return np.zeros((rows, images, regions, *values.shape[1:]), values.dtype)


def _stack(arrays: Sequence[np.ndarray], size: int, value: int) -> np.ndarray:
    """Stacks vectors, filled up to `size` with `value`."""
    out = np.full((len(arrays), size), value, arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return out
