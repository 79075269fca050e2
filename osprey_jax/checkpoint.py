"""Checkpoints: the parameters in Orbax's format, with the configuration and the tokenizer beside them.

A checkpoint is a directory of `config.json` (`OspreyConfig`), `params/` (Orbax) and `tokenizer.model` or
`tokenizer.json`; one that a training saves on its way has the rest of the training's state beside that. It
is complete or it isn't there: everything is written to a sibling directory first, which takes the final name
at the end. No other module knows Orbax.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from etils import epath
from orbax.checkpoint import v1 as ocp

from osprey_jax.config import OspreyConfig, from_config
from osprey_jax.directories import as_path, new_directory, remove, synchronise
from osprey_jax.prompt import Tokenizer
from osprey_jax.typing import Params

CHUNK_BYTES = 128 << 20
"""Upper bound of a stored chunk; each matrix of a layer of a 7B decoder fits."""
_STACKS = ("layers", "blocks")
"""Names in the paths of leaves whose first axis is that of scanned layers."""


def save_params(directory: Path | str, params: Params, config: OspreyConfig, tokenizer: Tokenizer) -> None:
    """Writes a checkpoint with every leaf in its own dtype. Raises ValueError where `directory` exists."""
    save_parts(directory, [params], config, tokenizer)


def save_parts(
    directory: Path | str, parts: Iterable[Params], config: OspreyConfig, tokenizer: Tokenizer
) -> None:
    """`save_params` of a tree that arrives in parts, so that no more than one part is in memory at a time.

    The parts are trees that have no leaf in common; a part is written before the next one is asked for.
    """
    with new_directory(directory) as partial:
        if jax.process_index() == 0:
            _describe(partial, config, tokenizer)
        context = _saving()
        # The call blocks until all is written: a copy that guards asynchronous saves would only cost memory.
        context.memory.deepcopy_host_arrays = False
        with context:
            iterator = iter(parts)
            while (part := next(iterator, None)) is not None:
                _save_part(partial / "params", part)
                del part
            ocp.partial.finalize(partial / "params")


def load_config(directory: Path | str) -> OspreyConfig:
    """Reads a checkpoint's configuration; a ValueError says what makes `directory` no checkpoint of ours."""
    directory = cast(Path, epath.Path(directory))
    path = directory / "config.json"
    if not directory.is_dir():
        raise ValueError(f"no directory {directory}")
    if not path.is_file():
        raise ValueError(f"{directory} is not an osprey-jax checkpoint: it has no config.json")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if isinstance(values, dict) and "model_type" in values:
        raise ValueError(
            f"{directory} holds a PyTorch release, not an osprey-jax checkpoint; "
            f"convert it first: python convert_torch_ckpt.py {directory} DST"
        )
    if not isinstance(values, dict) or not (directory / "params").is_dir():
        raise ValueError(f"{directory} is not an osprey-jax checkpoint: it has no params/")
    try:
        return from_config(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def saved_shapes(directory: Path | str) -> dict[str, Any]:
    """The tree of `jax.ShapeDtypeStruct` that a checkpoint holds, from its metadata alone."""
    load_config(directory)
    with _damage_named(directory):
        _check_index(as_path(directory) / "params")
        metadata = ocp.metadata(as_path(directory) / "params").metadata
        if metadata is None:
            raise ValueError("params/state/_METADATA doesn't tell its arrays")
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype)), metadata)


def _check_index(tree: Path) -> None:
    """Raises ValueError or OSError where the files that say which arrays there are can't be read.

    Orbax would log some of it and go on, and print a traceback for every array that it opens.
    """
    arrays = tree / "state"
    optional = [*arrays.glob("_sharding"), *arrays.glob("array_metadatas/*")]
    for path in [tree / "_CHECKPOINT_METADATA", arrays / "_METADATA", *optional]:
        try:
            json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path.relative_to(tree.parent)}: {error}") from None
    url = str(arrays) if "://" in str(arrays) else arrays.as_uri()
    tensorstore.KvStore.open({"driver": "ocdbt", "base": f"{url}/"}).result().list().result()


def load_params(directory: Path | str, abstract_params: Params) -> dict[str, Any]:
    """Restores parameters into the shapes, dtypes and shardings of a tree of `jax.ShapeDtypeStruct`.

    A leaf is cast while it's read; a struct without a sharding is restored to the first local device. Raises
    a ValueError that lists the leaves that are only wanted (-), only saved (+) or of another shape (!), or
    that names a damaged checkpoint.
    """
    wanted, saved = flatten(abstract_params), flatten(saved_shapes(directory))
    faults = [f"- {path}" for path in sorted(wanted.keys() - saved.keys())]
    faults += [f"+ {path}" for path in sorted(saved.keys() - wanted.keys())]
    for path in sorted(wanted.keys() & saved.keys()):
        if wanted[path].shape != saved[path].shape:
            faults.append(f"! {path}: saved {saved[path].shape}, wanted {wanted[path].shape}")
    if faults:
        raise ValueError(
            f"parameters in {directory} don't fit the model; only wanted (-), only saved (+), "
            "of another shape (!):\n" + "\n".join(faults)
        )
    placed = flatten(_placed(unflatten(wanted)))
    with _damage_named(directory):
        return unflatten({path: _load_leaf(directory, path, target) for path, target in placed.items()})


