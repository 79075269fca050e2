"""Three million parameters learn the words for coloured shapes, from nothing, on a laptop.

    python -m osprey_jax.train --config=configs/tiny.py --workdir=runs/tiny

Hardware: two CPU cores, about 6 minutes.
"""

from ml_collections import ConfigDict

from configs import base
from osprey_jax.config import tiny


def get_config() -> ConfigDict:
    """Everything is trained, tower included, in float32."""
    config = base.get_config()
    config.steps, config.epochs = 1000, 0.0
    config.batch_size = 16
    config.learning_rate = 1e-3
    config.b2 = 0.95
    config.dtype = config.frozen_dtype = "float32"
    config.checkpoint_every = 500
    config.eval_every = 500
    config.data.sources = config.data.held_out = ("shapes",)
    config.data.buckets = ((224, 7),)
    config.data.systems = ("training", "inference")
    config.model = ConfigDict(tiny().to_dict())
    return config
