"""What the tests of the trainer share: the sizes of a small run, and readers of what a run writes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from osprey_jax import checkpoint

ROOT = Path(__file__).parents[2]
STEPS = 100
SMALL = {
    "steps": STEPS,
    "batch_size": 8,
    "checkpoint_every": 10,
    "eval_every": 50,
    "eval_batches": 2,
    "data.buckets": ((200, 8),),
    "model.vision.image_size": 64,
    "model.vision.depths": (1, 1, 1, 1),
    "model.vision.dims": (8, 8, 16, 16),
    "model.extractor.dim": 16,
    "model.extractor.position_size": 16,
    "model.decoder.dim": 32,
    "model.decoder.ffn_dim": 32,
    "model.decoder.num_layers": 2,
    "model.decoder.num_heads": 2,
    "model.decoder.head_dim": 16,
}
"""A model of some ten thousand parameters, on the data of the tiny one."""
FEW = {"trained": ("projector/.*",), "frozen_dtype": "bfloat16", "dtype": "bfloat16", "eval_every": 0}
"""Little is trained, so little has to be compiled."""

Command = Callable[..., list[str]]
"""From a run's directory and overrides to the command's arguments."""


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def learned(workdir: Path) -> list[dict]:
    """What doesn't depend on the clock, of each step."""
    return [{key: value for key, value in row.items() if "per_second" not in key} for row in rows(workdir)]


def newest(workdir: Path) -> int:
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def leaves(directory: Path) -> dict[str, np.ndarray]:
    return {
        path: np.asarray(leaf) for path, leaf in checkpoint.flatten(checkpoint.ocp.load(directory)).items()
    }
