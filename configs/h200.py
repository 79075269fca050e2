"""One NVIDIA H200 of 141 GB: stage 3, or the stage behind a colon.

    XLA_CLIENT_MEM_FRACTION=0.95 python -m osprey_jax.train --config=configs/h200.py:stage2 \
        --workdir=runs/stage2 --config.init_from=runs/stage1 --config.data.root=DATA

Of the card's memory JAX takes 75 % by default, which is too little for stage 3.
Data: as in the stage's own file.
"""

from ml_collections import ConfigDict

from configs.pods import on_pod


def get_config(stage: str = "stage3") -> ConfigDict:
    """The original's batches; stage 1's is computed in parts."""
    config = on_pod(stage, chips=1, batch_size=4)
    config.accumulation = config.batch_size // 4
    return config
