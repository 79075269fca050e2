"""What a training is told on the command line, and all that can be known to be wrong before it starts."""

import contextlib
import functools
import json
import logging
import math
import re
import shutil
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import base
from osprey_jax.checkpoint import flatten
from osprey_jax.cluster import is_first
from osprey_jax.directories import as_path, persist
from osprey_jax.models.llama import REMAT_POLICIES
from osprey_jax.profiler import Steps, parse_steps

OF_THE_MACHINE = (
    "mesh.",
    "accumulation",
    "remat",
    "patience",
    # A run that ended at a broken batch goes on by leaving it out.
    "spike",
    "skip_spikes",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "eval_every",
    "eval_batches",
    "eval_samples",
    "data.root",
    "data.held_out",
    "data.tolerance",
    "data.workers",
    "data.threads",
    "data.prefetch",
)
"""Keys, or their beginnings, that may change between two starts of a run: what was learned stays the same."""

USAGE = (
    "usage: python -m osprey_jax.train --config=configs/tiny.py "
    "(--workdir=DIR [--profile=10:12] | --compile_topology=v5e-64) [--config.key=value …]"
)


class Refused(ValueError):
    """What makes a run impossible, found before its first step."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Makes errors of what is given, or of where it lies, Refused."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise Refused(str(error)) from error


class Command(NamedTuple):
    """What the command line asks for."""

    config: ConfigDict
    workdir: Path | None
    compile_topology: str | None
    """Instead of training; one of the two is there."""
    profile: Steps | None


def parse(argv: Sequence[str]) -> Command:
    """The configuration, with the command line's overrides, and what to do with it.

    Raises ValueError for unknown flags and keys, values of another type, and files that can't be read.
    """
    values = flags.FlagValues()
    argv = ["train", *argv]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "The run's directory.", flag_values=values)
    flags.DEFINE_string("profile", None, "Steps to trace, FIRST or FIRST:LAST.", flag_values=values)
    flags.DEFINE_string("compile_topology", None, "TPUs or GPUs to compile for.", flag_values=values)
    try:
        # It logs every override.
        logging.getLogger("absl").setLevel(logging.WARNING)
        rest = values(argv)[1:]
        config = values["config"].value
        keys = config.keys() if config is not None else ()
    except flags.UnrecognizedFlagError as error:
        raise ValueError(f"{_one_line(error)}; {USAGE}") from error
    except flags.Error as error:
        # What a config file raises comes as a whole traceback.
        text = str(error).strip()
        told = text.splitlines()[-1] if "Traceback" in text else text
        raise ValueError(" ".join(told.split())) from error
    except OSError as error:
        raise ValueError(f"cannot read the config: {str(error).splitlines()[-1]}") from error
    except AttributeError as error:
        raise ValueError(_unknown_key(error, argv)) from error
    except Exception as error:  # whatever a config file, which is a program, can do wrong
        raise ValueError(f"{_origin(error)}: {type(error).__name__}: {_one_line(error)}") from error
    if rest or not keys or bool(values.workdir) == bool(values.compile_topology):
        raise ValueError(f"unexpected {' '.join(rest)}; {USAGE}" if rest else USAGE)
    check(config)
    workdir = as_path(values.workdir) if values.workdir else None
    profile = parse_steps(values.profile) if values.profile else None
    return Command(config, workdir, values.compile_topology, profile)


def check(config: ConfigDict) -> None:
    """Raises ValueError where a value can't be meant; what depends on devices or data is checked there."""
    _check_form(config)
    for key in ("batch_size", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints"):
        _require(config[key] >= 1, config, key, "must be at least 1")
    for key in (
        "steps",
        "epochs",
        "keep_every",
        "eval_every",
        "eval_batches",
        "eval_samples",
        "weight_decay",
        "clip_norm",
        "seed",
        "spike",
        "patience",
        "lora.rank",
    ):
        _require(_value(config, key) >= 0, config, key, "must not be negative")
    _require(config.lora.alpha > 0, config, "lora.alpha", "must be positive")
    _require(config.learning_rate > 0, config, "learning_rate", "must be positive")
    _require(config.seed < 2**32, config, "seed", "must be below 2 ** 32")
    _require(math.isfinite(config.epochs), config, "epochs", "must be finite")
    _require(0 <= config.warmup < 1, config, "warmup", "is a share of the steps, from 0 to below 1")
    _require(
        (config.steps > 0) != (config.epochs > 0), config, "steps", f"or epochs ({config.epochs}) must be 0"
    )
    whole = config.keep_every % config.checkpoint_every == 0
    _require(whole, config, "keep_every", f"must be a multiple of checkpoint_every {config.checkpoint_every}")
    if config.eval_every:
        _require(config.eval_batches >= 1, config, "eval_batches", "must be at least 1 or eval_every 0")
        _require(bool(config.data.held_out), config, "data.held_out", "must name data or eval_every be 0")
    for key in ("b1", "b2"):
        _require(0 < config[key] < 1, config, key, "must lie between 0 and 1")
    for key in ("dtype", "frozen_dtype", "mu_dtype"):
        _require(config[key] in ("float32", "bfloat16"), config, key, "must be 'float32' or 'bfloat16'")
    remat = ("none", *REMAT_POLICIES)
    _require(config.remat in remat, config, "remat", f"must be one of {', '.join(remat)}")
    for key in ("trained", "lora.targets", "data.sources", "data.systems", "data.held_out"):
        value = _value(config, key)
        strings = (bool(value) or key == "data.held_out") and all(isinstance(item, str) for item in value)
        _require(strings, config, key, "must be a tuple of strings")
    for key in ("data.share_image", "data.images_per_row"):
        _require(_value(config, key) >= 1, config, key, "must be at least 1")
        packs = _value(config, key) > 1 and not config.steps
        _require(not packs, config, key, "above 1 needs --config.steps=N --config.epochs=0.")
    _require(0 < config.data.tolerance <= 1, config, "data.tolerance", "must be a share above 0, at most 1")
    pairs = all(isinstance(item, tuple) and len(item) == 2 for item in config.data.buckets)
    pairs = pairs and all(isinstance(size, int) and size > 0 for item in config.data.buckets for size in item)
    _require(pairs, config, "data.buckets", "must be a tuple of pairs of length and regions")
    numbers = all(isinstance(weight, int | float) for weight in config.data.weights)
    _require(numbers, config, "data.weights", "must be a tuple of numbers")
    loss_per = config.data.loss_per in ("dialogue", "token")
    _require(loss_per, config, "data.loss_per", "must be 'dialogue' or 'token'")
    for key in ("data.workers", "data.threads", "data.prefetch"):
        _require(_value(config, key) >= 0, config, key, "must not be negative")


def _check_form(config: object) -> None:
    """Raises ValueError where keys or types aren't those of `configs/base.py`."""
    if not isinstance(config, ConfigDict):
        raise ValueError(f"the configuration must be that of configs/base.py, changed; got {config!r}")
    values, known = flatten(config.to_dict()), flatten(base.get_config().to_dict())
    for what, keys in (("lacks", known.keys() - values), ("has unknown keys", values.keys() - known)):
        if keys:
            names = ", ".join(sorted(keys)).replace("/", ".")
            raise ValueError(f"the configuration {what}: {names}; begin with that of configs/base.py")
    for key, value in values.items():
        kind: Any = type(known[key])
        kinds = {float: (float, int), tuple: (tuple, list)}.get(kind, kind)
        fits = isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)
        _require(fits, config, key.replace("/", "."), f"must be of type {kind.__name__}")


