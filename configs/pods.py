"""The stages on slices of many chips, which a batch of 4 can't fill; no configuration by itself."""

import importlib
import math

from ml_collections import ConfigDict

STAGES = ("stage1", "stage2", "stage3")


def on_pod(stage: str, *, chips: int, batch_size: int) -> ConfigDict:
    """A stage with parameters and batch split over all chips, and decoder layers computed again.

    A batch larger than the stage's own raises the learning rate by the root of their ratio.
    Reference: Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, arXiv
    2205.10287.
    """
    if stage not in STAGES:
        raise ValueError(f"no stage {stage!r}: behind the colon stands one of {', '.join(STAGES)}")
    config: ConfigDict = importlib.import_module(f"configs.{stage}").get_config()
    if batch_size > config.batch_size:
        config.learning_rate *= math.sqrt(batch_size / config.batch_size)
        config.batch_size = batch_size
    config.accumulation = 1
    config.mesh.fsdp = chips
    config.remat = "full"
    return config
