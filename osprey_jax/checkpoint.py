"""Checkpoints: the parameters in Orbax's format, with the configuration and the tokenizer beside them.

A checkpoint is a directory of `config.json` (`OspreyConfig`), `params/` (Orbax) and `tokenizer.model` or
`tokenizer.json`; one that a training saves on its way has the rest of the training's state beside that. It
is complete or it isn't there: everything is written to a sibling directory first, which takes the final name
at the end. A quantised one says so in `config.json`, under `quantization`, one with adapters under `lora`,
and they are merged as it is read. No other module knows Orbax.
"""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from etils import epath
from jax.sharding import Sharding
from orbax.checkpoint import v1 as ocp

from osprey_jax import quantize
from osprey_jax.config import OspreyConfig, from_config
from osprey_jax.directories import as_path, new_directory
from osprey_jax.lora import ADAPTERS, Lora, is_adapter, merge_adapters, merge_kernel
from osprey_jax.prompt import Tokenizer
from osprey_jax.typing import Params

CHUNK_BYTES = 128 << 20
"""Upper bound of a stored chunk; each matrix of a layer of a 7B decoder fits."""
_STACKS = ("layers", "blocks")
"""Names in the paths of leaves whose first axis is that of scanned layers."""


def save_params(
    directory: Path | str,
    params: Params,
    config: OspreyConfig,
    tokenizer: Tokenizer,
    *,
    quantization: str | None = None,
    lora: Lora | None = None,
) -> None:
    """Writes a checkpoint with every leaf in its own dtype. Raises ValueError where `directory` exists.

    `quantization` names the scheme (`quantize.SCHEMES`) of quantised parameters. Adapters, which `lora`
    tells, are merged (`lora.merge_adapters`), so that the checkpoint is like any other.
    """
    parts = [params] if lora is None else _merged_parts(params, lora)
    save_parts(directory, parts, config, tokenizer, quantization=quantization)


def _merged_parts(params: Params, lora: Lora) -> Iterator[Params]:
    """The merged tree in parts: what has no adapter, then one adapted layer, or stack of them, at a time."""
    layers: dict[str, dict[str, Any]] = {}
    flat = flatten(params)
    adapted = {path.rpartition("/")[0] for path in flat if is_adapter(path)}
    for path, leaf in flat.items():
        layer = path.rpartition("/")[0]
        layers.setdefault(layer if layer in adapted else "", {})[path] = leaf
    for part in layers.values():
        yield merge_adapters(unflatten(part), lora)


def save_parts(
    directory: Path | str, parts: Iterable[Params], config: OspreyConfig, tokenizer: Tokenizer, *,
    quantization: str | None = None,
) -> None:  # fmt: skip
    """`save_params` of a tree that arrives in parts, so that no more than one part is in memory at a time.

    The parts are trees that have no leaf in common; a part is written before the next one is asked for.
    """
    with new_directory(directory) as partial:
        if jax.process_index() == 0:
            write_description(partial, config, tokenizer, quantization=quantization)
        # What is stored of a 4-bit integer is a byte, half of which compression takes back.
        compressed = quantization is not None and quantize.scheme(quantization).dtype == jnp.int4
        write_parts(partial / "params", parts, compressed=compressed)


def write_parts(directory: Path, parts: Iterable[Params], *, compressed: bool = False) -> None:
    """Writes a tree that arrives in parts, see `save_parts`, as the arrays of a checkpoint of any model."""
    context = _saving()
    context.array.saving.use_compression = compressed
    # The call blocks until all is written: a copy that guards asynchronous saves would only cost memory.
    context.memory.deepcopy_host_arrays = False
    with context:
        iterator = iter(parts)
        while (part := next(iterator, None)) is not None:
            _save_part(directory, part)
            del part
        ocp.partial.finalize(directory)


def load_config(directory: Path | str) -> OspreyConfig:
    """Reads a checkpoint's configuration; a ValueError says what makes `directory` no checkpoint of ours."""
    return _load_description(directory).config


def load_quantization(directory: Path | str, wanted: str | None = None) -> str | None:
    """The scheme that a checkpoint is computed with: `wanted`, or else the one that it was saved with.

    Raises ValueError for an unknown scheme, and where saved integers are not those of the scheme.
    """
    saved = _load_description(directory).quantization
    if wanted is None or saved is None:
        return saved if wanted is None else quantize.checked(wanted)
    if quantize.scheme(wanted).weights != quantize.scheme(saved).weights:
        raise ValueError(
            f"{directory} holds weights quantised as {saved!r}, which can't be computed with as {wanted!r}; "
            "quantise the original checkpoint"
        )
    return wanted


