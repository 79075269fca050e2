"""A network and scenes that are small enough for tests."""

import numpy as np

from data_pipelines.shapes import Shapes
from osprey_jax.sam.config import DecoderConfig, EncoderConfig, SamConfig
from osprey_jax.sam.prompts import Mix
from osprey_jax.sam.training import Settings

SIDE = 64
CONFIG = SamConfig(
    encoder=EncoderConfig(
        image_size=SIDE,
        patch_size=16,
        dim=16,
        ffn_dim=32,
        num_layers=1,
        num_heads=2,
        window_size=2,
        global_layers=(),
        out_dim=16,
    ),
    decoder=DecoderConfig(num_layers=1, num_heads=2, ffn_dim=32, iou_dim=16, iou_layers=2, mask_channels=8),
)
SETTINGS = Settings(steps=4, batch_size=2, warmup_steps=1, mix=Mix(clicks=2, boxes=2))


def scene(number: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = Shapes(size=SIDE).scene(number)
    return drawn.image, drawn.masks
