"""Describes the regions of a whole data set: `python -m osprey_jax.label`."""
