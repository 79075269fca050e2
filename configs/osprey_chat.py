"""Osprey-Chat: stage 3 with LLaVA's conversations about whole images, and about none, mixed in.

    python -m osprey_jax.train --config=configs/osprey_chat.py --workdir=runs/chat \
        --config.init_from=runs/stage2 --config.data.root=DATA

Hardware: meant for four devices of 80 GB.
Data: that of `stage3.py` and LLaVA's; what is missing under DATA is told before the first step.
"""

from ml_collections import ConfigDict

from configs import stage3


def get_config() -> ConfigDict:
    """Each set counts by its size."""
    config = stage3.get_config()
    config.data.sources = (*config.data.sources, "llava_instruct")
    return config
