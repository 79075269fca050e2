"""Files of PyTorch tensors, the `.bin` and safetensors shards of a checkpoint, as NumPy arrays and back.

Tensors' names, shapes and dtypes are read first, their data one at a time and when asked for. The only module
that imports torch, and only when it is used.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from osprey_jax.checkpoint import first_line

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes that are converted; a tensor of another one is listed with dtype `void`."""
MAX_LISTED = 20
"""Lines of each kind in an error; the rest is counted."""
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Entry(NamedTuple):
    """A tensor in a file: its shape, its dtype and how to read it."""

    file: Path
    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def read_directory(directory: Path) -> dict[str, Entry]:
    """All tensors of a directory, through the index if there is one. Raises ValueError as `convert` does."""
    name = _entrance([path.name for path in directory.iterdir()])
    if name is None:
        raise ValueError(f"no weights in {directory}: neither {' nor '.join(_WHOLE)}, nor an index")
    return _read_indexed(directory / name) if name.endswith(".json") else read_file(directory / name)


def weight_patterns(names: Collection[str]) -> list[str]:
    """Patterns of the files that `read_directory` would read in a directory of these files."""
    name = _entrance(names)
    if name is None:
        return []
    stem, suffix = name.removesuffix(".index.json").split(".")
    return [name, f"{stem}-*.{suffix}"] if name.endswith(".json") else [name]


def _entrance(names: Collection[str]) -> str | None:
    """Which file of a directory tells its tensors: an index, or one that has all; safetensors first."""
    wanted = (name for whole in _WHOLE for name in (f"{whole}.index.json", whole))
    return next((name for name in wanted if name in names), None)


def _read_indexed(index: Path) -> dict[str, Entry]:
    try:
        weight_map = read_json(index)["weight_map"]
        files = sorted(set(weight_map.values()))
        paths = [index.parent / Path(file).name for file in files]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} has no weight_map of tensor names to files") from None
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ValueError(f"{index} names shards that are not there: {', '.join(missing)}")
    entries: dict[str, Entry] = {}
    for path in paths:
        merge(entries, read_file(path))
    faults = listed([f"- {name} in {file}" for name, file in weight_map.items() if name not in entries])
    faults += listed(
        [f"+ {name} in {entry.file.name}" for name, entry in entries.items() if name not in weight_map]
    )
    if faults:
        raise ValueError(
            f"{index} and its shards disagree; only in the index (-), only in a shard (+):\n"
            + "\n".join(faults)
        )
    return entries


def merge(entries: dict[str, Entry], more: Mapping[str, Entry]) -> None:
    """Adds tensors to `entries`. Raises ValueError where one is there already, naming both files."""
    if twice := [name for name in more if name in entries]:
        first, second = entries[twice[0]].file, more[twice[0]].file
        rest = f" and {len(twice) - 1} more tensors" if len(twice) > 1 else ""
        raise ValueError(f"duplicate tensor {twice[0]}{rest}: in {first} and in {second}")
    entries.update(more)


def read_file(path: Path) -> dict[str, Entry]:
    """The tensors of one file; their data are read later. Raises ValueError where the file can't be read."""
    if not path.is_file():
        raise ValueError(f"no file {path}")
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"cannot read {path}, it may be truncated or of another kind: {first_line(error)}"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Entry]:
    from safetensors import safe_open

    entries = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            info = file.get_slice(name)
            dtype = np.dtype(_SAFETENSORS_DTYPES.get(info.get_dtype(), np.void))
            entries[name] = Entry(path, tuple(info.get_shape()), dtype, partial(_read_safetensor, path, name))
    return entries


def _read_pickle(path: Path) -> dict[str, Entry]:
    """Tensors of a `torch.save` file, mapped anew for every read.

    Pages of a mapping that stays count as memory. Files from before torch 1.6 can't be mapped; their tensors
    are kept in memory.
    """
    with path.open("rb") as file:
        mappable = file.read(4) == b"PK\x03\x04"
    entries = {}
    for name, tensor in _load_pickle(path, mappable=mappable).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        read = partial(_read_tensor, path, name) if mappable else partial(_to_array, tensor)
        entries[name] = Entry(
            path, tuple(tensor.shape), np.dtype(dtype if dtype in DTYPES else np.void), read
        )
    return entries


def _load_pickle(path: Path, *, mappable: bool = True) -> dict[str, "torch.Tensor"]:
    import torch

    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    if not isinstance(tensors, dict) or not all(isinstance(v, torch.Tensor) for v in tensors.values()):
        raise ValueError("not a dictionary of tensors")
    return tensors


def _read_tensor(path: Path, name: str) -> np.ndarray:
    return _to_array(_load_pickle(path)[name])


def _read_safetensor(path: Path, name: str) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return _to_array(file.get_tensor(name))


def write_shards(directory: Path, tensors: Iterable[tuple[str, np.ndarray]], *, shard_bytes: int) -> None:
    """Writes `pytorch_model-*-of-*.bin`, each closed once it holds `shard_bytes`, and their index."""
    import torch

    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total = held = 0
    for name, array in tensors:
        if held >= shard_bytes:
            torch.save(shard, directory / f"{len(shards)}.bin")
            shards.append(list(shard))
            shard, held = {}, 0
        shard[name] = _to_tensor(array)
        held += array.nbytes
        total += array.nbytes
    torch.save(shard, directory / f"{len(shards)}.bin")
    shards.append(list(shard))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{len(shards):05d}.bin"
        (directory / f"{number}.bin").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / "pytorch_model.bin.index.json", index)


def write_file(path: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes one file of all tensors, which are in memory together; it is whole or it isn't there.

    Raises ValueError where `path` exists.
    """
    import torch

    if path.exists():
        raise ValueError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.incomplete")
    try:
        torch.save({name: _to_tensor(array) for name, array in tensors}, partial)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _to_array(tensor: "torch.Tensor") -> np.ndarray:
    """A tensor's memory as an array; NumPy doesn't know torch's bfloat16, so its bits go by way of int16."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def _to_tensor(array: np.ndarray) -> "torch.Tensor":
    """A copy of an array as a tensor, which owns its memory: `torch.save` writes whole storages."""
    import torch

    copy = np.array(array, order="C")
    if copy.dtype == jnp.bfloat16:
        return torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copy)


def is_float(dtype: np.dtype) -> bool:
    """Whether tensors of this dtype are converted."""
    return dtype.name in DTYPES


def read_json(path: Path) -> Any:
    """Parses a JSON file; the ValueError of a broken one names it."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def write_json(path: Path, value: object) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def listed(lines: list[str]) -> list[str]:
    """Lines of one kind for an error, at most `MAX_LISTED` and how many more there are."""
    rest = len(lines) - MAX_LISTED
    return lines if rest <= 0 else [*lines[:MAX_LISTED], f"{lines[0][0]} … and {rest} more"]
