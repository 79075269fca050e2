"""What every data set is turned into: an image, regions of it, and what is said about them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from osprey_jax.prompt import REGION

Rle = Mapping[str, Any]
"""COCO's compressed run lengths of one mask: `size` [h, w] and `counts`, a str."""


class Turn(NamedTuple):
    """A question and its answer; `<mask><pos>` in them stand for regions, in order of appearance."""

    question: str
    """Without the opening. Where `phrases` are named, one of them, drawn, comes before it."""
    answer: str
    regions: tuple[int, ...] = ()
    """For each `<mask><pos>`, the phrase's included, the index of its mask in the record."""
    phrases: str = ""
    """Names one of `paraphrases.PHRASES`, or nothing."""
    slot: str = ""
    """What is put into the place that such a phrase has for it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One sample of a data set, with all of its regions and before anything is drawn.

    Raises ValueError where texts name another number of regions than they have, or regions that aren't there.
    """

    sample_id: str
    """Names the sample in messages: source and key."""
    image: np.ndarray | bytes | None
    """uint8 (h, w, 3), or the bytes of an encoded file; None for a conversation about nothing to be seen."""
    masks: tuple[Rle, ...]
    """All of one size, the image's."""
    turns: tuple[Turn, ...]
    opening: str = ""
    """Precedes whichever question is first; with an image it starts with `<image>` and a newline."""
    opening_regions: tuple[int, ...] = ()
    """The regions of the opening, as in `Turn.regions`."""
    broken_regions: tuple[str, ...] = ()
    """What is wrong with regions of the sample that are left out, with their turns; a message for each."""
    at_most: int = 0
    """Where it isn't 0, turns don't depend on each other: they are shuffled and so many are kept."""
    plain: bool = False
    """Image-text alignment's template: no question, no system text, the answer is the image's caption."""

    def __post_init__(self) -> None:
        texts = [(self.opening, self.opening_regions)]
        texts += [(turn.question + turn.slot + turn.answer, turn.regions) for turn in self.turns]
        for text, regions in texts:
            if (named := text.count(REGION)) != len(regions):
                raise ValueError(f"{named} {REGION} in the text but {len(regions)} regions: {text[:80]!r}")
            if missing := [index for index in regions if not 0 <= index < len(self.masks)]:
                raise ValueError(f"region {missing[0] + 1} is named, there are {len(self.masks)} masks")


class Source(Protocol):
    """A data set: records by index, the same ones each time, so that an epoch can be shuffled and resumed."""

    @property
    def name(self) -> str:
        """Names the source in configurations and messages."""
        ...

    @property
    def dropped(self) -> Mapping[str, int]:
        """Samples of the files that aren't counted and have no index, by the reason."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises ValueError or OSError, which say what is wrong, for a sample that can't be used."""
        ...

    def image_key(self, index: int) -> str:
        """Names a record's image without reading it: the same for one image in whatever source."""
        ...
