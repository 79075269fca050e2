"""Checkpoints of SAM: `config.json`, which says `"model": "sam"`, and `params/` beside it.

As Osprey's, a checkpoint is complete or it isn't there.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import jax

from osprey_jax import checkpoint
from osprey_jax.config import build
from osprey_jax.directories import as_path, new_directory
from osprey_jax.sam.config import SamConfig
from osprey_jax.sam.network import abstract_params
from osprey_jax.typing import Params

MODEL = "sam"
"""What tells these checkpoints from Osprey's."""


def save(directory: Path | str, parts: Iterable[Params], config: SamConfig) -> None:
    """Writes a checkpoint from trees without a leaf in common. Raises ValueError where `directory` exists.

    A part is written before the next one is asked for; every leaf keeps its dtype.
    """
    with new_directory(directory) as partial:
        if jax.process_index() == 0:
            values = {"model": MODEL, **config.to_dict()}
            (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        checkpoint.write_parts(partial / "params", parts)


def load_config(directory: Path | str) -> SamConfig:
    """Reads a checkpoint's configuration; a ValueError says what makes `directory` none of SAM's."""
    path = as_path(directory)
    if path.is_file():
        raise ValueError(
            f"{directory} is a file, not an osprey-jax checkpoint; "
            f"convert it first: python convert_torch_ckpt.py --sam {directory} DST"
        )
    values = checkpoint.read_description(directory)
    if "model" not in values:
        raise ValueError(f"{directory} is an Osprey checkpoint, not one of SAM")
    if (model := values.pop("model")) != MODEL:
        raise ValueError(f"{path / 'config.json'}: model must be {MODEL!r}, got {model!r}")
    try:
        return build(SamConfig, values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None


def load(directory: Path | str, dtype: str = "float32") -> tuple[SamConfig, Params]:
    """Reads a checkpoint. Raises ValueError that says what makes `directory` none of SAM's.

    Leaves are cast to `dtype` while they are read, to the first local device.
    """
    config = load_config(directory)
    return config, checkpoint.Reader(directory).restore(abstract_params(config, dtype))