class _Description(NamedTuple):
    """What `config.json` tells."""

    config: OspreyConfig
    quantization: str | None
    lora: Lora | None


def _load_description(directory: Path | str) -> _Description:
    values = read_description(directory)
    if "model" in values:
        raise ValueError(f"{directory} is a checkpoint of SAM, not of Osprey; it is what --sam takes")
    try:
        quantization, lora = (values.pop(key, None) for key in ("quantization", "lora"))
        return _Description(
            config=from_config(values),
            quantization=None if quantization is None else quantize.checked(quantization),
            lora=None if lora is None else Lora(**{**lora, "targets": tuple(lora["targets"])}),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{as_path(directory) / 'config.json'}: {error}") from None


def read_description(directory: Path | str) -> dict[str, Any]:
    """The values in the `config.json` of a checkpoint of any model; only SAM's have a `model` among them.

    A ValueError says what makes `directory` no checkpoint.
    """
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
        option = "--sam " if values["model_type"] == "sam" else ""
        raise ValueError(
            f"{directory} holds a PyTorch release, not an osprey-jax checkpoint; "
            f"convert it first: python convert_torch_ckpt.py {option}{directory} DST"
        )
    if not isinstance(values, dict) or not (directory / "params").is_dir():
        raise ValueError(f"{directory} is not an osprey-jax checkpoint: it has no params/")
    return values


def saved_shapes(directory: Path | str) -> dict[str, Any]:
    """The tree of `jax.ShapeDtypeStruct` that a checkpoint holds, from its metadata alone.

    Adapters are not in it: they are merged as they are read, into kernels of float32.
    """
    return unflatten(_reader(directory).shapes)


def _reader(directory: Path | str) -> "Reader":
    return Reader(directory, _load_description(directory).lora)


class Reader:
    """Reads the leaves of a checkpoint of any model by their paths, with adapters, if any, merged."""

    def __init__(self, directory: Path | str, lora: Lora | None = None):
        self._directory, self._lora = directory, lora
        with damage_named(directory):
            check_index(as_path(directory) / "params")
            metadata = ocp.metadata(as_path(directory) / "params").metadata
            if metadata is None:
                raise ValueError("params/state/_METADATA doesn't tell its arrays")
            self._stored: dict[str, Any] = {
                path: jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype))
                for path, leaf in flatten(metadata).items()
            }
        self.shapes = dict(self._stored)
        """`jax.ShapeDtypeStruct` of what `load` reads, by path."""
        if self._lora is not None:
            for path, leaf in self._stored.items():
                if is_adapter(path):
                    del self.shapes[path]
                elif self._adapter(path):
                    self.shapes[path] = jax.ShapeDtypeStruct(leaf.shape, np.dtype("float32"))

    def _adapter(self, path: str) -> list[str]:
        """Paths of the two leaves that are merged into this one, if any."""
        layer, _, name = path.rpartition("/")
        parts = [f"{layer}/{part}" for part in ADAPTERS]
        return parts if name == quantize.KERNEL and parts[0] in self._stored else []

    def load(self, path: str, target: Any) -> Any:
        """Reads a leaf as `target`, a `jax.ShapeDtypeStruct` with a sharding, or a `_HostArray`.

        Merged in float32, then cast. What makes a leaf unreadable is a ValueError that names it.
        """
        if self._lora is None or not (adapter := self._adapter(path)):
            return _load_leaf(self._directory, path, target)

        def stored(path: str, sharding: Sharding | None) -> Any:
            shape, dtype = self._stored[path].shape, self._stored[path].dtype
            struct = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            return _load_leaf(self._directory, path, struct if sharding else _HostArray(shape, dtype))

        place = None if isinstance(target, _HostArray) else target.sharding
        kernel, a, b = stored(path, place), *(stored(each, None) for each in adapter)
        merged = merge_kernel(kernel, a, b, scale=self._lora.scale, sharding=place, dtype=target.dtype)
        return merged if place else np.asarray(merged)

    def restore(self, abstract_params: Params) -> dict[str, Any]:
        """All leaves as `load_params` restores them."""
        _check_leaves(self._directory, flatten(abstract_params), self.shapes)
        targets = flatten(_placed(abstract_params)).items()
        with damage_named(self._directory):
            return unflatten({path: self.load(path, target) for path, target in targets})

    def leaves(self) -> Iterator[tuple[str, np.ndarray]]:
        """All leaves, one by one, as `load_leaves` reads them."""
        for path, struct in self.shapes.items():
            with damage_named(self._directory):
                leaf = self.load(path, _HostArray(struct.shape, struct.dtype))
            yield path, leaf
            del leaf


