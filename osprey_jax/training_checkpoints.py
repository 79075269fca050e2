"""A training's checkpoints: saved beside the work, complete or not there, checked when they are restored."""

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from osprey_jax.checkpoint import damage_named, first_line, flatten, load_tree, save_trees, write_description
from osprey_jax.config import OspreyConfig
from osprey_jax.directories import as_path, remove, synchronise
from osprey_jax.lora import Lora
from osprey_jax.prompt import Tokenizer
from osprey_jax.typing import Params


def saved_steps(directory: Path) -> list[int]:
    """The steps there are complete checkpoints of in a run's directory of them, in order."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


class Restored(NamedTuple):
    """What a training goes on from."""

    step: int
    arrays: dict[str, Any]
    """Trees of arrays by name, as they were given to `save`."""
    loader_state: bytes


class TrainingCheckpoints:
    """The checkpoints of a run: a directory named by its step for each, the newest ones kept.

    Each is a checkpoint like any other, for `load_params` or the converter, and has beside `params/` the
    trees of arrays that a training needs (Orbax), every process's `loader/<process>`, and
    `manifest.json`, written last, with a checksum of every leaf and file. A directory whose save was cut off
    has another name.
    """

    def __init__(
        self,
        directory: os.PathLike | str,
        *,
        keep: int,
        config: OspreyConfig,
        tokenizer: Tokenizer,
        lora: Lora | None = None,
    ):
        """`directory` need not exist; `keep` is how many checkpoints stay; the rest goes into each."""
        self.directory, self._keep = as_path(directory), keep
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
        if jax.process_index() == 0:
            remove(partial)
            (partial / "loader").mkdir(parents=True)
        synchronise(f"made {partial}")
        (partial / "loader" / str(jax.process_index())).write_bytes(loader_state)
        sums = _checksums(arrays)
        responses = save_trees(partial, arrays)

        def commit() -> None:
            try:
                # Each ends with a barrier of all processes, so afterwards everything of everyone is there.
                for response in responses:
                    response.result()
                if jax.process_index() == 0:
                    write_description(partial, self._config, self._tokenizer, lora=self._lora)
                    _write_manifest(partial, sums)
                    partial.rename(self.directory / str(step))
                    for old in self.steps()[: -self._keep]:
                        hidden = (self.directory / str(old)).rename(self.directory / f".{old}.incomplete")
                        remove(hidden)
            except Exception as error:
                with contextlib.suppress(OSError):
                    remove(partial)
                raise OSError(f"cannot write {self.directory / str(step)}: {first_line(error)}") from error

        self._pending = self._thread.submit(commit)

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

        Raises ValueError that names the directory and what is wrong with it.
        """
        directory = self.directory / str(step)
        with damage_named(directory):
            manifest = json.loads((directory / "manifest.json").read_text())
            for name, crc in manifest["files"].items():
                if zlib.crc32((directory / name).read_bytes()) != crc:
                    raise ValueError(f"{name} has changed since it was written")
            loader_state = (directory / "loader" / str(jax.process_index())).read_bytes()
            for name in targets:
                arrays = {name: load_tree(directory / name, tree) for name, tree in targets.items()}
            found, expected = _flat_checksums(_checksums(arrays)), manifest["arrays"]
            if changed := sorted(path for path in expected if found.get(path) != expected[path]):
                raise ValueError(f"{', '.join(changed[:3])} differ from what was written")
        return Restored(step, arrays, loader_state)

    def restore_newest(
        self, targets: Mapping[str, Params], *, report: Callable[[str], None]
    ) -> Restored | None:
        """`restore` of the newest checkpoint that is whole, or None where there is none at all.

        Newer, damaged ones get the name `<step>.damaged`, so that the run can write these steps anew;
        `report` is told. Raises ValueError where all are damaged, and then moves none.
        """
        faults: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                restored = self.restore(step, targets)
            except ValueError as error:
                faults[step] = str(error)
                continue
            for damaged, fault in faults.items():
                if jax.process_index() == 0:
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
        if jax.process_index() == 0 and self.directory.is_dir():
            for path in self.directory.iterdir():
                if path.name.startswith(".") and path.name.endswith(".incomplete"):
                    remove(path)


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
