"""TPU slices by name, for compiling without one: `libtpu` has the compiler for all of them."""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from osprey_jax.checkpoint import first_line

_KINDS = {"v4": "v4", "v5p": "v5p", "v5e": "v5e", "v5litepod": "v5e", "v6e": "v6e"}
_CORES = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}
"""By which Google counts in the names of slices."""
_SHAPES = {
    2: {
        4: "2x2x1",
        8: "2x2x2",
        16: "2x2x4",
        32: "2x4x4",
        64: "4x4x4",
        128: "4x4x8",
        256: "4x8x8",
        512: "8x8x8",
    },
    1: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
}
"""Of so many chips, for chips of two cores and of one."""
_EXAMPLES = "v4-32 (16 chips), v5p-32 (16), v5e-64, v6e-16, or shapes such as v5e:2x4 and v4:2x2x1"


class Topology(NamedTuple):
    """The chips of a slice, each of which is one device."""

    name: str
    devices: Sequence[jax.Device]
    memory: float
    """Bytes of one chip that programs may use."""


def open_topology(name: str) -> Topology:
    """Describes a slice by its cloud name, such as `v5e-64`, or its shape, such as `v5e:8x8`.

    Raises ValueError where there is no such slice, or no libtpu to compile for it.
    """
    kind, shape = _shape(name)
    sizes = [int(size) for size in shape.split("x")]
    # A host has four chips, or fewer in slices that are smaller.
    bounds = tuple(min(size, most) for size, most in zip([*sizes, 1][:3], (2, 2, 1), strict=True))
    # Nothing runs; these keep libtpu from looking for a chip and for its neighbours.
    for key, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost")):
        os.environ.setdefault(key, value)
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    options = {"chip_config_name": "megacore"} if _CORES[kind] == 2 else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", chips_per_host_bounds=bounds, **options
        )
    except Exception as error:  # of several types, some of them private
        why = first_line(error)
        if any(word in why for word in ("libtpu", "TPU support", "Unable to initialize")):
            raise ValueError(f"compiling for {name} needs libtpu: pip install libtpu ({why})") from None
        raise ValueError(f"no TPU slice {name}: {why}; there are {_EXAMPLES}") from None
    devices = list(found.devices)
    return Topology(name, devices, _memory(devices[0]))


def _shape(name: str) -> tuple[str, str]:
    """The kind of chip, and how its chips lie."""
    match = re.fullmatch(r"(\w+)-(\d+)|(\w+):(\d+(?:x\d+){1,2})", name)
    kind = _KINDS.get((match[1] or match[3]).lower()) if match else None
    if match is None or kind is None:
        raise ValueError(f"no TPU slice {name}: there are {_EXAMPLES}")
    dimensions = 3 if _CORES[kind] == 2 else 2
    if match[4]:
        if match[4].count("x") + 1 != dimensions:
            raise ValueError(f"{name}: chips of {kind} lie in {dimensions} dimensions, not as {match[4]}")
        return kind, match[4]
    chips, rest = divmod(int(match[2]), _CORES[kind])
    shapes = _SHAPES[_CORES[kind]]
    if rest or chips not in shapes:
        named = ", ".join(f"{kind}-{size * _CORES[kind]}" for size in shapes)
        raise ValueError(f"no TPU slice {name}: of {kind} there are {named}")
    return kind, shapes[chips]


def _memory(device: jax.Device) -> float:
    """The limit that the compiler states when it refuses a program that no chip could hold."""
    far_too_much = jax.ShapeDtypeStruct((1 << 40,), jnp.dtype("int8"), sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(far_too_much).compile()
    except jax.errors.JaxRuntimeError as error:
        if match := re.search(r"available HBM \(([0-9.]+)G\)", str(error)):
            return float(match[1]) * 2**30
        raise
    raise AssertionError("a program of a tebibyte was compiled")
