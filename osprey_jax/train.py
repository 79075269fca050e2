"""Trains a model, from the first step or from wherever an earlier start of the same command got to.

    python -m osprey_jax.train --config=configs/tiny.py --workdir=runs/tiny

The run's directory gets `checkpoints/<step>`, `metrics.jsonl`, `tensorboard/`, `skipped-<process>.jsonl` if
samples can't be used, and, at the end, `export/`, which `osprey_jax.Osprey.load` reads as it does every
checkpoint. SIGTERM and Ctrl-C save and stop; the same command goes on from there, and after a crash from the
newest whole checkpoint, with the losses it would have had anyway. Exit status: 0 trained or stopped, 1 failed
on the way, 2 refused to begin.

On several hosts the same command is started on each, with one DIR that all of them see: Cloud TPU, srun and
mpirun tell the processes of each other, elsewhere JAX_COORDINATOR_ADDRESS=HOST:PORT of the first,
JAX_NUM_PROCESSES and JAX_PROCESS_ID do. Each reads its own share of every batch. A signal to one stops all
after the same step; when one dies the others end, after 100 seconds at the latest, with an error. The number
of processes may be another at the next start.

    python -m osprey_jax.train --config=configs/tpu_v4.py --compile_topology=v4-32

compiles the step for TPUs that needn't be here (pip install libtpu), tells what a chip would hold and send,
and as its last line whether that fits. It needs neither data nor checkpoints. Names are those of clouds
(v4-32 has 16 chips, v5p-32 16, v5e-64 64, v6e-16 16) or shapes (v5e:2x4, v5e:1x1); h200, h100 and h200-8 are
GPUs (pip install --no-deps jax-cuda12-pjrt, of JAX's version), of whose memory JAX takes the part that
XLA_CLIENT_MEM_FRACTION says, 0.75 without. Exit status: 0 fits, 1 doesn't, 2 refused.
"""

import contextlib
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from data_pipelines.pipeline import FailingSamples
from data_pipelines.watched import ABANDONED, WorkerDied
from osprey_jax import cluster, sharding, train_config
from osprey_jax.batch import to_device
from osprey_jax.checkpoint import first_line, load_config, save_params
from osprey_jax.compilation_cache import use_compilation_cache
from osprey_jax.compile_topology import compile_topology
from osprey_jax.config import from_config
from osprey_jax.directories import as_path
from osprey_jax.evaluation import Evaluator
from osprey_jax.metrics import Metrics, Unheard
from osprey_jax.models.osprey import Osprey
from osprey_jax.optim import TrainState
from osprey_jax.profiler import Profiler, Steps
from osprey_jax.train_config import Refused, refusals
from osprey_jax.train_data import make_data
from osprey_jax.train_step import make_lora, make_mesh, make_optimizer, make_state, make_update
from osprey_jax.training_checkpoints import TrainingCheckpoints, kept, saved_steps, starting_point
from osprey_jax.training_summary import mesh_peak, model_flops, summary
from osprey_jax.typing import Array
from osprey_jax.watchdog import Watchdog

HELP = "configs/base.py has every key and what it means, the files beside it what differs for a stage."


MOST_SKIPPED = 50
"""Steps one after another that may be left out."""


class NotFinite(ArithmeticError):
    """A loss or a gradient that is no number, and the samples that it came from."""


