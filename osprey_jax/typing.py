"""Axis letters and the array aliases that every module uses.

One key for every annotation and einsum of the package:

    B batch           T query length    S key length
    N query heads     K key/value heads G query heads per key/value head (N / K)
    H head size       D model width     F feed-forward width   V vocabulary   L layers
    Y X rows and columns of a feature map or a model-sized mask     C channels
    I images of a sequence
    R regions         h w rows and columns of an image or mask at its own resolution
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

Array = jax.Array
ArrayLike = jax.Array | np.ndarray

Params = Mapping[str, Any]
"""A nested mapping of parameter arrays, as `flax.linen.Module.init` returns under `"params"`."""

__all__ = ["Array", "ArrayLike", "Bool", "Float", "Int", "Params", "UInt8"]
