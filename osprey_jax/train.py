"""Trains a model, from the first step or from wherever an earlier start of the same command got to.

    python -m osprey_jax.train --config=configs/tiny.py --workdir=runs/tiny

The run's directory gets `checkpoints/<step>`, `metrics.jsonl`, `tensorboard/`, `skipped-<process>.jsonl` if
samples can't be used, and, at the end, `export/`, which `osprey_jax.Osprey.load` reads as it does every
checkpoint. SIGTERM and Ctrl-C save and stop; the same command goes on from there, and after a crash from the
newest whole checkpoint, with the losses it would have had anyway. Exit status: 0 trained or stopped, 1 failed
on the way, 2 refused to begin.
"""

import contextlib
import itertools
import math
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from data_pipelines import catalog
from data_pipelines.pipeline import FailingSamples, Loader, make_loader
from data_pipelines.records import Source
from data_pipelines.shapes.source import Shapes
from data_pipelines.shapes.tokenizer import train_tokenizer
from data_pipelines.watched import ABANDONED, WorkerDied
from osprey_jax import sharding, train_config
from osprey_jax.batch import Batch, to_device
from osprey_jax.checkpoint import (
    first_line,
    load_config,
    load_params,
    save_params,
)
from osprey_jax.config import OspreyConfig, from_config
from osprey_jax.directories import as_path
from osprey_jax.loss import chunked_loss_sums
from osprey_jax.metrics import Metrics
from osprey_jax.models.osprey import Osprey, apply, boxed_params, init_params
from osprey_jax.optim import AdamW, TrainState, init_state, merge, partition
from osprey_jax.prompt import SYSTEM_INFERENCE, SYSTEM_TRAINING, Tokenizer
from osprey_jax.train_config import Refused, refusals
from osprey_jax.training_checkpoints import TrainingCheckpoints, saved_steps
from osprey_jax.typing import Array, Params

SYSTEMS = {"training": SYSTEM_TRAINING, "inference": SYSTEM_INFERENCE}


HELP = "configs/base.py has every key and what it means, the files beside it what differs for a stage."


class NotFinite(ArithmeticError):
    """A loss or a gradient that is no number, and the samples that it came from."""


def train(config: ConfigDict, workdir: Path, *, stopped: Callable[[], str | None] = lambda: None) -> str:
    """Trains until the last step, or until `stopped` gives a reason to stop; returns what to tell the user.

    Raises Refused before the first step; after it OSError where a checkpoint can't be written, FailingSamples
    and NotFinite.
    """
    with refusals():
        # Devices, data and model.
        mesh = make_mesh(config)
        origin = None
        if config.init_from:
            # Its own checkpoints have its sizes and its tokenizer, too, and may have outlived it.
            before = saved_steps(workdir / "checkpoints")
            origin = workdir / "checkpoints" / str(before[-1]) if before else as_path(config.init_from)
            config = ConfigDict({**config.to_dict(), "model": load_config(origin).to_dict()})
        model_config = from_config(config.model.to_dict())
        model = Osprey(model_config, jnp.dtype(config.dtype), remat=config.remat)
        data = make_data(config, model_config, origin)
        optimizer = AdamW(
            peak_learning_rate=config.learning_rate,
            warmup_steps=math.ceil(config.warmup * data.steps),
            total_steps=data.steps,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
        )

        # The state: first as shapes that know their places on the mesh, then restored or created there.
        create, abstract = make_state(config, model_config, mesh)
        checkpoints = TrainingCheckpoints(
            workdir / "checkpoints",
            keep=config.keep_checkpoints,
            config=model_config,
            tokenizer=data.tokenizer,
        )
        train_config.claim(workdir, config, saved=len(checkpoints.steps()))
        if "://" not in str(workdir):  # where nothing can be appended to a file
            for loader in filter(None, (data.training, data.held_out)):
                loader.report = workdir / f"skipped-{jax.process_index()}.jsonl"
        checkpoints.clean_up()
        restored = checkpoints.restore_newest(abstract.to_arrays(), report=say)
        export = workdir / "export"
        if restored is None or restored.step < data.steps or not export.exists():
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
            saved, keep = len(checkpoints.steps()), config.keep_checkpoints
            train_config.check_space(workdir, checkpoint_bytes=size, keep=keep, saved=saved)
        if restored is None:
            step, state = 0, create()
        else:
            step = restored.step
            count = jax.device_put(np.int32(step), abstract.step.sharding)
            state = TrainState.from_arrays(restored.arrays, config.trained, step=count)
            data.training.set_state(restored.loader_state)

    describe(state, mesh, step=step, steps=data.steps)
    # The next state lies where the last one did, so that one program serves all steps.
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    update = make_update(model, optimizer, accumulation=config.accumulation)
    update = jax.jit(update, donate_argnums=0, out_shardings=(places, None))
    evaluate = None
    if config.eval_every and data.held_out is not None:
        evaluate = make_evaluate(model, data.held_out, config.eval_batches, mesh)
    metrics = Metrics(workdir, step=step, steps=data.steps, every=config.log_every)
    with sharding.use_mesh(mesh), contextlib.ExitStack() as stack:
        for each in (metrics, data.training, checkpoints):
            stack.callback(each.close)

        def due(every: int) -> bool:
            return every > 0 and (step % every == 0 or step == data.steps)

        def save() -> None:
            metrics.flush()
            checkpoints.save(step, state.to_arrays(), data.training.get_state())

        saved, running = step, None
        failure: Exception | None = None
        while step < data.steps and not stopped():
            try:
                batch, sample_ids = next(data.training)
            except (FailingSamples, WorkerDied) as error:
                failure = error
                break
            state, numbers = update(state, to_device(batch, mesh))
            if running is not None:
                record(metrics, *running)  # a step late, so that the devices have work meanwhile
            step += 1
            running = (step, numbers, sample_ids)
            if evaluate is not None and due(config.eval_every):
                running[1]["held_out_loss"] = evaluate(state)
            if due(config.checkpoint_every):
                record(metrics, *running)  # first, for it raises where the state is not worth saving
                running = None
                save()
                saved = step
        if running is not None:
            record(metrics, *running)
        if step > saved:
            save()
        checkpoints.wait()

    # Workers may have been told to stop as well.
    if failure is not None and not stopped():
        raise failure
    if step < data.steps:
        return f"stopped by {stopped()} after step {step}; the same command goes on from there"
    if not export.exists():
        try:
            save_params(export, state.params, model_config, data.tokenizer)
        except Exception as error:
            raise OSError(f"cannot write {export}: {first_line(error)}") from error
    if left_out := data.training.left_out():
        say(left_out)
    return f"trained for {step} steps; osprey_jax.Osprey.load({str(export)!r}) loads the model"


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
    shards = NamedSharding(mesh, sharding.partition_spec(("batch",))).num_devices // config.mesh.tensor
    train_config.check_batch(config, shards=shards)
    return mesh