def check_batch(config: ConfigDict, *, shards: int) -> None:
    """Raises ValueError where a batch doesn't divide over its shards on the devices and the accumulation."""
    parts = shards * config.accumulation
    if config.batch_size % parts:
        raise ValueError(
            f"config.batch_size {config.batch_size} doesn't divide by {parts}: "
            f"{shards} shards on the devices × accumulation {config.accumulation}"
        )


def claim(workdir: Path, config: ConfigDict, *, saved: int) -> None:
    """Makes `workdir` this run's, or checks that it is.

    Args:
      workdir: created if it isn't there.
      config: written to `train_config.json`.
      saved: how many checkpoints there are already.

    Raises:
      ValueError: it belongs to a run that differs in what is learned, or it can't be written to.
    """
    path = workdir / "train_config.json"
    settings = json.loads(json.dumps(config.to_dict()))
    if (workdir / "params").exists():
        raise ValueError(f"{workdir} is a checkpoint: give a run a directory of its own")
    if path.exists():
        _same_run(path, settings)
    elif saved:
        raise ValueError(f"{workdir} holds checkpoints of an unknown run: it has no train_config.json")
    if (workdir / "export").exists() and not saved:
        raise ValueError(
            f"{workdir / 'export'} is a trained model, but its run's checkpoints are gone: move it away first"
        )
    if not is_first():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(".train_config.json.incomplete")
        partial.write_text(json.dumps(settings, indent=2) + "\n")
        persist(partial, deep=False)
        partial.replace(path)
    except OSError as error:
        raise ValueError(f"cannot write to {workdir}: {error.strerror or error}") from error


