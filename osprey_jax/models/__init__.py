"""The networks, as Flax Linen modules: parameters and composition only."""
