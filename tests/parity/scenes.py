"""A picture, regions and a prompt that are hard to get right, for parity tests."""

import numpy as np

from tests.parity.reference import IMAGE_ID, ReferenceConfig

REGIONS = ("box", "row", "column", "pixel", "empty", "full", "scattered")


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Waves of three colours under noise `(h, w, 3)` uint8: edges and grain for a resize to get wrong."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(2 * np.pi * (a * y + b * x)) for a, b in ((3, 1), (1, 7), (-11, 13))], axis=-1)
    return np.clip(127 + 90 * waves + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)


def region_masks(height: int, width: int) -> np.ndarray:
    """The masks of `REGIONS`, `(7, h, w)` bool; each thin one shows at one level of 24, 12, 6 and 3 rows."""
    masks = np.zeros((len(REGIONS), height, width), bool)
    masks[0, height // 5 : height // 2, width // 3 : width // 2] = True
    masks[1, height // 6] = True
    masks[2, :, width // 48] = True
    masks[3, height // 24, width // 24] = True
    masks[5] = True
    masks[6] = np.random.default_rng(0).random((height, width)) < 0.02
    return masks


def prompt(config: ReferenceConfig, regions: int, seed: int = 0) -> list[int]:
    """A BOS, some text, the image, and text with every region's two placeholders in it."""
    rng = np.random.default_rng(seed)

    def text(count: int) -> list[int]:
        return rng.integers(3, config.vocab_size, count).tolist()

    ids = [1, *text(4), IMAGE_ID, *text(3)]
    for _ in range(regions):
        ids += [config.mask_id, config.position_id, *text(2)]
    return [*ids, *text(3)]
