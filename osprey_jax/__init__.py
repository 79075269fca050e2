"""Osprey, pixel-level visual instruction tuning, in JAX."""
