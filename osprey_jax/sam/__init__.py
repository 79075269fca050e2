"""Segment Anything in JAX: masks from points, boxes and masks, or of everything in an image."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osprey_jax.sam.predictor import Sam as Sam

__all__ = ["Sam"]


def __getattr__(name: str) -> Any:
    # On first use, so that reading a configuration doesn't import the predictor.
    if name in __all__:
        from osprey_jax.sam import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
