"""A training's checkpoints: saved beside the work, complete or not there, checked when they are restored."""

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from osprey_jax import cluster
from osprey_jax.checkpoint import damage_named, first_line, flatten, load_tree, save_trees, write_description
from osprey_jax.config import OspreyConfig
from osprey_jax.directories import as_path, persist, remove, synchronise
from osprey_jax.lora import Lora
from osprey_jax.prompt import Tokenizer
from osprey_jax.typing import Params


def saved_steps(directory: Path) -> list[int]:
    """The steps there are complete checkpoints of in a run's directory of them, in order."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def kept(steps: Sequence[int], *, keep: int, every: int) -> list[int]:
    """The steps whose checkpoints stay: the `keep` newest, and the multiples of `every`, if that isn't 0."""
    return [step for step in steps if step in steps[-keep:] or (every and step % every == 0)]


def starting_point(directory: Path) -> Path:
    """The checkpoint that a directory stands for: itself, or of a run its export, else its newest one.

    Raises ValueError that names what was looked for where there is none of these.
    """
    if not directory.is_dir():
        raise ValueError(f"no directory {directory}")
    if (directory / "config.json").exists():
        return directory
    if (directory / "export").exists():
        return directory / "export"
    if steps := saved_steps(directory / "checkpoints"):
        return directory / "checkpoints" / str(steps[-1])
    raise ValueError(
        f"{directory} is neither a checkpoint nor a run that has saved one: "
        "it has no config.json, no export/ and nothing complete in checkpoints/"
    )


class Restored(NamedTuple):
    """What a training goes on from."""

    step: int
    arrays: dict[str, Any]
    """Trees of arrays by name, as they were given to `save`."""
    loader_states: list[bytes]
    """Of every process that saved, in their order."""


