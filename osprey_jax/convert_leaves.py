"""Leaves out of PyTorch's tensors and tensors out of leaves, a few at a time, as a table of slots tells."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from osprey_jax import checkpoint
from osprey_jax.convert_rules import Slot
from osprey_jax.torch_files import DTYPES, Entry, Shape, is_float

PART_BYTES = 256 << 20
"""Leaves are handed to Orbax in groups of at least so many bytes."""


def check_dtypes(slots: Mapping[str, Slot], entries: Mapping[str, Entry]) -> None:
    """Raises ValueError that names tensors of other dtypes than `DTYPES`."""
    unsupported = [f"{name} ({entries[name].dtype})" for name in slots if not is_float(entries[name].dtype)]
    if unsupported:
        raise ValueError(f"only {', '.join(DTYPES)} tensors are supported, got {', '.join(unsupported)}")


def leaves_of_tensors(
    shapes: Mapping[str, Shape], slots: Mapping[str, Slot], entries: Mapping[str, Entry], *,
    dtype: np.dtype | None, fresh: Callable[[str], np.ndarray] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:  # fmt: skip
    """Yields every leaf: read from its tensors, or what `fresh` gives for one that no tensor writes.

    Without a `dtype` a leaf has its tensors', or float32 where they differ, as a fresh one has.
    """
    by_leaf: dict[str, list[tuple[Slot, Entry]]] = {}
    for name, slot in slots.items():
        by_leaf.setdefault(slot.path, []).append((slot, entries[name]))
    total = sum(entries[name].dtype.itemsize * int(np.prod(slot.torch_shape)) for name, slot in slots.items())
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting") as progress:
        for path, shape in shapes.items():
            if path not in by_leaf:
                assert fresh is not None, f"no tensor writes {path}"
                yield path, fresh(path).astype(dtype or np.float32)
                continue
            dtypes = {entry.dtype for _, entry in by_leaf[path]}
            own = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)  # which holds both halves
            leaf = np.empty(shape, dtype or own)
            for slot, entry in by_leaf[path]:
                _assign(leaf, slot, entry)
                progress.update(entry.dtype.itemsize * int(np.prod(entry.shape)))
            yield path, leaf
            del leaf


def _assign(leaf: np.ndarray, slot: Slot, entry: Entry) -> None:
    target = leaf[...] if slot.place is None else leaf[slot.place]
    value = slot.transform.to_jax(entry.read()).reshape(target.shape)
    if value.dtype == target.dtype:
        # As integers: every bit survives, and NumPy copies them faster than bfloat16.
        bits = f"u{target.itemsize}"
        target.view(bits)[...] = value.view(bits)
        return
    with np.errstate(over="ignore"):
        target[...] = value
    if np.finfo(np.float16).dtype == target.dtype and np.isinf(target).any() and not np.isinf(value).any():
        raise ValueError(f"{slot.path} has values beyond float16's range; choose another --dtype")


def in_parts(leaves: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, Any]]:
    """Groups leaves into trees of at least `PART_BYTES`, but for the last."""
    part: dict[str, np.ndarray] = {}
    size = 0
    for path, leaf in leaves:
        part[path] = leaf
        size += leaf.nbytes
        del leaf
        if size >= PART_BYTES:
            tree, part, size = checkpoint.unflatten(part), {}, 0
            yield tree
            del tree
    if part:
        yield checkpoint.unflatten(part)


def tensors_of_leaves(
    leaves: Iterable[tuple[str, np.ndarray]], slots: Mapping[str, Slot], *, num_bytes: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors that make up leaves by name: views in torch's layout, one leaf at a time."""
    by_leaf: dict[str, list[tuple[str, Slot]]] = {}
    for name, slot in slots.items():
        by_leaf.setdefault(slot.path, []).append((name, slot))
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="writing") as progress:
        for path, leaf in leaves:
            for name, slot in by_leaf[path]:
                part = leaf if slot.place is None else leaf[slot.place]
                yield name, slot.transform.to_torch(part)
                progress.update(part.nbytes)
            del leaf, part
