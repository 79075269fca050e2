"""From a record to one conversation: what the original draws anew each time is drawn here.

Everything drawn depends on the seed, the source's name, the epoch and the record alone, so a sample is the
same whatever worker or host makes it.
"""

import dataclasses
import zlib
from collections import Counter

import numpy as np

from data_pipelines.paraphrases import PHRASES
from data_pipelines.records import Record, Turn
from osprey_jax.masks import rle_area
from osprey_jax.prompt import IMAGE_TOKEN


def draws(seed: int, source: str, epoch: int, index: int) -> np.random.Generator:
    """The randomness of one sample's conversation in one epoch; another source beside it changes nothing."""
    return sample_rng(seed, source, epoch, index).spawn(1)[0]


def sample_rng(seed: int, source: str, epoch: int, index: int) -> np.random.Generator:
    """The randomness of what is around a conversation, which is the system text."""
    return np.random.default_rng((seed, zlib.crc32(source.encode()), epoch, index))


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns about one image, in their order, and the opening that precedes whichever is the first."""

    opening: str
    opening_regions: tuple[int, ...]
    said: tuple[Turn, ...]
    """Turns whose phrases are drawn."""
    dropped_regions: int = 0
    """Regions that were left out, with their turns, because their masks are empty or broken."""

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """Questions and answers as the prompt has them."""
        (first, *others), opening = self.said, self.opening
        asked = (opening + first.question.replace(IMAGE_TOKEN, "")).rstrip() if opening else first.question
        return ((asked, first.answer), *((turn.question, turn.answer) for turn in others))

    @property
    def regions(self) -> tuple[tuple[int, ...], ...]:
        """For each turn the record's masks that its `<mask><pos>` stand for, the opening's with the first."""
        first, *others = self.said
        return (self.opening_regions + first.regions, *(turn.regions for turn in others))

    def part(self, start: int, stop: int) -> "Conversation":
        """The turns from `start` to before `stop`, behind the same opening."""
        return dataclasses.replace(self, said=self.said[start:stop])


def converse(record: Record, rng: np.random.Generator) -> Conversation:
    """Draws a conversation: order and number of turns where they are free, and ways to ask.

    A region whose mask is empty is dropped with its turn, if that names no other and no other names it.

    Raises ValueError where no turn is left.
    """
    named = Counter(record.opening_regions)
    for turn in record.turns:
        named.update(turn.regions)
    empty = {index for index, rle in enumerate(record.masks) if rle_area(rle) == 0}
    turns = [
        turn
        for turn in record.turns
        if not (len(turn.regions) == 1 and turn.regions[0] in empty and named[turn.regions[0]] == 1)
    ]
    dropped = len(record.turns) - len(turns)
    if not turns:
        raise ValueError("every mask is empty" if dropped else "a conversation without a turn")
    if record.at_most:
        order = rng.permutation(len(turns))[: record.at_most]
        turns = [turns[index] for index in order]
    said = tuple(_with_phrase(turn, rng) for turn in turns)
    return Conversation(record.opening, record.opening_regions, said, len(record.broken_regions) + dropped)


def _with_phrase(turn: Turn, rng: np.random.Generator) -> Turn:
    if not turn.phrases:
        return turn
    phrases = PHRASES[turn.phrases]
    phrase = phrases[rng.integers(len(phrases))].format(turn.slot)
    return Turn(phrase + turn.question, turn.answer, turn.regions)
