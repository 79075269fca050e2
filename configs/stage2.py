"""Stage 2, mask-text alignment: the mask-aware extractor learns to tell regions to the decoder.

    python -m osprey_jax.train --config=configs/stage2.py --workdir=runs/stage2 \
        --config.init_from=runs/stage1 --config.data.root=DATA

Hardware: meant for four devices of 80 GB.
Data: the detection and part data sets; what is missing under DATA is told before the first step.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """The extractor alone is trained, on names of objects and parts and on referring expressions."""
    config = base.get_config()
    config.learning_rate = 2e-5
    config.trained = ("extractor/.*",)
    config.mesh.fsdp = 4
    config.data.buckets = ((1280, 5), (1664, 20))
    config.data.sources = ("coco", "refcoco", "refcoco_plus", "pascal_part", "part_imagenet")
    return config