class TrainingCheckpoints:
    """The checkpoints of a run: a directory named by its step for each; `kept` tells which stay.

    Each is a checkpoint like any other, for `load_params` or the converter, and has beside `params/` the
    trees of arrays that a training needs (Orbax), every process's `loader/<process>`, and
    `manifest.json`, written last, with a checksum of every leaf and file. A directory whose save was cut off
    has another name; it gets the final one when all of it is on the disk, so a loss of power leaves no more
    than a kill.

    Every process calls every method at the same point of its work; `directory` is one that all see.
    """

    def __init__(
        self,
        directory: os.PathLike | str,
        *,
        keep: int,
        keep_every: int = 0,
        config: OspreyConfig,
        tokenizer: Tokenizer,
        lora: Lora | None = None,
    ):
        """`directory` need not exist; `keep` and `keep_every` as in `kept`; the rest goes into each."""
        self.directory, self._keep, self._keep_every = as_path(directory), keep, keep_every
        self._config, self._tokenizer, self._lora = config, tokenizer, lora
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def steps(self) -> list[int]:
        """The steps there are complete checkpoints of, in order."""
        return saved_steps(self.directory)

    def save(self, step: int, arrays: Mapping[str, Params], loader_state: bytes) -> None:
        """Begins to save; arrays may be donated as soon as this returns.

        Args:
          step: names the directory, which must not exist.
          arrays: `params`, and other trees by name.
          loader_state: this process's own.

        A save that is still being written is waited for; what `wait` raises, this raises as well.
        """
        self.wait()
        partial = self.directory / f".{step}.incomplete"
        with self._unwritable(step):
            if cluster.is_first():
                remove(partial)
                (partial / "loader").mkdir(parents=True)
            synchronise(f"made {partial}")
            (partial / "loader" / str(jax.process_index())).write_bytes(loader_state)
            sums = _checksums(arrays)
            responses = save_trees(partial, arrays)

        def commit() -> None:
            with self._unwritable(step):
                # Each ends with a barrier of all processes, so afterwards everything of everyone is there.
                for response in responses:
                    response.result()
                if cluster.is_first():
                    write_description(partial, self._config, self._tokenizer, lora=self._lora)
                    _write_manifest(partial, sums)
                    persist(partial)
                    partial.rename(self.directory / str(step))
                    persist(self.directory, deep=False)
                    self._remove_old()

        self._pending = self._thread.submit(commit)

    def _remove_old(self) -> None:
        steps = self.steps()
        stay = kept(steps, keep=self._keep, every=self._keep_every)
        for old in sorted({*steps} - {*stay}):
            # Half of a directory must not pass for a checkpoint.
            remove((self.directory / str(old)).rename(self.directory / f".{old}.incomplete"))

    @contextlib.contextmanager
    def _unwritable(self, step: int) -> Iterator[None]:
        """Makes what prevents a save an OSError that names the checkpoint, and leaves nothing of it."""
        try:
            yield
        except Exception as error:
            if cluster.is_first():
                with contextlib.suppress(OSError):
                    remove(self.directory / f".{step}.incomplete")
            raise OSError(f"cannot write {self.directory / str(step)}: {first_line(error)}") from error

    def wait(self) -> None:
        """Returns when nothing is being written any more. Raises OSError where the last save failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Returns when nothing is being written any more, whether it failed or not."""
        with contextlib.suppress(OSError):
            self.wait()

    def restore(self, step: int, targets: Mapping[str, Params]) -> Restored:
        """Reads a checkpoint into trees of `jax.ShapeDtypeStruct` with shardings, and checks every checksum.

        Raises ValueError that names the directory and what is wrong with it, in every process if it does in
        one.
        """
        directory = self.directory / str(step)
        with damage_named(directory):
            with _together():
                manifest = json.loads((directory / "manifest.json").read_text())
                for name, crc in manifest["files"].items():
                    if zlib.crc32((directory / name).read_bytes()) != crc:
                        raise ValueError(f"{name} has changed since it was written")
                loaders = sorted((directory / "loader").iterdir(), key=lambda path: int(path.name))
                loader_states = [path.read_bytes() for path in loaders]
                expected = manifest["arrays"]
                arrays = {name: load_tree(directory / name, tree) for name, tree in targets.items()}
            found = _flat_checksums(_checksums(arrays))
            if changed := sorted(path for path in expected if found.get(path) != expected[path]):
                raise ValueError(f"{', '.join(changed[:3])} differ from what was written")
        return Restored(step, arrays, loader_states)

    def restore_newest(
        self, targets: Mapping[str, Params], *, report: Callable[[str], None]
    ) -> Restored | None:
        """`restore` of the newest checkpoint that is whole, or None where there is none at all.

        Newer, damaged ones get the name `<step>.damaged`, so that the run can write these steps anew;
        `report` is told. Raises ValueError where all are damaged, and then moves none.
        """
        faults: dict[int, str] = {}
        # What one process doesn't see, as may be where files are shared by a network, none can restore.
        while (step := cluster.least(max((s for s in self.steps() if s not in faults), default=-1))) >= 0:
            try:
                restored = self.restore(step, targets)
            except ValueError as error:
                faults[step] = str(error)
                continue
            for damaged, fault in faults.items():
                if cluster.is_first():
                    aside = self.directory / f"{damaged}.damaged"
                    remove(aside)
                    (self.directory / str(damaged)).rename(aside)
                report(f"warning: {fault}; it is now called {damaged}.damaged, going on from step {step}")
            synchronise(f"restored {step}")
            return restored
        if faults:
            raise ValueError(
                f"none of the checkpoints in {self.directory} can be restored; move them away to begin anew. "
                + "; ".join(faults.values())
            )
        return None

    def clean_up(self) -> None:
        """Removes what saves that were cut off have left behind."""
        if cluster.is_first() and self.directory.is_dir():
            for path in self.directory.iterdir():
                if path.name.startswith(".") and path.name.endswith(".incomplete"):
                    remove(path)


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Makes what fails in one process fail in all of them, which would wait for it in what comes next."""
    try:
        yield
    except Exception:
        cluster.all_of(False)
        raise
    if not cluster.all_of(True):
        raise ValueError("another process can't read it")


def _write_manifest(directory: Path, sums: Mapping[str, Any]) -> None:
    names = [path.name for path in directory.iterdir() if path.is_file()]
    names += [f"loader/{path.name}" for path in (directory / "loader").iterdir()]
    files = {name: zlib.crc32((directory / name).read_bytes()) for name in sorted(names)}
    manifest = {"files": files, "arrays": _flat_checksums(sums)}
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


@jax.jit
def _checksums(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Sum of each leaf's bits as unsigned words: the same however it's split over devices, and fast."""
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}

    def checksum(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, words[x.dtype.itemsize])
        return jnp.sum(bits.astype(jnp.uint32))

    return jax.tree.map(checksum, tree)


def _flat_checksums(sums: Mapping[str, Any]) -> dict[str, int]:
    return {path: int(value) for path, value in flatten(sums).items()}
