"""What is about to be trained, on what, and how long that may take."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from osprey_jax import flops
from osprey_jax.batch import Batch
from osprey_jax.config import from_config
from osprey_jax.metrics import duration
from osprey_jax.models.osprey import Osprey
from osprey_jax.optim import TrainState
from osprey_jax.train_step import abstract_batch, make_gradients

LIKELY_MFU = 0.4
"""What well-kept code reaches with such models."""


def summary(
    state: TrainState,
    mesh: Mesh,
    config: ConfigDict,
    *,
    operations: Callable[[Batch], int],
    step: int,
    steps: int,
) -> Iterator[str]:
    """Lines: parameters by part, trained and frozen; devices; what a step takes, and all that are left.

    `operations` is what `model_flops` returns.
    """
    yield "parameters      trained       frozen"
    sizes = {}
    for part in sorted({*state.trained, *state.frozen}):
        leaves = (jax.tree.leaves(tree.get(part, {})) for tree in (state.trained, state.frozen))
        sizes[part] = [sum(x.size for x in found) for found in leaves]
    sizes["all"] = [sum(column) for column in zip(*sizes.values(), strict=True)]
    for part, (trained, frozen) in sizes.items():
        yield f"  {part:<10}{trained / 1e6:9.2f} M  {frozen / 1e6:9.2f} M"
    length = config.data.buckets[-1][0]
    yield (
        f"{mesh.size} {jax.default_backend()} devices {dict(mesh.shape)}, "
        f"{config.batch_size} rows of at most {length} tokens a step, step {step} of {steps}"
    )
    if peak := mesh_peak(mesh):
        count = operations(abstract_batch(config, from_config(config.model.to_dict()), mesh))
        seconds = count / (LIKELY_MFU * peak)
        yield (
            f"{count / 1e12:,.1f} TFLOP in the largest step; at {LIKELY_MFU:.0%} of the devices' peak "
            f"that is {seconds:.2f} s, and for the steps to come {duration(seconds * (steps - step))}"
        )


def mesh_peak(mesh: Mesh) -> float | None:
    """Operations per second of all devices together; None where that isn't known."""
    peak = flops.peak(mesh.devices.flat[0])
    return None if peak is None else peak * mesh.size


def model_flops(model: Osprey, state: TrainState) -> Callable[[Batch], int]:
    """A function that counts the model's operations for a batch (`flops` has the convention).

    They are counted once for each shape of a batch. Accumulation, and layers or attention that are computed
    again, change nothing of them; the head's logits, which the loss makes twice in chunks, count twice.
    """
    # In float32 attention is the plain form, which keeps what it needs.
    gradients = make_gradients(model.clone(remat="none", dtype=jnp.dtype("float32")), accumulation=1)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state.trained, state.frozen))
    found: dict[tuple[int, ...], int] = {}

    def count(batch: Batch) -> int:
        key = (*batch.input_ids.shape, *batch.masks.position.shape)
        if key not in found:
            structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
            found[key] = flops.count(jax.make_jaxpr(gradients)(*shapes, structs).jaxpr)
        return found[key]

    return count
