"""How the work is cut: images into units that are answered in one go, units into shards for hosts."""

import dataclasses
import math

import numpy as np

UNIT_IMAGES, UNIT_REGIONS = 32, 1024
"""Bounds of a unit. One image may have more regions than that, if the file doesn't say how many it has."""
SHARD_IMAGES = 5000
"""Images of a shard, about, unless another number of shards is asked for."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Consecutive images are a unit, consecutive units a shard."""

    starts: np.ndarray
    """Int `(units + 1,)`: the first image of each unit, and how many images there are."""
    shards: int

    @property
    def num_units(self) -> int:
        """Of all shards."""
        return len(self.starts) - 1

    def images(self, unit: int) -> range:
        """The images of a unit."""
        return range(int(self.starts[unit]), int(self.starts[unit + 1]))

    def units(self, shard: int) -> range:
        """The units of a shard; none where there are fewer units than shards."""
        return range(shard * self.num_units // self.shards, (shard + 1) * self.num_units // self.shards)

    def shards_of(self, host: int, hosts: int) -> range:
        """Which shards a host writes: every one is some host's and no other's."""
        return range(host, self.shards, hosts)


def make_plan(images: int, counts: np.ndarray | None, shards: int) -> Plan:
    """Cuts images, of whose regions there are `counts` if that is known."""
    if counts is None:
        return Plan(np.append(np.arange(0, images, UNIT_IMAGES), images), shards)
    starts, regions = [0], 0
    for image, count in enumerate(counts.tolist()):
        held = image - starts[-1]
        if held and (held == UNIT_IMAGES or regions + count > UNIT_REGIONS):
            starts.append(image)
            regions = 0
        regions += count
    return Plan(np.array([*starts, images]), shards)


def usual_shards(images: int, hosts: int) -> int:
    """How many shards are made where nobody says so: at least one for each host."""
    return max(hosts, math.ceil(images / SHARD_IMAGES), 1)
