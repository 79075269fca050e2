"""Stage 3 on a TPU v4 pod slice.

    python -m osprey_jax.train --config=configs/tpu_v4.py --workdir=gs://BUCKET/stage3 \
        --config.init_from=gs://BUCKET/stage2/export --config.data.root=DATA

Hardware: meant for v4-32, which is 16 chips. Data: as in `stage3.py`.
"""

from ml_collections import ConfigDict

from configs import stage3


def get_config() -> ConfigDict:
    """A batch of 4 can't fill 16 chips: 32 do, with the rate raised by about the root of that."""
    config = stage3.get_config()
    config.batch_size = 32
    config.learning_rate = 3e-5
    config.mesh.fsdp = 16
    return config
