"""A TPU v5e slice of 64 chips, v5e-64: stage 3, or the stage behind a colon.

    python -m osprey_jax.train --config=configs/tpu_v5e.py:stage2 --workdir=gs://BUCKET/stage2 \
        --config.init_from=gs://BUCKET/stage1 --config.data.root=DATA

Before that, with --compile_topology=v5e-64 instead of --workdir, whether it fits, and what it costs.
Data: as in the stage's own file.
"""

from ml_collections import ConfigDict

from configs.pods import on_pod


def get_config(stage: str = "stage3") -> ConfigDict:
    """Stages 2 and 3 have a batch of 64, stage 1 its own of 256."""
    return on_pod(stage, chips=64, batch_size=64)
