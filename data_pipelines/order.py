"""Which sample comes at which place of the stream: shuffling, mixture and each host's share."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from data_pipelines.records import Source


class Key(NamedTuple):
    """Names one sample of one epoch."""

    source: int
    """Number of the source."""
    epoch: int
    """How often the source was gone through before."""
    record: int
    """Index in the source."""


def _key(source: int, size: int, place: int, _: int) -> Key:
    return Key(source, *divmod(place, size))


def order(sources: Sequence[Source], *, weights: Sequence[float] | None, seed: int) -> grain.MapDataset[Key]:
    """The endless order of samples; every epoch is shuffled anew.

    Without weights all sources are shuffled into one another, so that an epoch has every sample once; with
    weights they take turns, each in its own order and its own epochs.
    """
    keys = [
        grain.MapDataset.range(len(source)).map_with_index(functools.partial(_key, number, len(source)))
        for number, source in enumerate(sources)
    ]
    # Grain adds the epoch to a seed: drawn ones keep the orders of neighbouring seeds apart.
    seeds = [int(word) for word in np.random.SeedSequence(seed).generate_state(len(keys))]
    if weights is None:
        return grain.MapDataset.concatenate(keys).shuffle(seeds[0]).repeat()
    shuffled = [part.shuffle(s).repeat() for part, s in zip(keys, seeds, strict=True)]
    return grain.MapDataset.mix(shuffled, weights)


@dataclasses.dataclass(frozen=True)
class HostShare(grain.transforms.DatasetSelectionMap):  # type: ignore[misc] # Grain has no types
    """A host's rows of each global batch, which is the same batch whatever the number of hosts."""

    rows: int
    host: int
    num_hosts: int

    def __len__(self) -> int:
        return sys.maxsize // self.num_hosts

    def __getitem__(self, index: int) -> tuple[int, int]:
        step, row = divmod(index, self.rows)
        return 0, (step * self.num_hosts + self.host) * self.rows + row
