"""What the tests of the trainer share: the sizes of a small run, and readers of what a run writes."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from osprey_jax import checkpoint

ROOT = Path(__file__).parents[2]
STEPS = 50
SMALL = {
    "steps": STEPS,
    "batch_size": 8,
    "learning_rate": 2e-3,
    "checkpoint_every": 5,
    "eval_every": 25,
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
    "model.decoder.num_kv_heads": 2,
    "model.decoder.head_dim": 16,
}
"""A model of some ten thousand parameters, on the data of the tiny one."""
FEW = {"trained": ("projector/.*",), "frozen_dtype": "bfloat16", "dtype": "bfloat16", "eval_every": 0}
"""Little is trained, so little has to be compiled."""

Command = Callable[..., list[str]]
"""From a run's directory and overrides to the command's arguments."""
Start = Callable[..., subprocess.Popen]
"""Starts the command with these arguments."""


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def learned(workdir: Path) -> list[dict]:
    """What doesn't depend on the clock, of each step."""
    return [{key: value for key, value in row.items() if "per_second" not in key} for row in rows(workdir)]


def steps(workdir: Path) -> int:
    """How many steps are in the metrics at this moment."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.001)


def newest(workdir: Path) -> int:
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def leaves(directory: Path) -> dict[str, np.ndarray]:
    """What a checkpoint's `params/` or `optimizer/` holds."""
    target = checkpoint.ocp.metadata(directory).metadata
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), target)
    return {
        path: np.asarray(leaf)
        for path, leaf in checkpoint.flatten(checkpoint.ocp.load(directory, target)).items()
    }