class Data(NamedTuple):
    """The data of a run."""

    training: Loader
    held_out: Loader | None
    tokenizer: Tokenizer
    steps: int


def make_data(config: ConfigDict, model_config: OspreyConfig, origin: Path | None = None) -> Data:
    """Sources, tokenizer and loaders; raises ValueError for what isn't there or doesn't fit the model.

    `origin` has the tokenizer where the configuration names none.
    """
    settings = config.data
    if unknown := [name for name in settings.systems if name not in SYSTEMS]:
        raise ValueError(
            f"config.data.systems names {', '.join(unknown)}; there is {', '.join(SYSTEMS)} in this version"
        )
    if shared := {*settings.sources} & {*settings.held_out} - {"shapes"}:
        raise ValueError(f"config.data.held_out names what is trained on: {', '.join(sorted(shared))}")
    if lacking := catalog.missing([*settings.sources, *settings.held_out], settings.root):
        listed = "".join(f"\n- {line}" for line in lacking)
        raise ValueError(f"data is missing under config.data.root, which is {settings.root!r}:{listed}")
    if directory := settings.tokenizer or origin:
        tokenizer = Tokenizer.load(directory)
    else:
        with tempfile.TemporaryDirectory() as directory:
            train_tokenizer(directory)
            tokenizer = Tokenizer.load(directory)

    def source(name: str, split: str) -> Source:
        if name == "shapes":
            return Shapes(size=config.model.vision.image_size, split=split)
        return catalog.open_from_root(name, settings.root)

    def loader(names: Sequence[str], split: str, **options: Any) -> Loader:
        sources = [source(name, split) for name in names]
        for each in sources:
            if each.dropped:
                reasons = ", ".join(f"{count} {reason}" for reason, count in each.dropped.items())
                say(f"{each.name}: {len(each)} samples; left out are {reasons}")
        return make_loader(
            sources,
            tokenizer,
            model_config,
            batch_size=config.batch_size,
            buckets=settings.buckets,
            seed=config.seed,
            share_image=settings.share_image,
            images_per_row=settings.images_per_row,
            systems=[SYSTEMS[name] for name in settings.systems],
            loss_per=settings.loss_per,
            tolerance=settings.tolerance,
            host=jax.process_index(),
            num_hosts=jax.process_count(),
            **options,
        )

    ends = {"num_steps": config.steps} if config.steps else {"epochs": config.epochs}
    ahead = {key: settings[key] for key in ("workers", "threads", "prefetch")}
    training = loader(settings.sources, "train", weights=settings.weights or None, **ends, **ahead)
    assert training.num_steps is not None
    held_out = loader(settings.held_out, "held_out", threads=1, prefetch=1) if settings.held_out else None
    return Data(training, held_out, tokenizer, training.num_steps)


