"""Several processes that compute as one: how a process is told of the others, and what they agree on.

A lone process needs none of it, and every function here costs it nothing.
"""

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from osprey_jax.sharding import partition_spec

TOLD_BY = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Where the first process listens (HOST:PORT), how many there are, and which one this is, from 0."""
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
"""How many tasks srun and mpirun have started. Not SLURM_NTASKS: batch scripts have it, too, and are one."""
HEARTBEAT_SECONDS = 100
"""After so long without a sign of a process the others end. Where its sockets close they notice at once."""


def join(environ: Mapping[str, str] = os.environ) -> None:
    """Joins the cluster that this process is part of, if it is part of one; before JAX finds its devices.

    It is told by the variables of `TOLD_BY`, or, as `jax.distributed.initialize` finds out by itself, by
    srun, mpirun, or what surrounds a TPU. Raises ValueError where only some of the variables are set.
    """
    given = [name for name in TOLD_BY if environ.get(name)]
    told: dict[str, Any] = {}
    if given:
        if lacking := [name for name in TOLD_BY if name not in given]:
            raise ValueError(f"{', '.join(given)} is set, but not {', '.join(lacking)}")
        try:
            count, number = (int(environ[name]) for name in TOLD_BY[1:])
        except ValueError as error:
            raise ValueError(f"{' and '.join(TOLD_BY[1:])} must be numbers: {error}") from None
        if not 0 <= number < count:
            raise ValueError(f"JAX_PROCESS_ID must be from 0 to {count - 1}, got {number}")
        told = {
            "coordinator_address": environ[TOLD_BY[0]],
            "num_processes": count,
            "process_id": number,
            "cluster_detection_method": "deactivate",
        }
    elif not (_is_launched(environ) or (environ.get("JAX_PLATFORMS") != "cpu" and _has_chips())):
        return
    # It would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**told, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except RuntimeError as error:
        raise ValueError(f"cannot join the cluster: {error}") from error
    except ValueError:
        if told:
            raise
        return  # a device file that looks like a chip's, and nothing around it
    sys.excepthook = _end_at_once


def _is_launched(environ: Mapping[str, str]) -> bool:
    counts = [environ.get(name, "") for name in LAUNCHERS]
    return any(count.isdecimal() and int(count) > 1 for count in counts)


def _has_chips() -> bool:
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _end_at_once(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Python's own end would wait for processes that wait for this one."""
    traceback.print_exception(kind, error, where)
    sys.stderr.flush()
    os._exit(1)


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def is_several() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def check_mesh(mesh: Mesh) -> None:
    """Raises ValueError where the processes would not have shares of a batch of the same size."""
    if not is_several():
        return
    shards: dict[int, set[str]] = {index: set() for index in range(jax.process_count())}
    batch = NamedSharding(mesh, partition_spec(("batch",)))
    device: Any
    for device, slices in batch.devices_indices_map((mesh.size,)).items():
        shards[device.process_index].add(str(slices))
    found = [len(each) for each in shards.values()]
    if len({*found}) > 1 or sum(found) != len(set.union(*shards.values())):
        raise ValueError(
            f"the mesh {dict(mesh.shape)} doesn't give each of {len(found)} processes a part of the batch of "
            "its own: let the tensor axis lie inside a process, and the mesh take all devices"
        )


def all_of(fine: bool) -> bool:
    """Whether it is so in every process; waits for all of them."""
    return least(int(fine)) > 0


def least(number: int) -> int:
    """The smallest of the processes' numbers; waits for all of them."""
    if not is_several():
        return number
    return int(np.min(multihost_utils.process_allgather(np.int32(number))))


class Stop:
    """Whether any process wants to stop: all of them hear it before the same step, and none waits for it.

    What a process wants goes on its way before a step, and is read before the next one, when the devices are
    done with it and busy with that step.
    """

    def __init__(self, mesh: Mesh, wanted: Callable[[], object]):
        """`wanted` is asked before each step."""
        self._wanted = wanted
        self._asked: jax.Array | None = None
        self._sharding = NamedSharding(mesh, partition_spec(("batch",)))
        self._shards = len({*map(str, self._sharding.devices_indices_map((mesh.size,)).values())})
        everywhere = NamedSharding(mesh, partition_spec(()))
        self._any = jax.jit(jnp.any, out_shardings=everywhere)

    def __call__(self) -> bool:
        """To be called by all processes, once before each step."""
        wanted = bool(self._wanted())
        if not is_several():
            return wanted
        own = np.full(self._shards // jax.process_count(), wanted)
        before = self._asked
        self._asked = self._any(jax.make_array_from_process_local_data(self._sharding, own))
        return before is not None and bool(before)