def train(
    config: ConfigDict,
    workdir: Path,
    *,
    stopped: Callable[[], str | None] = lambda: None,
    profile: Steps | None = None,
) -> str:
    """Trains until the last step, or until `stopped` gives a reason to stop; returns what to tell the user.

    `profile` names steps to trace into `tensorboard/`.

    Raises Refused before the first step; after it OSError where a checkpoint can't be written, FailingSamples
    and NotFinite.
    """
    with refusals():
        # Devices, data and model.
        mesh = make_mesh(config)
        cluster.check_mesh(mesh)
        origin = None
        if config.init_from:
            # Its own checkpoints have its sizes and its tokenizer, too, and may have outlived it.
            before = saved_steps(workdir / "checkpoints")
            origin = starting_point(workdir if before else as_path(config.init_from))
            config = ConfigDict({**config.to_dict(), "model": load_config(origin).to_dict()})
        model_config = from_config(config.model.to_dict())
        lora = make_lora(config)
        model = Osprey(model_config, jnp.dtype(config.dtype), remat=config.remat, lora=lora)
        data = make_data(config, model_config, origin, report=say)
        optimizer = make_optimizer(config, steps=data.steps)

        # The state: first as shapes that know their places on the mesh, then restored or created there.
        create, abstract = make_state(config, model_config, mesh, origin=origin)
        checkpoints = TrainingCheckpoints(
            workdir / "checkpoints",
            keep=config.keep_checkpoints,
            keep_every=config.keep_every,
            config=model_config,
            tokenizer=data.tokenizer,
            lora=lora,
        )
        train_config.claim(workdir, config, saved=len(checkpoints.steps()))
        if "://" not in str(workdir):  # where nothing can be appended to a file
            for loader in (data.training, *(each.loader for each in data.held_out)):
                loader.report = workdir / f"skipped-{jax.process_index()}.jsonl"
        checkpoints.clean_up()
        restored = checkpoints.restore_newest(abstract.to_arrays(), report=say)
        export = workdir / "export"
        if restored is None or restored.step < data.steps or not export.exists():
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
            there, every = checkpoints.steps(), config.checkpoint_every
            begin = there[-1] - there[-1] % every if there else 0
            all_steps = [*there, *range(begin + every, data.steps, every), data.steps]
            stay = kept(all_steps, keep=config.keep_checkpoints, every=config.keep_every)
            train_config.check_space(workdir, checkpoint_bytes=size, stay=len(stay), saved=len(there))
        if restored is None:
            step, state = 0, create()
        else:
            step = restored.step
            count = jax.device_put(np.int32(step), abstract.step.sharding)
            state = TrainState.from_arrays(restored.arrays, config.trained, step=count)
            if lost := data.training.set_states(restored.loader_states):
                say(f"warning: {lost}")

    if profile is not None and not step < profile.first <= data.steps:
        say(f"warning: --profile={profile.first}: this start makes the steps from {step + 1} to {data.steps}")
    peak, operations = mesh_peak(mesh), model_flops(model, state)
    for line in summary(state, mesh, config, operations=operations, step=step, steps=data.steps):
        if cluster.is_first():
            say(line)
    # The next state lies where the last one did, so that one program serves all steps.
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    update = make_update(model, optimizer, accumulation=config.accumulation)
    update = jax.jit(update, donate_argnums=0, out_shardings=(places, None))
    evaluate = None
    if config.eval_every and step < data.steps:
        evaluate = Evaluator(model, data, mesh, config, report=say)
    metrics = (Metrics if cluster.is_first() else Unheard)(
        workdir, step=step, steps=data.steps, every=config.log_every, peak=peak
    )
    watchdog, profiler = Watchdog(config.patience, say), Profiler(profile, workdir / "tensorboard", say)
    with sharding.use_mesh(mesh), contextlib.ExitStack() as stack:
        for each in (metrics, data.training, checkpoints, profiler, watchdog):
            stack.callback(each.close)

        def due(every: int) -> bool:
            return every > 0 and (step % every == 0 or step == data.steps)

        def save() -> None:
            metrics.flush()
            checkpoints.save(step, state.to_arrays(), data.training.get_state())

        saved, running, skipped = step, None, 0
        stop = cluster.Stop(mesh, stopped)

        def note() -> None:
            """Waits for the step that is running, and writes its numbers."""
            nonlocal running, skipped
            if running is not None:
                skipped = skipped + 1 if record(metrics, *running) else 0
                running = None
            if skipped == MOST_SKIPPED:
                raise NotFinite(f"the last {skipped} steps, up to {step}, were left out: nothing is learned")

        failure: Exception | None = None
        while step < data.steps and not stop():
            watchdog.at(f"waiting for the data of step {step + 1}")
            try:
                batch, sample_ids = next(data.training)
            except (FailingSamples, WorkerDied) as error:
                if cluster.is_several():
                    raise  # the others are a step ahead, so there is nothing that all could save
                failure = error
                break
            watchdog.at(f"step {step + 1}")
            profiler.before(step + 1)
            state, numbers = update(state, to_device(batch, mesh))
            note()  # a step late, so that the devices have work meanwhile
            step += 1
            profiler.after(step, numbers)
            running = (step, numbers, sample_ids, operations(batch) if peak else 0)
            if evaluate is not None and due(config.eval_every):
                watchdog.at(f"evaluating step {step}")
                metrics.evaluated(step, *evaluate(state))
            if due(config.checkpoint_every):
                note()  # first, for it raises where the state is not worth saving
                watchdog.at(f"saving step {step}")
                save()
                saved = step
        note()
        if step > saved:
            save()
        checkpoints.wait()

    # Workers may have been told to stop as well.
    if failure is not None and not stopped():
        raise failure
    if step < data.steps:
        why = stopped() or "another process"
        return f"stopped by {why} after step {step}; the same command goes on from there"
    if not export.exists():
        try:
            save_params(export, state.params, model_config, data.tokenizer, lora=lora)
        except Exception as error:
            raise OSError(f"cannot write {export}: {first_line(error)}") from error
    if left_out := data.training.left_out():
        say(left_out)
    return f"trained for {step} steps; osprey_jax.Osprey.load({str(export)!r}) loads the model"