def make_state(
    config: ConfigDict, model_config: OspreyConfig, mesh: Mesh
) -> tuple[Callable[[], TrainState], TrainState]:
    """How to create the first state, sharded, and its `jax.ShapeDtypeStruct`s with shardings."""

    def begin(params: Params) -> TrainState:
        return init_state(params, config.trained, frozen_dtype=config.frozen_dtype)

    def init(key: Array) -> TrainState:
        return begin(init_params(model_config, key))

    places = sharding.param_shardings(boxed_params(model_config), mesh)
    trained, frozen = partition(places, config.trained)
    everywhere: Any = NamedSharding(mesh, sharding.partition_spec(()))
    shardings = TrainState(step=everywhere, trained=trained, frozen=frozen, mu=trained, nu=trained)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(init, jax.random.key(0)),
        shardings,
    )
    # Runs once: on a CPU, optimising the program takes longer than the program.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None

    def create() -> TrainState:
        if config.init_from:
            params = load_params(config.init_from, abstract.params)
            return jax.jit(begin, out_shardings=shardings, donate_argnums=0)(params)
        key = jax.random.key(config.seed)
        return jax.jit(init, out_shardings=shardings, compiler_options=options)(key)

    return create, abstract


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


def make_evaluate(model: Osprey, loader: Loader, count: int, mesh: Mesh) -> Callable[[TrainState], Array]:
    """The loss of the first `count` batches of a loader, the same ones each time."""
    sums = jax.jit(make_loss_sums(model))
    batches: list[Batch] = []

    def evaluate(state: TrainState) -> Array:
        if not batches:
            batches.extend(batch for batch, _ in itertools.islice(loader, count))
            loader.close()
        found = [sums(state.trained, state.frozen, to_device(batch, mesh)) for batch in batches]
        totals, weights = zip(*found, strict=True)
        return sum(totals) / sum(weights)

    return evaluate


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


def record(metrics: Metrics, step: int, numbers: Mapping[str, Array], sample_ids: Sequence[str]) -> None:
    """Waits for a step's numbers and writes them; raises NotFinite where training can't go on from them."""
    values = {name: value.item() for name, value in jax.device_get(dict(numbers)).items()}
    if broken := [
        f"{name} is {values[name]}" for name in ("loss", "grad_norm") if not math.isfinite(values[name])
    ]:
        raise NotFinite(f"step {step}: {' and '.join(broken)}; samples of the batch: {', '.join(sample_ids)}")
    samples = len(sample_ids) * jax.process_count()
    metrics.write(step, values, samples=samples)


def describe(state: TrainState, mesh: Mesh, *, step: int, steps: int) -> None:
    """Says what is about to be trained, and on what."""
    trained, frozen = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.trained, state.frozen))
    parts = f"{trained / 1e6:.2f} M parameters to train, {frozen / 1e6:.2f} M frozen"
    say(f"{parts}, {jax.default_backend()} devices {dict(mesh.shape)}, step {step} of {steps}")


def say(message: str) -> None:
    """For the one who watches: what is printed to stdout is the result alone."""
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], str | None]]:
    """Gives a function that names the SIGTERM or SIGINT received in the block; a second one acts as ever."""
    received: list[str] = []

    def handle(number: int, _: Any) -> None:
        received.append(signal.Signals(number).name)
        say(f"{received[0]}: stopping after this step, a second one stops at once")
        signal.signal(number, before[number])

    before = {int(number): signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*argv}:
        print(__doc__, train_config.USAGE, HELP, sep="\n")
        return 0
    try:
        with stop_signals() as stopped:
            with refusals():
                config, workdir = train_config.parse(argv)
            print(train(config, workdir, stopped=stopped))
    except (Refused, NotFinite, FailingSamples, WorkerDied, OSError) as error:
        # One line, but for what is listed.
        lines = re.split(r"\n(?=[-+!] )", str(error))
        print("error:", "\n".join(" ".join(line.split()) for line in lines), file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    return 0


if __name__ == "__main__":
    status = main()
    if ABANDONED:
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
