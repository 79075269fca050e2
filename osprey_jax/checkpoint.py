"""Checkpoints: the parameters in Orbax's format, with the configuration and the tokenizer beside them.

A checkpoint is a directory of `config.json` (`OspreyConfig`), `params/` (Orbax) and `tokenizer.model` or
`tokenizer.json`. It is complete or it isn't there: everything is written to a sibling directory first, which
takes the final name at the end. No other module knows Orbax.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from osprey_jax.config import OspreyConfig, from_config
from osprey_jax.prompt import Tokenizer
from osprey_jax.typing import Params

CHUNK_BYTES = 128 << 20
"""Upper bound of a stored chunk; a layer of a 7B decoder fits, so a chunk is a slice of the first axis."""


@contextlib.contextmanager
def new_directory(directory: Path | str) -> Iterator[Path]:
    """Gives an empty directory that becomes `directory` when the block ends, and vanishes when it raises.

    Raises ValueError where `directory` exists. On several hosts every process enters the block together, and
    the directory has to be on a file system that they share.
    """
    directory = Path(directory).absolute()
    if directory.exists():
        raise ValueError(f"{directory} exists already")
    partial = directory.with_name(f".{directory.name}.incomplete")
    _synchronise(f"before {directory}")
    if jax.process_index() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _synchronise(f"made {directory}")
    try:
        yield partial
        _synchronise(f"written {directory}")
        if jax.process_index() == 0:
            partial.rename(directory)
        _synchronise(f"renamed {directory}")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
            (partial / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
            tokenizer.save(partial)
        context = ocp.Context()
        # The call blocks until all is written: a copy that guards asynchronous saves would only cost memory.
        context.memory.deepcopy_host_arrays = False
        # Weights hardly compress; uncompressed slices along the first axis are written from where they lie.
        context.array.saving.use_compression = False
        context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
        context.array.saving.storage_options.shard_axes = (0,)
        with context:
            iterator = iter(parts)
            while (part := next(iterator, None)) is not None:
                _save_part(partial / "params", part)
                del part
            ocp.partial.finalize(partial / "params")


def load_config(directory: Path | str) -> OspreyConfig:
    """Reads a checkpoint's configuration; a ValueError says what makes `directory` no checkpoint of ours."""
    directory = Path(directory)
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
        metadata = ocp.metadata(Path(directory).absolute() / "params").metadata
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype)), metadata)


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
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or device),
        unflatten(wanted),
    )
    with _damage_named(directory):
        return ocp.load(Path(directory).absolute() / "params", targets)


def load_leaves(directory: Path | str) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the leaves one by one, in their saved dtypes, to host memory: pairs of path and array."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    for path, struct in flatten(saved_shapes(directory)).items():
        target = unflatten({path: _HostArray(struct.shape, struct.dtype)})
        with _damage_named(directory), context:
            tree = ocp.load(Path(directory).absolute() / "params", target)
        yield path, flatten(tree).pop(path)


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
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"the checkpoint {directory} is damaged: {reason}") from error


def _synchronise(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
