"""The five files of Osprey-724K: dialogues about regions, one or several to an image."""

import re
from typing import Any, ClassVar

from data_pipelines.records import Record, Rle, Turn
from data_pipelines.sources.files import SampleSource, after_underscore, field, region_rles, sides, strings
from osprey_jax.prompt import IMAGE_TOKEN, OVERVIEW, REGION, region_list

_OPENING = f"{IMAGE_TOKEN}\n{OVERVIEW}"
_ONE_PHRASE = " Answer the question using a single word or phrase."
_NO_BRACKETS = str.maketrans("", "", "<>")
_NUMBERED = re.compile(r"<region\d+>")
_DESCRIPTION = re.compile(r"<.*>: (.*)")


class _Osprey724K(SampleSource):
    turns_from: ClassVar[str] = "conversations"
    """The list that turns are made of."""
    per_turn: ClassVar[int] = 2
    """How many of its elements make one."""

    def _why_dropped(self, sample: Any) -> str | None:
        found = sample.get(self.turns_from) if isinstance(sample, dict) else None
        if isinstance(found, list) and len(found) < self.per_turn:
            return "a sample without a turn"
        return None

    def _image_name(self, sample: Any) -> str:
        return after_underscore(field(sample, "file_name", str))

    def _masks(self, sample: Any) -> tuple[Rle, ...]:
        return region_rles(field(sample, "annotation", list), *sides(sample))

    def _pairs(self, sample: Any) -> list[tuple[str, str]]:
        """Questions and answers, which the files' readers tell by their places alone."""
        values = [field(message, "value", str) for message in field(sample, "conversations", list)]
        return list(zip(values[::2], values[1::2], strict=False))


class OspreyConversation(_Osprey724K):
    """Dialogues about numbered regions, which the opening lists."""

    name = "osprey_conversation"
    limit: ClassVar[str] = ""
    """Follows each question."""

    def _record(self, sample_id: str, *values: Any) -> Record:
        (sample,) = values
        masks = self._masks(sample)
        return Record(
            sample_id=sample_id,
            image=self._images.read(self._image_name(sample)),
            masks=masks,
            turns=tuple(
                Turn(question.translate(_NO_BRACKETS) + self.limit, answer.translate(_NO_BRACKETS))
                for question, answer in self._pairs(sample)
            ),
            opening=_OPENING + region_list(len(masks)),
            opening_regions=tuple(range(len(masks))),
        )


class OspreyShortForm(OspreyConversation):
    """The same with short answers."""

    name = "osprey_short_form"
    limit = _ONE_PHRASE


class OspreyPartLevel(OspreyConversation):
    """The same about parts of objects."""

    name = "osprey_part_level"
    limit = _ONE_PHRASE


class OspreyLvis(_Osprey724K):
    """Questions whether a region is of some category; regions are named where a question speaks of them."""

    name = "osprey_lvis"

    def _image_name(self, sample: Any) -> str:
        return field(sample, "file_name", str)

    def _record(self, sample_id: str, *values: Any) -> Record:
        (sample,) = values
        masks = self._masks(sample)
        turns, named = [], 0
        for question, answer in self._pairs(sample):
            question, count = _NUMBERED.subn(REGION, question)
            turns.append(Turn(question, answer, tuple(range(named, named + count))))
            named += count
        # A region belongs to its place among those named, whatever its number.
        if named != len(masks):
            raise ValueError(f"the questions name {named} regions, there are {len(masks)} annotations")
        image = self._images.read(self._image_name(sample))
        return Record(sample_id, image, masks, tuple(turns), opening=_OPENING)


class OspreyDetailed(_Osprey724K):
    """Detailed descriptions, one for each region."""

    name = "osprey_detailed"
    turns_from = "annotation"
    per_turn = 1

    def _record(self, sample_id: str, *values: Any) -> Record:
        (sample,) = values
        masks, texts = self._masks(sample), strings(sample, "description")
        if len(texts) < len(masks):
            raise ValueError(f"{len(texts)} descriptions for {len(masks)} annotations")
        turns = []
        for number, text in enumerate(texts[: len(masks)]):
            if (match := _DESCRIPTION.search(text)) is None:
                raise ValueError(
                    f"description {number + 1} is not of the form '<region1>: text': {text[:80]!r}"
                )
            turns.append(Turn("", match[1], (number,), phrases="detailed", slot=REGION))
        image = self._images.read(self._image_name(sample))
        return Record(sample_id, image, masks, tuple(turns), opening=_OPENING)