def record(
    metrics: Metrics, step: int, numbers: Mapping[str, Array], sample_ids: Sequence[str], operations: int
) -> bool:
    """Waits for a step's numbers and writes them; tells whether the step was left out.

    Raises NotFinite where training can't go on from them.
    """
    values = {name: value.item() for name, value in jax.device_get(dict(numbers)).items()}
    samples = f"samples of the batch: {', '.join(sample_ids)}"
    broken = " and ".join(
        f"{name} is {values[name]}" for name in ("loss", "grad_norm") if not math.isfinite(values[name])
    )
    spike, skipped = values.pop("spike"), values.pop("skipped")
    finite = not broken
    if spike and finite:
        broken = f"grad_norm is {values['grad_norm']:.4g}, {spike:.1f} times the usual"
    if skipped:
        # JSON has no word for what is no number.
        values = {name: value for name, value in values.items() if math.isfinite(value)} | {"skipped": 1}
        say(f"warning: step {step} is left out, as {broken}; {samples}")
    elif not finite:
        raise NotFinite(f"step {step}: {broken}; {samples}")
    elif spike:
        say(f"warning: step {step}: {broken}; {samples}")
    metrics.write(step, values, samples=len(sample_ids) * jax.process_count(), operations=operations)
    return bool(skipped)


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
        with refusals():
            command = train_config.parse(argv)
            if command.compile_topology:
                return 0 if compile_topology(command.config, command.compile_topology, say=print) else 1
        assert command.workdir is not None, "seen by parse"
        with stop_signals() as stopped:
            with refusals():
                cluster.join()
            use_compilation_cache()
            result = train(command.config, command.workdir, stopped=stopped, profile=command.profile)
            if cluster.is_first():
                print(result)
    except (Refused, NotFinite, FailingSamples, WorkerDied, OSError) as error:
        # One line, but for what is listed.
        lines = re.split(r"\n(?=[-+!] )", str(error))
        print("error:", "\n".join(" ".join(line.split()) for line in lines), file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    except jax.errors.JaxRuntimeError as error:
        if not cluster.is_several():
            raise
        print(f"error: computing with the other processes failed: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    status = main()
    if ABANDONED or (status and cluster.is_several()):  # the others may be waiting for what never comes
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