def load_leaves(directory: Path | str) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the leaves one by one, in their saved dtypes, to host memory: pairs of path and array."""
    for path, struct in flatten(saved_shapes(directory)).items():
        with _damage_named(directory):
            leaf = _load_leaf(directory, path, _HostArray(struct.shape, struct.dtype))
        yield path, leaf
        del leaf


def _load_leaf(directory: Path | str, path: str, target: Any) -> Any:
    """Reads one leaf of `params/`; what makes it unreadable is a ValueError that names it.

    Orbax reads a tree's leaves at the same time. Where one fails, it abandons the others, and each of those
    prints a traceback when it ends.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            return flatten(ocp.load(as_path(directory) / "params", unflatten({path: target})))[path]
    except Exception as error:
        raise ValueError(f"{path}: {first_line(error.__cause__ or error)}") from error


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
        self, directory: os.PathLike | str, *, keep: int, config: OspreyConfig, tokenizer: Tokenizer
    ):
        """`directory` need not exist; `keep` is how many checkpoints stay; the rest goes into each."""
        self.directory, self._keep = as_path(directory), keep
        self._config, self._tokenizer = config, tokenizer
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
        with _saving():
            responses = [ocp.save_async(partial / name, tree) for name, tree in arrays.items()]

        def commit() -> None:
            try:
                # Each ends with a barrier of all processes, so afterwards everything of everyone is there.
                for response in responses:
                    response.result()
                if jax.process_index() == 0:
                    _describe(partial, self._config, self._tokenizer)
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
        with _damage_named(directory):
            manifest = json.loads((directory / "manifest.json").read_text())
            for name, crc in manifest["files"].items():
                if zlib.crc32((directory / name).read_bytes()) != crc:
                    raise ValueError(f"{name} has changed since it was written")
            loader_state = (directory / "loader" / str(jax.process_index())).read_bytes()
            for name in targets:
                _check_index(directory / name)
            arrays = {name: ocp.load(directory / name, _placed(tree)) for name, tree in targets.items()}
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


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to one level, with keys joined by slashes."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


@dataclasses.dataclass
class _HostArray:
    """What tells Orbax to restore a NumPy array: a shape and a dtype, and no sharding."""

    shape: tuple[int, ...]
    dtype: np.dtype


def _describe(directory: Path, config: OspreyConfig, tokenizer: Tokenizer) -> None:
    """Writes what a checkpoint has beside arrays."""
    (directory / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    with tempfile.TemporaryDirectory() as local:  # a tokenizer knows no buckets
        tokenizer.save(local)
        for file in Path(local).iterdir():
            (directory / file.name).write_bytes(file.read_bytes())


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


def _placed(tree: Params) -> Params:
    """The same tree, leaves without a sharding given that of the first local device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or device), tree
    )


def _saving() -> ocp.Context:
    """How arrays are written: weights hardly compress; large stacks of layers are cut into layers.

    A slice of the first axis is written from where it lies, where other cuts would be copied first.
    """
    context = ocp.Context()
    saving = context.array.saving
    saving.use_compression = False
    saving.storage_options.chunk_byte_size = CHUNK_BYTES

    def by_layer(path: tuple[Any, ...], leaf: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions | None:
        stacked = any(getattr(key, "key", None) in _STACKS for key in path)
        if not stacked or leaf.size * leaf.dtype.itemsize <= CHUNK_BYTES:
            return None
        return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,))

    saving.scoped_storage_options_creator = by_layer
    return context


def _save_part(directory: Path, part: Params) -> None:
    saving = ocp.partial.save_async(directory, part)
    try:
        saving.result()
    except BaseException:
        # An interrupt leaves Orbax's thread writing; wait, or it would create files anew after the clean-up.
        with contextlib.suppress(Exception):
            saving.result()
        raise


@contextlib.contextmanager
def _damage_named(directory: Path | str) -> Iterator[None]:
    """Turns whatever Orbax raises on damaged files, which is of many types, into one ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"the checkpoint {directory} is damaged: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an exception says, without what TensorStore and others append to it."""
    lines = str(error).partition(" [tensorstore_spec=")[0].splitlines()
    return lines[0] if lines else type(error).__name__
