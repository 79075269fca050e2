"""Which sample comes at which place of the stream: shuffling, mixture, grouping and each host's share."""

import dataclasses
import functools
import hashlib
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


Place = tuple[Key, ...]
"""What one place of the stream holds: one sample, or several about one image."""


@dataclasses.dataclass(frozen=True)
class Groups:
    """Samples that stand at one place together, by the place's number."""

    sources: np.ndarray
    """int32, of all samples, group after group."""
    records: np.ndarray
    """int64, of the same."""
    ends: np.ndarray
    """int64, behind each group's last sample."""

    def __len__(self) -> int:
        return len(self.ends)

    def __call__(self, index: int, _: int) -> Place:
        """The place of this number, counted on from epoch to epoch."""
        epoch, group = divmod(index, len(self))
        start = self.ends[group - 1] if group else 0
        members = range(int(start), int(self.ends[group]))
        return tuple(Key(int(self.sources[m]), epoch, int(self.records[m])) for m in members)


def group_by_image(sources: Sequence[Source], numbers: Sequence[int], *, most: int) -> Groups:
    """Groups of at most `most` samples that have an image in common, of the sources of these numbers."""
    of_source = np.concatenate([np.full(len(sources[number]), number, np.int32) for number in numbers])
    of_record = np.concatenate([np.arange(len(sources[number]), dtype=np.int64) for number in numbers])
    keys = np.fromiter(
        (
            _hash(sources[number].image_key(index))
            for number in numbers
            for index in range(len(sources[number]))
        ),
        np.uint64,
        len(of_source),
    )
    # Where an image comes first decides, not its name: data that were moved keep their order.
    _, first, image = np.unique(keys, return_index=True, return_inverse=True)
    by_image = np.argsort(first[image], kind="stable")
    begins = np.flatnonzero(np.diff(first[image][by_image], prepend=-1))
    sizes = np.diff(begins, append=len(keys))
    ends = [
        begin + min(end, size)
        for begin, size in zip(begins.tolist(), sizes.tolist(), strict=True)
        for end in range(most, size + most, most)
    ]
    return Groups(of_source[by_image], of_record[by_image], np.array(ends, np.int64))


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _alone(source: int, size: int, place: int, _: int) -> Place:
    return (Key(source, *divmod(place, size)),)


def order(
    sources: Sequence[Source], *, weights: Sequence[float] | None, seed: int, share_image: int = 1
) -> grain.MapDataset[Place]:
    """The endless order of samples; every epoch is shuffled anew.

    Without weights all sources are shuffled into one another, so that an epoch has every sample once; with
    weights they take turns, each in its own order and its own epochs. With `share_image` above 1 so many
    samples of one image stand at one place; with weights only samples of one source do.
    """
    numbers = range(len(sources))
    if share_image > 1:
        pools = [numbers] if weights is None else [[number] for number in numbers]
        groups = [group_by_image(sources, pool, most=share_image) for pool in pools]
        places = [grain.MapDataset.range(len(each)).map_with_index(each) for each in groups]
    else:
        places = [
            grain.MapDataset.range(len(source)).map_with_index(functools.partial(_alone, number, len(source)))
            for number, source in enumerate(sources)
        ]
    # Grain adds the epoch to a seed: drawn ones keep the orders of neighbouring seeds apart.
    seeds = [int(word) for word in np.random.SeedSequence(seed).generate_state(len(places))]
    if weights is None:
        return grain.MapDataset.concatenate(places).shuffle(seeds[0]).repeat()
    shuffled = [part.shuffle(s).repeat() for part, s in zip(places, seeds, strict=True)]
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
