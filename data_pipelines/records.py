"""What every data set is turned into: one conversation about regions of one image."""

import dataclasses
from typing import Protocol

import numpy as np

from osprey_jax.prompt import REGION


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """An image, regions of it, and a conversation in the final strings of the prompt.

    Raises ValueError where the conversation names another number of regions than there are masks.
    """

    sample_id: str
    """Names the sample in messages: source, split and key."""
    image: np.ndarray | bytes
    """uint8 (h, w, 3), or the bytes of an encoded file."""
    masks: np.ndarray
    """bool (R, h, w): one for each `<mask><pos>` of the conversation, in order of appearance; a region that
    is named twice is there twice."""
    turns: tuple[tuple[str, str], ...]
    """Questions and answers; the first question starts with `<image>` and a newline."""

    def __post_init__(self) -> None:
        named = sum(text.count(REGION) for turn in self.turns for text in turn)
        if named != len(self.masks):
            raise ValueError(f"{self.sample_id}: {named} {REGION} in the text but {len(self.masks)} masks")


class Source(Protocol):
    """A data set: records by index, the same ones each time, so that an epoch can be shuffled and resumed."""

    @property
    def name(self) -> str:
        """Names the source in configurations and messages."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...
