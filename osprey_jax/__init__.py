"""Osprey, pixel-level visual instruction tuning, in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osprey_jax.predictor import Generation as Generation
    from osprey_jax.predictor import Osprey as Osprey

__all__ = ["Generation", "Osprey"]


def __getattr__(name: str) -> Any:
    # On first use, so that processes which only read data don't import JAX.
    if name in __all__:
        from osprey_jax import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
