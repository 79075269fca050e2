"""Makes the sequences of one place of the stream, in whatever thread or process it runs."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from data_pipelines.conversation import draws, sample_rng
from data_pipelines.order import Key, Place
from data_pipelines.packing import Bucket, behind_one_prefix
from data_pipelines.reasons import message, reason
from data_pipelines.records import Record, Source
from data_pipelines.transforms import Example, LossPer, Text, Tokens, encode_image, encode_text
from osprey_jax.config import OspreyConfig
from osprey_jax.prompt import Tokenizer


class Skipped(NamedTuple):
    """Stands in the stream for a sample that could not be encoded."""

    sample_id: str
    reason: str
    message: str


Element = Example | Skipped


class _Said(NamedTuple):
    record: Record
    text: Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """Reads and encodes the samples of a place; what it draws depends on the seed and the keys alone."""

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    config: OspreyConfig
    limits: Bucket
    systems: tuple[str, ...]
    loss_per: LossPer
    seed: int

    def __call__(self, place: Place) -> list[Element]:
        """Never raises: whatever is wrong with a sample comes back as a `Skipped`."""
        # One for all: it is part of the beginning that they share.
        first = place[0]
        rng = sample_rng(self.seed, self.sources[first.source].name, first.epoch, first.record)
        system = self.systems[rng.integers(len(self.systems))]
        elements: list[Element] = []
        groups: list[list[_Said]] = []
        for key in place:
            said = self._say(key, system)
            if isinstance(said, Skipped):
                elements.append(said)
            elif groups and self._fit([*groups[-1], said]):
                groups[-1].append(said)
            else:
                groups.append([said])
        for group in groups:
            elements += self._see(group)
        return elements

    def _say(self, key: Key, system: str) -> _Said | Skipped:
        source = self.sources[key.source]
        sample_id = f"{source.name}[{key.record}]"
        try:
            record = source[key.record]
            sample_id = record.sample_id
            text = encode_text(
                record,
                self.tokenizer,
                self.config,
                rng=draws(self.seed, source.name, key.epoch, key.record),
                length=self.limits.length,
                regions=self.limits.regions,
                system=system,
                loss_per=self.loss_per,
                part=key.epoch,
            )
        except Exception as error:
            return _skipped(sample_id, error)
        return _Said(record, text)

    def _fit(self, group: Sequence[_Said]) -> bool:
        """Whether the conversations of a group fit behind one prefix."""
        regions = sum(len(said.text.regions) for said in group)
        return regions <= self.limits.regions and len(self._tokens(group).input_ids) <= self.limits.length

    def _tokens(self, group: Sequence[_Said]) -> Tokens:
        region_ids = self.tokenizer.mask_id, self.tokenizer.position_id
        return behind_one_prefix([said.text.tokens for said in group], region_ids=region_ids)

    def _see(self, group: Sequence[_Said]) -> list[Element]:
        try:
            image, masks = encode_image(
                group[0].record.image,
                [said.record.masks[index] for said in group for index in said.text.regions],
                self.config,
            )
        except Exception as error:
            if len(group) == 1:
                return [_skipped(group[0].record.sample_id, error)]
            # One of them may have spoilt it for all.
            return [element for said in group for element in self._see([said])]
        return [
            Example(
                tuple(said.record.sample_id for said in group),
                image,
                masks,
                self._tokens(group),
                sum(said.text.dropped_turns for said in group),
                sum(said.text.dropped_regions for said in group),
                tuple(
                    f"{said.record.sample_id}, {told}"
                    for said in group
                    for told in said.record.broken_regions
                ),
            )
        ]


def _skipped(sample_id: str, error: Exception) -> Skipped:
    return Skipped(sample_id, reason(error), message(error))
