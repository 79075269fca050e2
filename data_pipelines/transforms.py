"""From records to what the model takes: pixels, mask pyramids, ids and labels."""

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from data_pipelines.conversation import Conversation, converse
from data_pipelines.records import Record, Rle
from osprey_jax.config import OspreyConfig
from osprey_jax.image import load_image, preprocess
from osprey_jax.masks import MaskPyramid, decode_rles, mask_pyramid
from osprey_jax.prompt import (
    IGNORE_LABEL,
    IMAGE_TOKEN_ID,
    SYSTEM_TRAINING,
    Dialogue,
    Tokenizer,
    encode_caption,
    encode_dialogue,
)

LossPer = Literal["dialogue", "token"]
DECODED = 1 << 25
"""Pixels of masks that are decoded at once, at most, if it isn't one mask that has more."""


class Tokens(NamedTuple):
    """A sequence for the decoder, not padded; what `osprey_jax.batch.Batch` has of the same names."""

    input_ids: np.ndarray
    """int32 (T,): `IMAGE_TOKEN_ID` at every place of an image."""
    labels: np.ndarray
    """int32 (T,): the token at this very place, or `IGNORE_LABEL`."""
    loss_weights: np.ndarray
    """float32 (T,)."""
    positions: np.ndarray
    """int32 (T,)."""
    segment_ids: np.ndarray
    """int32 (T,), from 1."""
    prefix_segment_ids: np.ndarray
    """int32 (T,)."""


class Example(NamedTuple):
    """One encoded sequence about one image, or about none, not padded."""

    sample_ids: tuple[str, ...]
    """Of the conversations in it."""
    image: np.ndarray | None
    """float32 (S, S, 3)."""
    masks: MaskPyramid
    """Levels (R, Y, X) bool and position (R, P, P) float32."""
    tokens: Tokens
    dropped_turns: int = 0
    """Turns that did not fit and are not part of this sequence."""
    dropped_regions: int = 0
    """Regions whose masks are empty or broken, left out with their turns."""
    broken: tuple[str, ...] = ()
    """What is wrong with the broken ones."""


class DoesNotFit(ValueError):
    """Not even one turn fits into the limits."""


class Text(NamedTuple):
    """A record's words as tokens, and the masks that they name."""

    tokens: Tokens
    regions: tuple[int, ...]
    """The record's masks in the order of the prompt."""
    dropped_turns: int
    dropped_regions: int


def encode(
    record: Record,
    tokenizer: Tokenizer,
    config: OspreyConfig,
    *,
    rng: np.random.Generator,
    length: int,
    regions: int,
    system: str = SYSTEM_TRAINING,
    loss_per: LossPer = "dialogue",
    part: int = 0,
) -> Example:
    """Encodes a conversation about regions of one image.

    A conversation of more than `length` tokens, image included, or `regions` regions is split into parts of
    whole turns that fit, each behind the opening, and one of them is encoded.

    Args:
      record: what to encode.
      tokenizer: its ids of `<mask>` and `<pos>` are the ones that the model looks for.
      config: gives the sizes of image, feature levels and position mask.
      rng: what is drawn is drawn from it (`conversation.draws`).
      length: the longest sequence allowed.
      regions: the most regions allowed.
      system: the system text.
      loss_per: what weighs 1 in the loss: every dialogue, or every labelled token.
      part: which part, counted round and round: with the epoch's number all turns come in their turn.

    Raises:
      DoesNotFit: no turn fits.
      ValueError: the text asks for another number of images or regions than there are, the masks are of
        another size than the image, or the image can't be read.
    """
    text = encode_text(
        record,
        tokenizer,
        config,
        rng=rng,
        length=length,
        regions=regions,
        system=system,
        loss_per=loss_per,
        part=part,
    )
    image, masks = encode_image(record.image, [record.masks[index] for index in text.regions], config)
    return Example(
        (record.sample_id,),
        image,
        masks,
        text.tokens,
        text.dropped_turns,
        text.dropped_regions,
        record.broken_regions,
    )


