"""Converts SAM from PyTorch: the original's `.pth` files, there and back, and transformers' directories.

Sizes are those that the tensors' shapes tell; what no shape tells is in transformers' `config.json`, and for
the original's files in that code.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from osprey_jax import checkpoint, torch_files
from osprey_jax.convert_leaves import check_dtypes, in_parts, leaves_of_tensors, tensors_of_leaves
from osprey_jax.convert_rules import check_tensors, slots_of
from osprey_jax.convert_sam_rules import ORIGINAL_HEADS, Layout, check_supported, read_sizes, rules
from osprey_jax.sam import files
from osprey_jax.sam.network import abstract_params
from osprey_jax.torch_files import Entry

SHARED = "shared_image_embedding.positional_embedding"
TIED = "prompt_encoder.shared_embedding.positional_embedding"
"""In transformers' model the same parameter as `SHARED`; files have either or both."""
SECTIONS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")


def convert(source: Path | str, destination: Path | str, *, dtype: str | None = None) -> None:
    """Writes the checkpoint `destination` from the original's file or from a directory of transformers'.

    `dtype` is one of `torch_files.DTYPES`; by default each leaf keeps its tensors'. Raises ValueError, and
    leaves nothing behind, where anything is missing, unknown, damaged or of another shape.
    """
    source = Path(source)
    layout: Layout = "transformers" if source.is_dir() else "original"
    if layout == "transformers":
        fields = _read_fields(source)
        check_supported(fields)
        entries = torch_files.read_directory(source)
        _untie(entries)
    else:
        fields, entries = {}, torch_files.read_file(source)
        if any(name.startswith("vision_encoder.") for name in entries):
            raise ValueError(
                f"{source} has transformers' names; give its directory, whose config.json tells the rest"
            )
    found = {name: entry.shape for name, entry in entries.items()}
    config = read_sizes(found, fields, layout)
    shapes = {path: leaf.shape for path, leaf in checkpoint.flatten(abstract_params(config)).items()}
    slots = slots_of(shapes, rules(config, layout))
    check_tensors(found, slots, ignored=lambda name: False)
    check_dtypes(slots, entries)
    leaves = leaves_of_tensors(shapes, slots, entries, dtype=np.dtype(dtype) if dtype else None)
    files.save(destination, in_parts(leaves), config)


def to_torch(source: Path | str, destination: Path | str) -> None:
    """Writes the checkpoint `source` as the original's file; tensors have the dtypes of the leaves.

    What is not in that file is not kept: the norms' epsilons, 1e-6 in transformers' decoder, are the original
    code's. Raises ValueError where `destination` exists, `source` is no checkpoint of SAM, or its decoder
    doesn't have the original's heads.
    """
    config = files.load_config(source)
    if config.decoder.num_heads != ORIGINAL_HEADS:
        raise ValueError(
            f"{source} has {config.decoder.num_heads} heads in its decoder; "
            f"the original's files don't tell, its code has {ORIGINAL_HEADS}"
        )
    reader = checkpoint.Reader(source)
    shapes = {path: leaf.shape for path, leaf in reader.shapes.items()}
    if shapes != {path: leaf.shape for path, leaf in checkpoint.flatten(abstract_params(config)).items()}:
        raise ValueError(f"the parameters in {source} are not those of its config.json")
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in reader.shapes.values())
    slots = slots_of(shapes, rules(config, "original"))
    tensors = tensors_of_leaves(reader.leaves(), slots, num_bytes=num_bytes)
    torch_files.write_file(Path(destination), tensors)


def is_sam(directory: Path | str) -> bool:
    """Whether a directory is, or seems to be, a checkpoint of SAM rather than one of Osprey."""
    path = Path(directory) / "config.json"
    values = torch_files.read_json(path) if path.is_file() else None
    return isinstance(values, dict) and "sam" in (values.get("model"), values.get("model_type"))


def _read_fields(directory: Path) -> dict[str, Any]:
    """What transformers' `config.json` says of the networks, with dotted keys."""
    path = directory / "config.json"
    if (directory / "params").is_dir():
        raise ValueError(
            f"{directory} is an osprey-jax checkpoint already; --to-torch converts one of SAM back"
        )
    if not path.is_file():
        raise ValueError(f"no config.json in {directory}; of the original's files give the .pth itself")
    values = torch_files.read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    if (model := values.get("model_type")) != "sam":
        raise ValueError(f"{path}: model_type is {model!r}, only 'sam' is converted by --sam")
    fields: dict[str, Any] = {}
    for section in SECTIONS:
        inner = values.get(section) or {}
        if not isinstance(inner, Mapping):
            raise ValueError(f"{path}: {section} must be a mapping, got {inner!r}")
        fields |= {f"{section}.{key}": value for key, value in inner.items()}
    return fields


def _untie(entries: dict[str, Entry]) -> None:
    """Leaves one of the two names that a shared tensor has."""
    if TIED not in entries:
        return
    tied = entries.pop(TIED)
    shared = entries.setdefault(SHARED, tied)
    if tied.shape != shared.shape or tied.read().tobytes() != shared.read().tobytes():
        raise ValueError(f"{SHARED} and {TIED} differ, but are one parameter of the model")
