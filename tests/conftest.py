"""Settings that all tests share; they have to be made before JAX starts its devices."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Enough fake devices for a mesh of 2 × 2 × 2; what runs on one of them is about as fast as without.
_FLAGS = (os.environ.get("XLA_FLAGS"), "--xla_force_host_platform_device_count=8")
os.environ["XLA_FLAGS"] = " ".join(flag for flag in _FLAGS if flag)
# Tests write nothing at home.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".cache")
# No test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import jax

# Set here too, for a plugin of pytest may have imported JAX before this file.
jax.config.update("jax_platforms", "cpu")
# A silent promotion of dtypes or ranks hides faults that only show at another precision or size.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
