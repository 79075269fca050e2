"""How long samples are, how many regions they name and how large these are, and what buckets are used for."""

import collections
import dataclasses
import itertools
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipelines.conversation import draws
from data_pipelines.reasons import message, reason
from data_pipelines.records import Source
from data_pipelines.transforms import DoesNotFit, Text, encode_text
from osprey_jax.config import OspreyConfig
from osprey_jax.masks import rle_area
from osprey_jax.prompt import SYSTEM_TRAINING, Tokenizer

_CONFIG = OspreyConfig()

Bucket = tuple[int, int]
"""Tokens of a sequence, image included, and regions: what sequences are padded to."""


@dataclasses.dataclass
class Tally:
    """What was found of one source."""

    name: str
    size: int
    dropped: dict[str, int]
    drawn: int = 0
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)
    """For each reason of skipping a sample's message."""


@dataclasses.dataclass
class Found:
    """What was found of all samples, one entry for each that is kept."""

    tallies: list[Tally]
    lengths: list[int] = dataclasses.field(default_factory=list)
    """In tokens, image included."""
    with_loss: list[int] = dataclasses.field(default_factory=list)
    """Tokens that carry loss."""
    regions: list[int] = dataclasses.field(default_factory=list)
    areas: list[float] = dataclasses.field(default_factory=list)
    """Of each region that is named: its mask's share of the image."""
    dropped_regions: int = 0
    """Regions with empty masks that were left out with their turns."""
    unfit: int = 0
    """Samples that are too large for the largest bucket and of which no turn alone fits it."""

    @property
    def masks(self) -> list[float]:
        """Areas of what isn't empty."""
        return [area for area in self.areas if area]


def measure(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    samples: int,
    seed: int = 0,
    largest: Bucket | None = None,
) -> Found:
    """Encodes the words of so many samples drawn from all sources together, or of all where there are fewer.

    Args:
      sources: what to draw from.
      tokenizer: makes the tokens.
      samples: how many to draw.
      seed: of what is drawn.
      largest: a bucket; of samples that are larger is found out whether a turn fits it.
    """
    sizes = [len(source) for source in sources]
    ends = np.cumsum(sizes)
    count = min(samples, int(ends[-1]))
    places = np.sort(np.random.default_rng(seed).choice(ends[-1], count, replace=False))
    found = Found([Tally(source.name, len(source), dict(source.dropped)) for source in sources])
    for place in tqdm(places, unit="sample", disable=None, leave=False):
        number = int(np.searchsorted(ends, place, side="right"))
        source, tally = sources[number], found.tallies[number]
        index = int(place - ends[number] + sizes[number])
        tally.drawn += 1
        try:
            _add(found, source, index, tokenizer, seed=seed, largest=largest)
        except Exception as error:
            # As in training, which skips a sample whatever is wrong with it.
            tally.skipped[reason(error)] += 1
            tally.examples.setdefault(reason(error), f"{source.name}[{index}]: {message(error)}")
    return found


def _add(
    found: Found, source: Source, index: int, tokenizer: Tokenizer, *, seed: int, largest: Bucket | None
) -> None:
    record = source[index]

    def encoded(limits: Bucket) -> Text:
        return encode_text(
            record,
            tokenizer,
            _CONFIG,
            rng=draws(seed, source.name, 0, index),
            length=limits[0],
            regions=limits[1],
            system=SYSTEM_TRAINING,
            loss_per="token",
            part=0,
        )

    text = encoded((sys.maxsize, sys.maxsize))
    rles = [record.masks[region] for region in text.regions]
    areas = [rle_area(rle) / (rle["size"][0] * rle["size"][1]) for rle in rles]
    length = len(text.tokens.input_ids)
    if largest is not None and not fits((length, len(rles)), largest):
        try:
            encoded(largest)
        except DoesNotFit:
            found.unfit += 1
    found.lengths.append(length)
    found.with_loss.append(int((text.tokens.loss_weights > 0).sum()))
    found.regions.append(len(rles))
    found.areas += areas
    found.dropped_regions += text.dropped_regions


def fits(size: Bucket, bucket: Bucket) -> bool:
    """Whether a bucket holds a sequence of so many tokens and regions."""
    return size[0] <= bucket[0] and size[1] <= bucket[1]


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """Reads `1408x16,2048x32`, in any order; the smallest comes first.

    Raises ValueError for another form, or where one is longer than another but takes fewer regions.
    """
    if not re.fullmatch(r"\s*[1-9]\d*x\d+\s*(,\s*[1-9]\d*x\d+\s*)*", text, re.ASCII):
        raise ValueError(f"--buckets are lengths and regions as in 1408x16,2048x32, got {text!r}")
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    buckets = sorted(set(zip(numbers[::2], numbers[1::2], strict=True)))
    for small, large in itertools.pairwise(buckets):
        if small[1] > large[1]:
            raise ValueError(
                f"buckets must grow in both: {large[0]}x{large[1]} is longer than {small[0]}x{small[1]} "
                "but takes fewer regions"
            )
    return tuple(buckets)


class Use(NamedTuple):
    """What one bucket holds when each sample takes the smallest that holds it."""

    bucket: Bucket
    samples: int
    tokens: int
    regions: int

    @property
    def padding(self) -> tuple[float, float]:
        """The share of its places for tokens, and of those for regions, that are filled up with nothing."""
        return padding([self])


def padding(uses: Sequence[Use]) -> tuple[float, float]:
    """The same of several buckets together; 0 where they hold nothing."""
    filled = [sum(use.tokens for use in uses), sum(use.regions for use in uses)]
    places = [sum(use.samples * use.bucket[axis] for use in uses) for axis in (0, 1)]
    tokens, regions = (1 - f / p if p else 0.0 for f, p in zip(filled, places, strict=True))
    return tokens, regions


def use_of(found: Found, buckets: Sequence[Bucket]) -> tuple[list[Use], int]:
    """What each bucket is used for, and how many samples none holds; the smallest bucket comes first."""
    held: dict[Bucket, list[Bucket]] = {bucket: [] for bucket in buckets}
    too_large = 0
    for size in zip(found.lengths, found.regions, strict=True):
        bucket = next((bucket for bucket in buckets if fits(size, bucket)), None)
        if bucket is None:
            too_large += 1
        else:
            held[bucket].append(size)
    uses = [
        Use(bucket, len(sizes), sum(s[0] for s in sizes), sum(s[1] for s in sizes))
        for bucket, sizes in held.items()
    ]
    return uses, too_large
