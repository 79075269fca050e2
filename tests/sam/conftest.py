"""A tiny SAM with random weights, saved as a checkpoint."""

from pathlib import Path

import jax
import numpy as np
import pytest

from osprey_jax.checkpoint import flatten, unflatten
from osprey_jax.sam import files
from osprey_jax.sam.config import SamConfig, tiny
from osprey_jax.sam.network import abstract_params
from osprey_jax.sam.predictor import Sam
from osprey_jax.typing import Params


def loud_params(config: SamConfig, *, seed: int) -> Params:
    """Random parameters whose masks aren't faint: some pixels are far above zero, some far below."""
    rng = np.random.default_rng(seed)

    def drawn(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.standard_normal(leaf.shape, np.float32)
        if path.endswith("kernel"):
            inputs = leaf.size / leaf.shape[-1] if "qkv" not in path else leaf.shape[0]
            values *= 30 * inputs**-0.5 if "hypernetworks" in path and "layers_2" in path else inputs**-0.5
        elif path.endswith("scale"):
            values = 1 + 0.1 * values
        elif path == "mask_decoder/iou_head/layers_2/bias":
            values = 0.9 + 0.1 * values
        elif path.endswith(("bias", "rel_pos_h", "rel_pos_w", "pos_embed")):
            values *= 0.1
        return values

    shapes = flatten(abstract_params(config))
    return unflatten({path: drawn(path, leaf) for path, leaf in shapes.items()})


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sam") / "checkpoint"
    files.save(directory, [loud_params(tiny(), seed=0)], tiny())
    return directory


@pytest.fixture(scope="session")
def sam(checkpoint: Path) -> Sam:
    return Sam.load(checkpoint)


@pytest.fixture
def photo() -> np.ndarray:
    """Squares of colours, 60 pixels high and 100 wide."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 10, 3), dtype=np.uint8)
    return coarse.repeat(10, axis=0).repeat(10, axis=1)
