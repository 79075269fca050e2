"""Stage 1, image-text alignment: the projector learns to carry the tower's features over to the decoder.

    python -m osprey_jax.train --config=configs/stage1.py --workdir=runs/stage1 \
        --config.init_from=checkpoints/start --config.data.root=DATA

Start: Vicuna and the CLIP tower, put together by `convert_torch_ckpt.py` (README).
Hardware: meant for eight devices of 80 GB.
Data: LLaVA's 558 thousand captions; what is missing under DATA is told before the first step.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """The projector alone is trained, on captions in the plain template; LLaVA-1.5's rate and batch."""
    config = base.get_config()
    config.epochs = 1.0
    config.batch_size = 256
    config.accumulation = 4
    config.learning_rate = 1e-3
    config.trained = ("projector/.*",)
    config.mesh.fsdp = 8
    config.data.sources = ("llava_pretrain",)
    config.data.buckets = ((1152, 1),)
    return config
