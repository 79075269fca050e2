"""Chips by name, for compiling without them: `libtpu` compiles for all TPUs, JAX's CUDA plugin for GPUs."""

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from osprey_jax import gpu_targets
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
_EXAMPLES = (
    "v4-32 (16 chips), v5p-32 (16), v5e-64, v6e-16, 2xv5e-64 (two slices), shapes such as v5e:2x4, "
    "and the GPUs h200, h100 and h200-8"
)


class Topology(NamedTuple):
    """The chips of a slice, each of which is one device."""

    name: str
    devices: Sequence[jax.Device]
    memory: float
    """Bytes of one chip that programs may use."""
    most: float
    """What they could be made to use."""
    caveat: str = ""
    """What the compiler can't know without the chip."""


def open_topology(name: str) -> Topology:
    """Describes a slice by its cloud name, as `v5e-64`, or its shape, as `v5e:8x8`; or GPUs, as `h200-8`.

    `2xv5e-64` are two slices.

    Raises ValueError where there is no such slice, or nothing to compile for it.
    """
    if name.lower().partition("-")[0] in gpu_targets.GPUS:
        return _open_gpus(name)
    several = re.fullmatch(r"([2-9]|[1-9]\d+)x(.*)", name)
    kind, shape = _shape(several[2] if several else name)
    sizes = [int(size) for size in shape.split("x")]
    # A host has four chips, or fewer in slices that are smaller.
    bounds = tuple(min(size, most) for size, most in zip([*sizes, 1][:3], (2, 2, 1), strict=True))
    # Nothing runs; these keep libtpu from looking for a chip and its neighbours, and from being taken alone.
    for key, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "true"),
    ):
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {"chip_config_name": "megacore"} if _CORES[kind] == 2 else {}
    options |= {"num_slices": int(several[1])} if several else {}
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
    memory = _memory(devices[0])
    return Topology(name, devices, memory, most=memory)


def _open_gpus(name: str) -> Topology:
    """One GPU or those of one host; nothing is tuned, as that means to try what is faster.

    Of a card's memory programs get the part that JAX takes at its start (`gpu_targets.memory_fraction`).
    """
    kind, _, count = name.lower().partition("-")
    if count and count not in map(str, gpu_targets.COUNTS):
        named = ", ".join(f"{kind}-{size}" for size in gpu_targets.COUNTS[1:])
        raise ValueError(f"no GPUs {name}: of {kind} there are {kind}, {named}")
    gpu = gpu_targets.GPUS[kind]
    fraction = gpu_targets.memory_fraction()
    # Nothing runs; else the plugin insists on all of CUDA's libraries, or takes a card's memory.
    if not jax.config.jax_platforms:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")
    # The plugin tells several times that there is no driver.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    try:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=gpu_targets.target_config(gpu), topology=f"1x1x{count or 1}"
        )
    except NotImplementedError as error:
        plugin = f"jax-cuda12-pjrt=={jax.__version__}"
        raise ValueError(
            f"compiling for {name} needs JAX's CUDA plugin, but no GPU: pip install --no-deps {plugin} "
            f"({first_line(error)})"
        ) from None
    return Topology(
        name,
        list(found.devices),
        gpu.memory * fraction,
        most=gpu.memory * max(fraction, gpu_targets.MOST),
        caveat=f"JAX takes {fraction:.0%} of {gpu.memory / 2**30:.2f} GiB (XLA_CLIENT_MEM_FRACTION); "
        "kernels are not tuned and workspaces of cuDNN not counted, for both are chosen on the card",
    )


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
