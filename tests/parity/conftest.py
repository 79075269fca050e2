"""Pairs of a reference and the same model here, made once for all parity tests."""

import numpy as np
import pytest

from tests.parity.bridge import Pair
from tests.parity.reference import ReferenceConfig
from tests.parity.scenes import picture, region_masks

# Levels of 24, 12, 6 and 3 rows; an embedding table that the ids of `<mask>` and `<pos>` lie beyond.
SMALL = {"image_size": 96, "vocab_size": 61}
GROUPED = {"num_kv_heads": 2, "head_dim": 12, "rope_theta": 5e5, "norm_eps": 1e-3, "num_layers": 3}


@pytest.fixture(scope="session")
def multi_head() -> Pair:
    """The release's kind of decoder: as many key/value heads as query heads."""
    return Pair.of(ReferenceConfig(**SMALL))


@pytest.fixture(scope="session")
def grouped() -> Pair:
    """Grouped queries; a head size, a rotary base and an epsilon of its own; other depths of the stages."""
    return Pair.of(ReferenceConfig(**SMALL, **GROUPED, depths=(2, 1, 3, 2)), seed=1)


@pytest.fixture(scope="session", params=["multi_head", "grouped"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """Either."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def photograph() -> np.ndarray:
    """`(427, 640, 3)` uint8."""
    return picture(427, 640)


@pytest.fixture(scope="session")
def regions() -> np.ndarray:
    """Masks of the photograph, `(7, 427, 640)` bool."""
    return region_masks(427, 640)
