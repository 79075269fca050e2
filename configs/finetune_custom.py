"""Fine-tunes a model on your own regions: a JSONL file, its name behind a colon.

    python -m data_pipelines validate mine.jsonl
    python -m osprey_jax.train --config=configs/finetune_custom.py:mine.jsonl --workdir=runs/mine \
        --config.init_from=checkpoints/osprey

`data_pipelines/sources/custom.py` tells what a line holds.
Hardware: meant for four devices of 80 GB; `--config.mesh.fsdp=N` for N of them.
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs import stage3


def get_config(file: str = "") -> ConfigDict:
    """Stage 3's optimisation for three epochs over the file."""
    if not file:
        raise ValueError("name your file behind a colon: --config=configs/finetune_custom.py:mine.jsonl")
    config = stage3.get_config()
    config.epochs = 3.0
    config.data.sources = (f"custom:{Path(file).absolute()}",)
    return config
