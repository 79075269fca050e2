"""Non-maximum suppression of boxes, as torchvision's on a CPU: float32, stable, deterministic."""

import jax
import jax.numpy as jnp
import numpy as np

from osprey_jax.typing import Array, Bool, Float, Int


def nms(
    boxes: Float[np.ndarray, "N 4"], scores: Float[np.ndarray, "N"], *, threshold: float
) -> Int[np.ndarray, "K"]:
    """The boxes that stay, best first: those whose IoU with no better one that stays is above `threshold`.

    Equal scores keep their order. Boxes are x0, y0, x1 and y1; two without an area never suppress each other.
    """
    order = np.argsort(-scores, kind="stable")
    count = len(order)
    padding = (1 << max(0, count - 1).bit_length()) - count  # so that few programs are compiled
    limit = np.float32(threshold)
    if float(limit) > threshold:  # IoUs are float32: above the threshold is above the last float32 up to it
        limit = np.nextafter(limit, np.float32(-1))
    kept = survivors(
        np.pad(boxes[order].astype(np.float32), ((0, padding), (0, 0))),
        np.arange(count + padding) < count,
        limit,
    )
    return order[np.asarray(kept)[:count]]


@jax.jit
def survivors(boxes: Float[Array, "N 4"], valid: Bool[Array, "N"], threshold: Array) -> Bool[Array, "N"]:
    """Which of the valid boxes stay, of boxes from the best to the worst.

    One step for each that stays, over all boxes at once.
    """
    places = jnp.arange(len(boxes))
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        waiting, kept = state
        best = jnp.argmax(waiting)
        corner = jnp.maximum(boxes[:, :2], boxes[best, :2][None])
        sides = jnp.maximum(jnp.minimum(boxes[:, 2:], boxes[best, 2:][None]) - corner, 0)
        shared = sides[:, 0] * sides[:, 1]
        suppressed = shared / (areas + areas[best] - shared) > threshold
        chosen = places == best
        return waiting & ~suppressed & ~chosen, kept | chosen

    _, kept = jax.lax.while_loop(lambda state: state[0].any(), step, (valid, jnp.zeros_like(valid)))
    return kept