def check_space(workdir: Path, *, checkpoint_bytes: int, stay: int, saved: int) -> None:
    """Raises ValueError where there is no room for the checkpoints that are still to be written.

    Args:
      workdir: of the run; one on a remote store has room.
      checkpoint_bytes: what one checkpoint takes.
      stay: how many there are at the end.
      saved: how many there are already.
    """
    if "://" in str(workdir):
        return
    # A new one is complete before the oldest goes; the exported model comes on top.
    needed = checkpoint_bytes * max(stay + 2 - saved, 1)
    free = shutil.disk_usage(workdir).free
    if free < needed:
        raise ValueError(
            f"no space for checkpoints: {workdir} has {_size(free)} free, needed are {_size(needed)} "
            f"({_size(checkpoint_bytes)} each, of which {stay} stay: config.keep_checkpoints, keep_every)"
        )


def _same_run(path: Path, settings: dict[str, Any]) -> None:
    try:
        before = flatten(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    now = flatten(settings)
    changed = []
    for name in sorted(before.keys() | now.keys()):
        key = name.replace("/", ".")
        if before.get(name) != now.get(name) and not key.startswith(OF_THE_MACHINE):
            changed.append(f"{key} was {before.get(name)!r}, is {now.get(name)!r}")
    if changed:
        raise ValueError(f"{path.parent} holds another run: {'; '.join(changed)}")


def _require(holds: bool, config: ConfigDict, key: str, what: str) -> None:
    if not holds:
        raise ValueError(f"config.{key} {what}, got {_value(config, key)!r}")


def _value(config: ConfigDict, key: str) -> Any:
    return functools.reduce(lambda node, name: node[name], key.split("."), config)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _unknown_key(error: AttributeError, argv: Sequence[str]) -> str:
    """What ml_collections says about a key, which is its last part and a similar one, and who names it."""
    text = str(error).replace("\\", "")
    names = re.findall(r"""['"](\w+)['"]""", text)
    if not names:
        return f"{_origin(error)}: {_one_line(error)}"
    flag = next((arg for arg in argv if names[0] in arg.partition("=")[0].split(".")), None)
    meant = f"; did you mean {names[1]}?" if "Did you mean" in text else ""
    return f"unknown key {names[0]} in {flag or _origin(error)}{meant}"


def _origin(error: Exception) -> str:
    """File and line that raised it, libraries left out; a syntax error tells its own."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename and "<" not in frame.filename]
    return f"{ours[-1].filename}:{ours[-1].lineno}"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