def encode_text(
    record: Record,
    tokenizer: Tokenizer,
    config: OspreyConfig,
    *,
    rng: np.random.Generator,
    length: int,
    regions: int,
    system: str,
    loss_per: LossPer,
    part: int,
) -> Text:
    """The part of `encode` that needs no image."""
    image_tokens = config.vision.num_image_tokens
    whole = converse(record, rng)

    def tokenized(conversation: Conversation) -> Dialogue:
        return tokenize_conversation(record, conversation, tokenizer, system=system)

    def excess(conversation: Conversation, dialogue: Dialogue) -> str | None:
        tokens = len(dialogue.input_ids) + (image_tokens - 1) * dialogue.input_ids.count(IMAGE_TOKEN_ID)
        named = sum(map(len, conversation.regions))
        if tokens > length:
            return f"{tokens} tokens, {length} are allowed"
        return f"{named} regions, {regions} are allowed" if named > regions else None

    conversation, dialogue = whole, tokenized(whole)
    if excess(whole, dialogue):
        parts = _parts(whole, lambda some: excess(some, tokenized(some)))
        if not parts:
            first = whole.part(0, 1)
            raise DoesNotFit(f"the first turn has {excess(first, tokenized(first))}")
        conversation = parts[part % len(parts)]
        dialogue = tokenized(conversation)
    named = tuple(region for turn in conversation.regions for region in turn)
    _check_placeholders(dialogue, tokenizer, images=int(record.image is not None), regions=len(named))
    input_ids, labels = _expand_image(dialogue, image_tokens)
    weights = (labels != IGNORE_LABEL).astype(np.float32)
    if not weights.any():
        raise ValueError("an answer without a token")
    index = np.arange(len(input_ids), dtype=np.int32)
    tokens = Tokens(
        input_ids=input_ids,
        labels=labels,
        loss_weights=weights / weights.sum() if loss_per == "dialogue" else weights,
        positions=index,
        segment_ids=np.ones_like(index),
        prefix_segment_ids=np.zeros_like(index),
    )
    return Text(tokens, named, len(whole.said) - len(conversation.said), whole.dropped_regions)


def tokenize_conversation(
    record: Record, conversation: Conversation, tokenizer: Tokenizer, *, system: str
) -> Dialogue:
    """Ids and labels in the record's template, one id standing for the image."""
    if record.plain:
        return encode_caption(tokenizer, conversation.said[0].answer)
    return encode_dialogue(tokenizer, conversation.turns, system=system)


def encode_image(
    image: np.ndarray | bytes | None, rles: Sequence[Rle], config: OspreyConfig
) -> tuple[np.ndarray | None, MaskPyramid]:
    """The part of `encode` that needs the image: its pixels, preprocessed, and the pyramid of its regions.

    Raises ValueError where the image can't be read or the masks are of another size.
    """
    vision = config.vision
    tower_input = None
    if image is not None:
        pixels = load_image(image)
        # Before masks are decoded: what they say of their size may be anything.
        check_sizes((rle["size"] for rle in rles), pixels.shape[:2])
        tower_input = preprocess(pixels, size=vision.image_size)
    elif rles:
        raise ValueError("regions without an image")
    at_once = max(1, DECODED // max(1, math.prod(rles[0]["size"]))) if rles else 1
    position_size = config.extractor.position_size
    pyramids = [
        mask_pyramid(
            decode_rles(rles[start : start + at_once]),
            level_sizes=vision.level_sizes,
            position_size=position_size,
        )
        for start in range(0, max(len(rles), 1), at_once)
    ]
    levels = (np.concatenate(level) for level in zip(*(each.levels for each in pyramids), strict=True))
    position = np.concatenate([each.position for each in pyramids])
    return tower_input, MaskPyramid(levels=tuple(levels), position=position)


def check_sizes(masks: Iterable[Sequence[int]], image: Sequence[int]) -> None:
    """Raises ValueError where masks (height, width) are of another shape than their image.

    Both go into squares of the model's own sizes, so another scale does no harm, such as that of images that
    were made smaller.
    """
    height, width = image
    for size in masks:
        rows, columns = size
        if abs(rows * width - columns * height) > max(rows, columns, height, width):
            raise ValueError(f"masks are {tuple(size)} (height, width), the image is {tuple(image)}")


def _parts(conversation: Conversation, excess: Callable[[Conversation], str | None]) -> list[Conversation]:
    """Runs of turns that fit, as long as they can be; a turn that doesn't fit alone is in none."""
    parts, start, count = [], 0, len(conversation.said)
    while start < count:
        # What fits comes before what doesn't: turns only add tokens and regions.
        ends = range(start + 1, count + 1)
        begin = start
        fitting = bisect.bisect_left(ends, True, key=lambda end: bool(excess(conversation.part(begin, end))))
        if fitting:
            parts.append(conversation.part(start, start + fitting))
        start += max(fitting, 1)
    return parts


def _check_placeholders(dialogue: Dialogue, tokenizer: Tokenizer, *, images: int, regions: int) -> None:
    """The model fills places by their ids, so these are counted, not the strings of the text."""
    expected = (
        ("<image>", IMAGE_TOKEN_ID, images),
        ("<mask>", tokenizer.mask_id, regions),
        ("<pos>", tokenizer.position_id, regions),
    )
    for name, token, count in expected:
        if (found := dialogue.input_ids.count(token)) != count:
            raise ValueError(f"{name} is {found} times in the text, expected {count}")


def _expand_image(dialogue: Dialogue, image_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels with all places of the image instead of the one that stands for it."""
    ids = np.asarray(dialogue.input_ids, np.int32)
    places = np.where(ids == IMAGE_TOKEN_ID, image_tokens, 1)
    return np.repeat(ids, places), np.repeat(np.asarray(dialogue.labels, np.int32), places)
