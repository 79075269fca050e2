"""From records to what the model takes: pixels, mask pyramids, ids, labels, and padded batches of them."""

import bisect
import io
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from data_pipelines.records import Record
from osprey_jax.batch import Batch
from osprey_jax.config import OspreyConfig
from osprey_jax.image import load_image, preprocess
from osprey_jax.masks import MaskPyramid, mask_pyramid
from osprey_jax.prompt import (
    IGNORE_LABEL,
    IMAGE_TOKEN_ID,
    SYSTEM_TRAINING,
    Dialogue,
    Tokenizer,
    encode_dialogue,
)
from osprey_jax.typing import ArrayLike

LossPer = Literal["dialogue", "token"]
Bucket = tuple[int, int]
"""Tokens and regions that the rows of a batch are padded to."""


class Example(NamedTuple):
    """One encoded dialogue, not padded."""

    sample_id: str
    image: np.ndarray
    """float32 (S, S, 3)."""
    masks: MaskPyramid
    """Levels (R, Y, X) bool and position (R, P, P) float32."""
    input_ids: np.ndarray
    """int32 (T,): `IMAGE_TOKEN_ID` at every place of the image."""
    labels: np.ndarray
    """int32 (T,): the token at this very place, or `IGNORE_LABEL`."""
    loss_weights: np.ndarray
    """float32 (T,)."""
    dropped_turns: int
    """Turns at the end of the conversation that did not fit."""


class DoesNotFit(ValueError):
    """Not even the first turn fits into the limits."""


def encode(
    record: Record,
    tokenizer: Tokenizer,
    config: OspreyConfig,
    *,
    length: int,
    regions: int,
    system: str = SYSTEM_TRAINING,
    loss_per: LossPer = "dialogue",
) -> Example:
    """Encodes a conversation about regions of one image.

    A conversation of more than `length` tokens, image included, or `regions` regions loses whole turns from
    its end, and the regions that they name.

    Args:
      record: what to encode.
      tokenizer: its ids of `<mask>` and `<pos>` are the ones that the model looks for.
      config: gives the sizes of image, feature levels and position mask.
      length: the longest sequence allowed.
      regions: the most regions allowed.
      system: the system text.
      loss_per: what weighs 1 in the loss: every dialogue, or every labelled token.

    Raises:
      DoesNotFit: the first turn alone is too long or names too many regions.
      ValueError: the text asks for another number of images or regions than there are, the masks are of
        another size than the image, or the image can't be read.
    """
    image_tokens = config.vision.num_image_tokens

    def encoded(turns: int) -> Dialogue:
        return encode_dialogue(tokenizer, record.turns[:turns], system=system)

    def excess(dialogue: Dialogue) -> str | None:
        tokens = len(dialogue.input_ids) - 1 + image_tokens
        named = dialogue.input_ids.count(tokenizer.mask_id)
        if tokens > length:
            return f"{tokens} tokens, {length} are allowed"
        return f"{named} regions, {regions} are allowed" if named > regions else None

    turns = len(record.turns)
    dialogue = encoded(turns)
    _check_placeholders(record, dialogue, tokenizer)
    if excess(dialogue):
        # What fits comes before what doesn't: turns only add tokens and regions.
        turns = bisect.bisect_left(range(1, turns), True, key=lambda n: excess(encoded(n)) is not None)
        if turns == 0:
            raise DoesNotFit(f"{record.sample_id}: the first turn has {excess(encoded(1))}")
        dialogue = encoded(turns)

    image = record.image
    pixels = load_image(Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image)
    if record.masks.shape[1:] != pixels.shape[:2]:
        raise ValueError(
            f"{record.sample_id}: masks are {record.masks.shape[1:]} (height, width), "
            f"the image is {pixels.shape[:2]}"
        )
    input_ids, labels = _expand_image(dialogue, image_tokens)
    weights = (labels != IGNORE_LABEL).astype(np.float32)
    return Example(
        sample_id=record.sample_id,
        image=preprocess(pixels, size=config.vision.image_size),
        masks=mask_pyramid(
            record.masks[: dialogue.input_ids.count(tokenizer.mask_id)],
            level_sizes=config.vision.level_sizes,
            position_size=config.extractor.position_size,
        ),
        input_ids=input_ids,
        labels=labels,
        loss_weights=weights / weights.sum() if loss_per == "dialogue" else weights,
        dropped_turns=len(record.turns) - turns,
    )


def _check_placeholders(record: Record, dialogue: Dialogue, tokenizer: Tokenizer) -> None:
    """The model fills places by their ids, so these are counted, not the strings of the text."""
    expected = (
        ("<image>", IMAGE_TOKEN_ID, 1),
        ("<mask>", tokenizer.mask_id, len(record.masks)),
        ("<pos>", tokenizer.position_id, len(record.masks)),
    )
    for name, token, count in expected:
        if (found := dialogue.input_ids.count(token)) != count:
            raise ValueError(f"{record.sample_id}: {name} is {found} times in the text, expected {count}")


def _expand_image(dialogue: Dialogue, image_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels with all places of the image instead of the one that stands for it."""
    at = dialogue.input_ids.index(IMAGE_TOKEN_ID)

    def expanded(values: list[int]) -> np.ndarray:
        return np.array(values[:at] + values[at : at + 1] * image_tokens + values[at + 1 :], np.int32)

    return expanded(dialogue.input_ids), expanded(dialogue.labels)


def collate(examples: Sequence[Example], bucket: Bucket, *, pad_id: int) -> Batch:
    """Pads examples to `bucket` and stacks them."""
    length, regions = bucket

    def rows(name: str, size: int, value: int) -> np.ndarray:
        return _stack([getattr(example, name) for example in examples], size, value)

    sizes = [len(example.input_ids) for example in examples]
    segment_ids = _stack([np.ones(size, np.int32) for size in sizes], length, 0)
    levels = zip(*(example.masks.levels for example in examples), strict=True)
    return Batch(
        images=np.stack([example.image for example in examples]),
        masks=MaskPyramid(
            levels=tuple(_stack(level, regions, 0) for level in levels),
            position=_stack([example.masks.position for example in examples], regions, 0),
        ),
        input_ids=rows("input_ids", length, pad_id),
        labels=rows("labels", length, IGNORE_LABEL),
        loss_weights=rows("loss_weights", length, 0),
        positions=np.arange(length, dtype=np.int32) * segment_ids,
        segment_ids=segment_ids,
        prefix_segment_ids=np.zeros_like(segment_ids),
    )


def _stack(arrays: Sequence[ArrayLike], size: int, value: int) -> np.ndarray:
    """Stacks arrays whose first axes differ, that axis filled up to `size` with `value`."""
    out = np.empty((len(arrays), size, *arrays[0].shape[1:]), arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
        row[len(array) :] = value
    return out
