"""Small releases to convert, and ways to edit and compare them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from orbax.checkpoint import v1 as ocp

from osprey_jax import checkpoint, convert, convert_rules
from tests.parity import reference

SIZES = reference.ReferenceConfig(
    vocab_size=64, num_kv_heads=2, extractor_dim=20, image_size=96, norm_eps=1e-6, rope_theta=5000.0
)
TRUNK = "model.vision_tower.vision_tower.visual.trunk."
DTYPE_OF = {"model.vision_tower.": torch.float16, "mask_extractor.": torch.float32}


class FileTokenizer:
    """Stands for the tokenizer: a file that travels along, 64 pieces before the placeholders."""

    mask_id, position_id, bos_id, eos_id = 64, 65, 1, 2

    def __init__(self, data: bytes):
        self.data = data

    @classmethod
    def load(cls, directory: Path) -> "FileTokenizer":
        path = Path(directory) / "tokenizer.model"
        if not path.is_file():
            raise ValueError(f"no tokenizer.model in {directory}")
        return cls(path.read_bytes())

    def save(self, directory: Path) -> None:
        (Path(directory) / "tokenizer.model").write_bytes(self.data)


def write_release(model: reference.OspreyReference, directory: Path, **options: object) -> Path:
    tokenizer = directory.parent / "pieces"
    tokenizer.write_bytes(b"pieces")
    reference.write_release(model, directory, tokenizer_model=tokenizer, **options)
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | {"image_size": SIZES.image_size}))
    for path in [*directory.glob("*.bin"), *directory.glob("*.safetensors")]:
        edit_shard(path, lambda tensors: {name: cast(name, tensor) for name, tensor in tensors.items()})
    return directory


def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(next((v for k, v in DTYPE_OF.items() if name.startswith(k)), torch.bfloat16))


def edit_shard(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(reference._read_shard(path))
    if path.suffix == ".safetensors":
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # not a view of the file itself
        reference.save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def edit_tensors(
    directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    """Rewrites all tensors of a release as one file, without an index."""
    tensors = change(reference.read_shards(directory))
    for path in [*directory.glob("*.bin"), *directory.glob("*.index.json")]:
        path.unlink()
    torch.save(tensors, directory / "pytorch_model.bin")


def edit_fields(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def used(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not convert_rules.is_ignored(name)}


def leaves(directory: Path) -> dict[str, np.ndarray]:
    """All parameters of a checkpoint as Orbax itself gives them, which is faster than leaf by leaf."""
    return {k: np.asarray(v) for k, v in checkpoint.flatten(ocp.load(directory / "params")).items()}


def assert_fails(source: Path | str, destination: Path, message: str, **options: object) -> None:
    before = sorted(destination.parent.iterdir())
    with pytest.raises(ValueError, match=message):
        convert.convert(source, destination, **options)
    assert sorted(destination.parent.iterdir()) == before
