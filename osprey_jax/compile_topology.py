"""The training step compiled for TPUs or GPUs that needn't be here: whether it fits, and what it costs."""

import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import Mesh
from ml_collections import ConfigDict

from osprey_jax import flops, sharding
from osprey_jax.batch import Batch
from osprey_jax.checkpoint import first_line
from osprey_jax.config import from_config
from osprey_jax.gpu_targets import MOST
from osprey_jax.hlo import collectives
from osprey_jax.models.osprey import Osprey
from osprey_jax.optim import TrainState
from osprey_jax.topologies import open_topology
from osprey_jax.train_step import (
    abstract_batch,
    make_lora,
    make_loss_sums,
    make_mesh,
    make_optimizer,
    make_state,
    make_update,
)

GIB = 1 << 30


def compile_topology(config: ConfigDict, name: str, *, say: Callable[[str], None]) -> bool:
    """Compiles the step of a configuration for TPUs or GPUs; tells what it takes, and last whether it fits.

    Neither data nor checkpoints are needed: sizes are those of `config.model` and of the largest bucket.
    Raises ValueError for a slice that doesn't exist, or that the configuration's mesh or batch doesn't fit.
    """
    topology = open_topology(name)
    mesh = make_mesh(config, topology.devices)
    model_config = from_config(config.model.to_dict())
    lora = make_lora(config)
    model = Osprey(model_config, jnp.dtype(config.dtype), remat=config.remat, lora=lora)
    _, state = make_state(config, model_config, mesh)
    batch = abstract_batch(config, model_config, mesh)
    optimizer = make_optimizer(config, steps=1000)
    update = make_update(model, optimizer, accumulation=config.accumulation)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    chips, limit = len(topology.devices), topology.memory
    say(f"{name}: {chips} chips of {limit / GIB:.2f} GiB, mesh {dict(mesh.shape)}, batch {config.batch_size}")
    trained = _shard_bytes(state.trained)
    begin = time.monotonic()
    with sharding.use_mesh(mesh):
        lowered = jax.jit(update, donate_argnums=0, out_shardings=(places, None)).lower(state, batch)
        counted = flops.count(jax.make_jaxpr(update)(state, batch).jaxpr)
        kept = activations(config, model, state, batch, mesh)
        advice = _advice(config, mesh, trained=trained, kept=kept)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if (needed := re.search(r"\(([0-9.]+)([GT])\) exceeds available HBM", str(error))) is None:
                raise
            least = float(needed[1]) * (1024 if needed[2] == "T" else 1)
            say(f"doesn't fit: temporaries alone need {least:.2f} GiB a chip; {advice}")
            return False
    say(f"compiled in {time.monotonic() - begin:.0f} s")
    memory = compiled.memory_analysis()
    assert memory is not None, "compilers for chips tell it"
    rows = {
        "parameters": _shard_bytes((state.trained, state.frozen)),
        "optimizer": _shard_bytes((state.mu, state.nu)),
        "batch": _shard_bytes(batch),
        "activations": min(kept, memory.temp_size_in_bytes),
        "temporaries": max(memory.temp_size_in_bytes - kept, 0),
    }
    # What isn't written into the place of an argument.
    if results := memory.output_size_in_bytes - memory.alias_size_in_bytes:
        rows["results"] = results
    if code := memory.generated_code_size_in_bytes:  # not told for GPUs
        rows["program"] = code
    for kind, size in rows.items():
        estimated = " (estimate)" if kind == "activations" else ""
        say(f"  {kind:<12}{size / GIB:9.3f} GiB a chip{estimated}")
    if topology.caveat:
        say(f"  {topology.caveat}")
    tokens = config.batch_size * config.data.buckets[-1][0]
    say(f"{counted / 1e12:,.1f} TFLOP a step, recomputation included: {counted / chips / 1e12:,.2f} a chip, "
        f"{counted / tokens / 1e9:,.2f} GFLOP a token")  # fmt: skip
    for line in _collectives(compiled):
        say(line)
    total = sum(rows.values())
    if total > limit:
        if total <= topology.most:
            advice = f"let JAX take more of the card: XLA_CLIENT_MEM_FRACTION={MOST}; or {advice}"
        say(f"doesn't fit: {total / GIB:.2f} of {limit / GIB:.2f} GiB a chip; {advice}")
        return False
    say(f"fits: {total / GIB:.2f} of {limit / GIB:.2f} GiB a chip")
    return True


def _collectives(compiled: jax.stages.Compiled) -> Iterator[str]:
    """A line for each kind of collective."""
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        # JAX 0.10.2 can't read what libtpu 0.0.52 makes for v5p, whose sparse cores send on their own.
        yield f"  collectives unknown, as this JAX can't read the program: {first_line(error)}"
        return
    assert text is not None, "compilers for chips tell it"
    for kind, found in collectives(text).items():
        yield (
            f"  {kind:<19}{found.runs:7,} a step, {found.bytes / GIB:8.3f} GiB a chip, "
            f"largest {found.largest / 2**20:8.2f} MiB"
        )


def activations(config: ConfigDict, model: Osprey, state: TrainState, batch: Batch, mesh: Mesh) -> int:
    """An estimate of what a chip keeps from the forward to the backward pass, in bytes.

    Everything that differentiation keeps beside the parameters themselves, split as the batch is.
    """
    part = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0] // config.accumulation, *x.shape[1:]), x.dtype), batch
    )
    loss = make_loss_sums(model)
    traced = jax.make_jaxpr(
        lambda trained, frozen, batch: jax.vjp(lambda p: loss(p, frozen, batch), trained, has_aux=True)[1]
    )(state.trained, state.frozen, part)
    given = set(traced.jaxpr.invars)
    kept: set[Any] = {x for x in traced.jaxpr.outvars if isinstance(x, core.Var) and x not in given}
    size = sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in kept)
    return size // sharding.batch_shards(mesh)


def _shard_bytes(tree: Any) -> int:
    """What one device holds of arrays that know their places."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _advice(config: ConfigDict, mesh: Mesh, *, trained: int, kept: int) -> str:
    """The knob to turn next, the cheapest first; `trained` parameters and `kept` activations are in bytes."""
    shards = sharding.batch_shards(mesh)
    rows = config.batch_size // config.accumulation // shards
    # Where there are parts, their gradients are summed up beside those of the part at hand.
    sums = trained if config.accumulation == 1 else 0
    if config.remat == "none":
        return "recompute more: --config.remat=full"
    if rows > 1 and kept // 2 > sums:
        parts = next(count for count in range(2, rows + 1) if rows % count == 0)
        return f"compute a batch in more parts: --config.accumulation={config.accumulation * parts}"
    if config.remat != "full":
        return "recompute more: --config.remat=full"
    if mesh.shape["data"] % 2 == 0 and not config.mesh.data:
        return f"split parameters more: --config.mesh.fsdp={config.mesh.fsdp * 2}"
    if config.mu_dtype == "float32" and trained > kept:
        return "keep first moments in two bytes: --config.mu_dtype=bfloat16"
    if rows > 1:
        return f"take a smaller batch: --config.batch_size={rows // 2 * config.accumulation * shards}"
    return "take more chips"
