"""Stage 3, end to end: projector, extractor and decoder learn to follow instructions about regions.

    python -m osprey_jax.train --config=configs/stage3.py --workdir=runs/stage3 \
        --config.init_from=runs/stage2 --config.data.root=DATA

Hardware: meant for four devices of 80 GB.
Data: Osprey-724K, Visual Genome and VCR; what is missing under DATA is told before the first step.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """All but the tower is trained."""
    config = base.get_config()
    config.learning_rate = 1e-5
    config.trained = ("projector/.*", "extractor/.*", "decoder/.*")
    config.mesh.fsdp = 4
    config.data.sources = (
        "osprey_conversation",
        "osprey_short_form",
        "osprey_part_level",
        "osprey_lvis",
        "osprey_detailed",
        "vg",
        "vcr",
    )
    return config