def check_index(tree: Path) -> None:
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


def load_params(
    directory: Path | str, abstract_params: Params, *, unquantized: Params | None = None
) -> dict[str, Any]:
    """Restores parameters into the shapes, dtypes and shardings of a tree of `jax.ShapeDtypeStruct`.

    A leaf is cast while it's read; a struct without a sharding is restored to the first local device.

    Args:
      directory: the checkpoint.
      abstract_params: what is wanted.
      unquantized: where quantised parameters are wanted, the tree that a checkpoint of the original has. If
        it is one, its kernels are quantised, one at a time, as they are read.

    Raises a ValueError that lists the leaves that are only wanted (-), only saved (+) or of another shape or
    kind (!), or that names a damaged checkpoint.
    """
    reader = _reader(directory)
    saved = reader.shapes
    if unquantized is None or any(path.endswith(f"/{quantize.SCALE}") for path in saved):
        return reader.restore(abstract_params)
    originals, targets = (flatten(_placed(tree)) for tree in (unquantized, abstract_params))
    _check_leaves(directory, originals, saved)
    params: dict[str, Any] = {}
    with damage_named(directory):
        for path, original in originals.items():
            if (scale := quantize.scale_path(path)) not in targets:
                params[path] = reader.load(path, targets[path])
                continue
            exact = jax.ShapeDtypeStruct(original.shape, saved[path].dtype, sharding=original.sharding)
            kernel = reader.load(path, exact)
            params[path], params[scale] = quantize.quantize_leaf(kernel, targets[path], targets[scale])
            del kernel
    return unflatten(params)


def _check_leaves(directory: Path | str, wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    faults = [f"- {path}" for path in sorted(wanted.keys() - saved.keys())]
    faults += [f"+ {path}" for path in sorted(saved.keys() - wanted.keys())]
    for path in sorted(wanted.keys() & saved.keys()):
        if wanted[path].shape != saved[path].shape:
            faults.append(f"! {path}: saved {saved[path].shape}, wanted {wanted[path].shape}")
        elif _kind(wanted[path].dtype) != _kind(saved[path].dtype):
            faults.append(f"! {path}: saved {saved[path].dtype}, wanted {wanted[path].dtype}")
    if faults:
        raise ValueError(
            f"parameters in {directory} don't fit the model; only wanted (-), only saved (+), "
            "of another shape or kind (!):\n" + "\n".join(faults)
        )


def _kind(dtype: np.dtype) -> str:
    """One for all floats, which are cast into each other; integers are only themselves."""
    return "float" if jnp.issubdtype(dtype, jnp.floating) else dtype.name


def load_leaves(directory: Path | str) -> Iterator[tuple[str, np.ndarray]]:
    """Reads the leaves one by one, in their saved dtypes, to host memory: pairs of path and array."""
    return _reader(directory).leaves()


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


def save_trees(directory: Path, trees: Mapping[str, Params]) -> list[Any]:
    """Begins to write trees, each into a directory of its name; what is returned has a blocking `result()`.

    Leaves may be donated as soon as this returns.
    """
    with _saving():
        return [ocp.save_async(directory / name, tree) for name, tree in trees.items()]


def load_tree(directory: Path, target: Params) -> Params:
    """Reads a tree into `jax.ShapeDtypeStruct` leaves, those without a sharding to the first local device."""
    check_index(directory)
    context = ocp.Context()
    # Each process reads for itself. Where one fails, the others would wait minutes for it.
    context.multiprocessing.active_processes = {jax.process_index()}
    context.multiprocessing.primary_host = jax.process_index()
    with context:
        return ocp.load(directory, _placed(target))


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


def write_description(
    directory: Path, config: OspreyConfig, tokenizer: Tokenizer, *, quantization: str | None = None,
    lora: Lora | None = None,
) -> None:  # fmt: skip
    """Writes what a checkpoint has beside arrays."""
    values = config.to_dict() | ({} if quantization is None else {"quantization": quantization})
    values |= {} if lora is None else {"lora": dataclasses.asdict(lora)}
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    with tempfile.TemporaryDirectory() as local:  # a tokenizer knows no buckets
        tokenizer.save(local)
        for file in Path(local).iterdir():
            (directory / file.name).write_bytes(file.read_bytes())


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
def damage_named(directory: Path | str) -> Iterator[None]:
    """Turns whatever Orbax raises on damaged files, which is of many types, into one ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"the checkpoint {directory} is damaged: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an exception says, without what TensorStore and others append to it."""
    lines = str(error).partition(" [tensorstore_spec=")[0].splitlines()
    return lines[0] if lines else type(error).__name__
