"""One sample as the model will see it: its regions, its words and which of its tokens carry loss."""

import itertools
import sys
from typing import NamedTuple

import numpy as np

from data_pipelines.command_line import printable
from data_pipelines.conversation import Conversation, converse, draws
from data_pipelines.records import Record, Source
from data_pipelines.transforms import encode, tokenize_conversation
from osprey_jax.config import OspreyConfig
from osprey_jax.image import load_image
from osprey_jax.masks import rle_area
from osprey_jax.prompt import (
    IGNORE_LABEL,
    IMAGE_TOKEN,
    IMAGE_TOKEN_ID,
    MASK_TOKEN,
    POSITION_TOKEN,
    SYSTEM_TRAINING,
    Dialogue,
    Tokenizer,
    conversation,
)


class Span(NamedTuple):
    """A run of tokens, written out, that carry loss or don't."""

    text: str
    has_loss: bool


class Region(NamedTuple):
    """A mask as the prompt names it."""

    mask: int
    """Its index in the record."""
    answer: str
    """What is said of it where a turn is about it alone, else nothing."""


class Sample(NamedTuple):
    """A record, what was drawn of it, and its tokens."""

    record: Record
    conversation: Conversation
    dialogue: Dialogue
    text: str
    """The whole prompt."""
    regions: tuple[Region, ...]
    """In the order of the prompt."""


def look(source: Source, index: int, tokenizer: Tokenizer, *, seed: int = 0, epoch: int = 0) -> Sample:
    """Reads a sample and encodes it as training does, except that it isn't split for being too long.

    Raises what the source and `transforms.encode` raise for a sample that can't be used.
    """
    record = source[index]
    # For what makes training skip it: everything else of what it gives is made here once more, unexpanded.
    encode(
        record,
        tokenizer,
        OspreyConfig(),
        rng=draws(seed, source.name, epoch, index),
        length=sys.maxsize,
        regions=sys.maxsize,
    )
    said = converse(record, draws(seed, source.name, epoch, index))
    dialogue = tokenize_conversation(record, said, tokenizer, system=SYSTEM_TRAINING)
    text = conversation(said.turns, system=SYSTEM_TRAINING)
    if record.plain:
        text = f"{IMAGE_TOKEN}{said.turns[0][1]}\n"
    return Sample(record, said, dialogue, text, _regions(said))


def _regions(said: Conversation) -> tuple[Region, ...]:
    named = [Region(mask, "") for mask in said.opening_regions]
    for turn in said.said:
        answer = turn.answer if len(turn.regions) == 1 else ""
        named += [Region(mask, answer) for mask in turn.regions]
    return tuple(named)


def spans(dialogue: Dialogue, tokenizer: Tokenizer) -> list[Span]:
    """The tokens written out, special ones by their names; texts differ from the prompt's in blanks alone.

    A newline that carries loss is written as a backslash and an n in front of it.
    """
    names = {
        IMAGE_TOKEN_ID: IMAGE_TOKEN,
        tokenizer.bos_id: "<s>",
        tokenizer.eos_id: "</s>",
        tokenizer.pad_id: "<unk>",
        tokenizer.mask_id: MASK_TOKEN,
        tokenizer.position_id: POSITION_TOKEN,
    }
    # Between two others a run keeps the blanks that `decode` strips from the ends.
    guard = tokenizer.encode("x")
    before = len(tokenizer.decode(guard))
    after = len(tokenizer.decode([*guard, *guard])) - before

    def written(ids: list[int]) -> str:
        if ids[0] in names:
            return "".join(names[token] for token in ids)
        text = tokenizer.decode([*guard, *ids, *guard])
        return text[before : len(text) - after]

    found: list[Span] = []
    tokens = zip(dialogue.input_ids, dialogue.labels, strict=True)
    for (has_loss, _), run in itertools.groupby(tokens, lambda t: (t[1] != IGNORE_LABEL, t[0] in names)):
        text = printable(written([token for token, _ in run]))
        text = text.replace("\n", "\\n\n") if has_loss else text
        if found and found[-1].has_loss == has_loss:
            found[-1] = Span(found[-1].text + text, has_loss)
        else:
            found.append(Span(text, has_loss))
    return found


def counts(dialogue: Dialogue) -> str:
    """How many tokens there are, in words."""
    loss = sum(label != IGNORE_LABEL for label in dialogue.labels)
    places = OspreyConfig().vision.num_image_tokens
    image = f", {len(dialogue.input_ids) - 1 + places:,} with the image's {places:,}"
    image = image if IMAGE_TOKEN_ID in dialogue.input_ids else ""
    return f"{len(dialogue.input_ids):,} tokens{image}; {loss:,} carry loss"


def areas(sample: Sample) -> list[str]:
    """The size of each region, in words."""
    found = []
    for region in sample.regions:
        rle = sample.record.masks[region.mask]
        area, (height, width) = rle_area(rle), rle["size"]
        found.append(f"{area:,} px, {area / (height * width):.2%}")
    return found


def pixels(record: Record) -> np.ndarray | None:
    """The image, `(h, w, 3)` uint8, or None where there is none."""
    return None if record.image is None else load_image(record.image)
