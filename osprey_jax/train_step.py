"""One step of training: the mesh it runs on, the state it changes, and how. It knows no data and no run."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from osprey_jax import sharding, train_config
from osprey_jax.batch import Batch
from osprey_jax.checkpoint import flatten, load_params
from osprey_jax.config import OspreyConfig
from osprey_jax.lora import Lora, without_adapters
from osprey_jax.loss import chunked_loss_sums
from osprey_jax.masks import MaskPyramid
from osprey_jax.models.osprey import Osprey, apply, boxed_params, init_params
from osprey_jax.optim import AdamW, TrainState, init_state, merge, partition
from osprey_jax.typing import Array, Params


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the configuration, by default of all devices there are.

    Raises ValueError where it or the batch doesn't fit them.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.mesh.to_dict()
    if not sizes["data"]:
        others = math.prod(size for axis, size in sizes.items() if axis != "data")
        sizes["data"] = max(len(devices) // max(others, 1), 1)
    try:
        mesh = sharding.make_mesh(**sizes, devices=devices)
    except ValueError as error:
        raise ValueError(f"{error}; override config.mesh, as in --config.mesh.fsdp=1") from error
    train_config.check_batch(config, shards=sharding.batch_shards(mesh))
    return mesh


def make_optimizer(config: ConfigDict, *, steps: int) -> AdamW:
    """The optimizer of a run of so many steps."""
    return AdamW(
        peak_learning_rate=config.learning_rate,
        warmup_steps=math.ceil(config.warmup * steps),
        total_steps=steps,
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        spike=config.spike,
        skip_spikes=config.skip_spikes,
    )


def make_lora(config: ConfigDict) -> Lora | None:
    """The adapters that are asked for. Raises ValueError for a target that is no regular expression."""
    lora = config.lora
    return Lora(rank=lora.rank, alpha=lora.alpha, targets=tuple(lora.targets)) if lora.rank else None


def make_state(
    config: ConfigDict, model_config: OspreyConfig, mesh: Mesh, *, origin: Path | None = None
) -> tuple[Callable[[], TrainState], TrainState]:
    """How to create the first state, sharded, and its `jax.ShapeDtypeStruct`s with shardings.

    Parameters are those of the checkpoint `origin`, or fresh ones.
    Raises ValueError for a pattern of `config.trained`, or a target of `config.lora`, that matches nothing.
    """
    lora = make_lora(config)

    def begin(params: Params) -> TrainState:
        dtypes = {"frozen_dtype": config.frozen_dtype, "mu_dtype": config.mu_dtype}
        return init_state(params, config.trained, **dtypes)

    def init(key: Array) -> TrainState:
        return begin(init_params(model_config, key, lora=lora))

    def adapt(params: Params, key: Array) -> TrainState:
        # Of the fresh parameters only adapters are used, so the compiler drops all the others.
        return begin(merge(init_params(model_config, key, lora=lora), params))

    places = sharding.param_shardings(boxed_params(model_config, lora=lora), mesh)
    if lora is not None:
        inside = [path for path in flatten(places) if path.startswith("decoder/layers/")]
        kernels = [path for path in inside if path.endswith("/kernel")]
        lora.check_targets(path.removesuffix("/kernel") for path in kernels)
    trained, frozen = partition(places, config.trained)
    everywhere: Any = NamedSharding(mesh, sharding.partition_spec(()))
    shardings = TrainState(
        step=everywhere, trained=trained, frozen=frozen, mu=trained, nu=trained, log_norm=everywhere
    )
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(init, jax.random.key(0)),
        shardings,
    )
    # Runs once: on a CPU, optimising the program takes longer than the program.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None

    def create() -> TrainState:
        key = jax.random.key(config.seed)
        if origin is not None:
            params = load_params(origin, without_adapters(abstract.params))
            if lora is None:
                return jax.jit(begin, out_shardings=shardings, donate_argnums=0)(params)
            return jax.jit(adapt, out_shardings=shardings, donate_argnums=0)(params, key)
        return jax.jit(init, out_shardings=shardings, compiler_options=options)(key)

    return create, abstract


def abstract_batch(config: ConfigDict, model_config: OspreyConfig, mesh: Mesh) -> Batch:
    """Shapes of the largest batch, placed as `batch.to_device` does."""
    length, regions = max(config.data.buckets)
    rows, images, vision = config.batch_size, config.data.images_per_row, model_config.vision
    place = NamedSharding(mesh, sharding.partition_spec(("batch",)))

    def array(dtype: str, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), jnp.dtype(dtype), sharding=place)

    side, position = vision.image_size, model_config.extractor.position_size
    ids = array("int32", length)
    return Batch(
        images=array("float32", images, side, side, 3),
        masks=MaskPyramid(
            levels=tuple(array("bool", images, regions, size, size) for size in vision.level_sizes),
            position=array("float32", images, regions, position, position),
        ),
        input_ids=ids,
        labels=ids,
        loss_weights=array("float32", length),
        positions=ids,
        segment_ids=ids,
        prefix_segment_ids=ids,
    )


def make_update(
    model: Osprey, optimizer: AdamW, *, accumulation: int
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The training step: from a state and a batch to the next state and the step's numbers."""
    loss_and_gradients = make_gradients(model, accumulation=accumulation)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        loss, gradients = loss_and_gradients(state.trained, state.frozen, batch)
        state, numbers = optimizer.update(state, gradients)
        tokens = jnp.sum(batch.segment_ids != 0, dtype=jnp.int32)
        return state, {"loss": loss, **numbers, "tokens": tokens}

    return update


def make_gradients(
    model: Osprey, *, accumulation: int
) -> Callable[[Params, Params, Batch], tuple[Array, Params]]:
    """The loss of a batch and its gradients, as a function of trained parameters, frozen ones and batch."""
    sums_and_gradients = jax.value_and_grad(make_loss_sums(model), has_aux=True)

    def gradients(trained: Params, frozen: Params, batch: Batch) -> tuple[Array, Params]:
        def add(total: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, sums_and_gradients(trained, frozen, part)), None

        if accumulation == 1:
            total = sums_and_gradients(trained, frozen, batch)
        else:
            # A part takes every accumulation-th row, so that no row changes its device.
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
            zeros = (jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, trained)
            total, _ = jax.lax.scan(add, zeros, parts)
        # Divided once, by the weights of the whole batch: the mean over dialogues, however they were parted.
        (loss, weight), gradients = total
        return loss / weight, jax.tree.map(lambda g: g / weight, gradients)

    return gradients


def make_loss_sums(model: Osprey) -> Callable[[Params, Params, Batch], tuple[Array, Array]]:
    """`loss_sums` of a batch as a function of the trained and the frozen parameters."""

    def sums(trained: Params, frozen: Params, batch: Batch) -> tuple[Array, Array]:
        params = merge(trained, frozen)
        hidden = apply(
            model,
            params,
            Osprey.hidden,
            *jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (batch.images, batch.masks)),
            batch.input_ids,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            prefix_segment_ids=batch.prefix_segment_ids,
        )
        head = partial(apply, model, params, Osprey.logits)
        return chunked_loss_sums(head, hidden, jnp.asarray(batch.labels), jnp.asarray(batch.loss_weights))

    return sums
