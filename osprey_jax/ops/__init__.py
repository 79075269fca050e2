"""Pure functions of arrays: no Flax, no parameters, no sharding."""
