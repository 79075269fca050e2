"""The scenes as a source of records; nothing is stored, an index is all that a record takes."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from data_pipelines.records import Record
from data_pipelines.shapes.conversations import KINDS, converse
from data_pipelines.shapes.scene import Scene, render
from osprey_jax.masks import encode_rle

SPLITS = ("train", "held_out")
"""Scenes of different splits are never the same, whatever their seeds."""

_MIN_SIZE = 64
"""Side in pixels below which textures can't be told apart."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """One conversation about one rendered scene for each index; the same on every machine.

    Raises ValueError for an unknown split or kind, a negative seed or count, or a size below 64.
    """

    seed: int = 0
    count: int = 1_000_000
    _: dataclasses.KW_ONLY
    size: int = 96
    """Side of the square scenes in pixels."""
    split: str = "train"
    kinds: tuple[str, ...] | None = None
    """What conversations are drawn from, by the weights in `KINDS`; None for all."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if self.kinds is not None and (not self.kinds or not set(self.kinds) <= KINDS.keys()):
            raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {self.kinds!r}")
        if self.seed < 0 or self.count < 0:
            raise ValueError(f"seed and count can't be negative, got {self.seed} and {self.count}")
        if self.size < _MIN_SIZE:
            raise ValueError(f"size must be at least {_MIN_SIZE}, got {self.size}")

    @property
    def name(self) -> str:
        """Names the source in configurations and messages."""
        return "shapes"

    @property
    def dropped(self) -> Mapping[str, int]:
        """Nothing ever is."""
        return {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        scene = self.scene(index)
        said = converse(scene, self._rng(index, "words"), kinds=self.kinds or tuple(KINDS))
        return Record(
            sample_id=self.image_key(index),
            image=scene.image,
            masks=tuple(encode_rle(scene.masks[region]) for region in said.regions),
            turns=said.turns,
            opening=said.opening,
            opening_regions=said.opening_regions,
        )

    def image_key(self, index: int) -> str:
        """Each record has a scene of its own."""
        return f"{self.name}/{self.split}/{self.seed}/{index}"

    def scene(self, index: int) -> Scene:
        """The scene that the record of this index is about; IndexError outside of 0 to `count` - 1."""
        if not 0 <= index < self.count:
            raise IndexError(f"no scene {index} among {self.count}")
        return render(self._rng(index, "scene"), size=self.size, parity=SPLITS.index(self.split))

    def _rng(self, index: int, use: str) -> np.random.Generator:
        key = (SPLITS.index(self.split), ("scene", "words").index(use), int(index))
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=key)))
