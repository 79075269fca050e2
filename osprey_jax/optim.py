"""AdamW with warm-up and cosine decay, clipping by global norm, and freezing by path.

Reference: Loshchilov & Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101.
Differs: nothing in the formulas. They are written out here, rather than taken from optax, for accuracy:
`1 - b2**t` in float32 is off by 1e-5 in the first steps, and `1 + cos(x)` has few correct digits in the last
ones. Both have forms without cancellation, which agree with torch to 1e-6.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from osprey_jax.checkpoint import flatten, unflatten
from osprey_jax.lora import is_adapter
from osprey_jax.typing import Array, Bool, Float, Int, Params

SETTLED = 50
"""Steps over which the gradients' usual norm is taken, and before which nothing counts as unusual."""


@flax.struct.dataclass
class TrainState:
    """All that a step changes or needs: a pytree.

    The parameters are parted in two trees. Only `trained` is differentiated and has moments.
    """

    step: Int[Array, ""]
    """Updates made so far."""
    trained: Params
    frozen: Params
    mu: Params
    """First moments of the trained parameters, float32 or bfloat16."""
    nu: Params
    """Second moments, float32."""
    log_norm: Float[Array, ""]
    """The usual logarithm of the gradients' norm: its mean, recent steps weighing most."""

    @property
    def params(self) -> Params:
        """The whole tree, as the model takes it."""
        return merge(self.trained, self.frozen)

    def to_arrays(self) -> dict[str, Params]:
        """The state as a checkpoint holds it, which has the step for its name."""
        optimizer = {"mu": self.mu, "nu": self.nu, "log_norm": self.log_norm}
        return {"params": self.params, "optimizer": optimizer}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Any], patterns: Sequence[str], *, step: Int[Array, ""]
    ) -> "TrainState":
        """The inverse of `to_arrays`; `patterns` as in `partition`."""
        trained, frozen = partition(arrays["params"], patterns)
        return cls(step=step, trained=trained, frozen=frozen, **arrays["optimizer"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """How parameters are updated. `weight_decay` acts on every trained parameter."""

    peak_learning_rate: float
    warmup_steps: int
    total_steps: int
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Largest norm of all gradients together; 0 for no clipping."""
    spike: float = 0.0
    """From how many times its usual value on the gradients' norm is a spike; 0 knows none."""
    skip_spikes: bool = False
    """Whether spikes, and gradients that are no numbers, change nothing."""

    def learning_rate(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """Rate of the update after `step` others: from 0 up to the peak, then half a cosine down to 0.

        The first update after `warmup_steps` has the peak, the last of `total_steps` a rate just above 0.
        """
        done = step.astype(jnp.float32)
        rising = done / max(self.warmup_steps, 1)
        left = (self.total_steps - done) / max(self.total_steps - self.warmup_steps, 1)
        # (1 + cos πx) / 2 = sin²(π(1 - x) / 2), whose small values are as accurate as its large ones.
        falling = jnp.square(jnp.sin(math.pi / 2 * jnp.clip(left, 0.0, 1.0)))
        return self.peak_learning_rate * jnp.where(done < self.warmup_steps, rising, falling)

    def update(self, state: TrainState, gradients: Params) -> tuple[TrainState, dict[str, Array]]:
        """One step of clipped AdamW. Gradients are those of `state.trained`, in float32.

        Returns: the new state, and the scalars `grad_norm` (before clipping), `learning_rate`, `spike` (how
        many times the usual norm it is where that is too many, else 0) and `skipped` (0 or 1).
        """
        norm = global_norm(gradients)
        rate = self.learning_rate(state.step)
        # As torch's `clip_grad_norm_`, its 1e-6 included.
        factor = jnp.minimum(self.clip_norm / (norm + 1e-6), 1.0) if self.clip_norm else jnp.ones(())
        count = (state.step + 1).astype(jnp.float32)
        correction1, correction2 = (-jnp.expm1(count * math.log(b)) for b in (self.b1, self.b2))

        gradients = jax.tree.map(lambda g: g * factor, gradients)
        mu = jax.tree.map(lambda m, g: self.b1 * _float32(m) + (1 - self.b1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: self.b2 * v + (1 - self.b2) * jnp.square(g), state.nu, gradients)

        def updated(p: Array, m: Array, v: Array) -> Array:
            direction = (m / correction1) / (jnp.sqrt(v / correction2) + self.eps)
            return p - rate * (direction + self.weight_decay * p)

        trained = jax.tree.map(updated, state.trained, mu, nu)
        mu = jax.tree.map(lambda m, before: m.astype(before.dtype), mu, state.mu)

        usual, log_norm, spike = self._judged(state, norm)
        new = TrainState(
            step=state.step + 1, trained=trained, frozen=state.frozen, mu=mu, nu=nu, log_norm=log_norm
        )
        numbers = {"grad_norm": norm, "learning_rate": rate, "spike": spike, "skipped": jnp.zeros(())}
        if self.skip_spikes:
            kept = jax.tree.map(lambda before, after: jnp.where(usual, after, before), state, new)
            new = kept.replace(step=new.step, frozen=state.frozen, log_norm=log_norm)
            numbers["skipped"] = (~usual).astype(jnp.float32)
        return new, numbers

    def _judged(
        self, state: TrainState, norm: Float[Array, ""]
    ) -> tuple[Bool[Array, ""], Float[Array, ""], Float[Array, ""]]:
        """Whether a norm is a usual one, the usual one's new logarithm, and the size of a spike."""
        log = jnp.log(norm)
        ratio = jnp.exp(log - state.log_norm)
        settled = (self.spike > 0) & (state.step >= SETTLED)
        spike = jnp.where(settled & (ratio > self.spike) & jnp.isfinite(norm), ratio, 0.0)
        usual = jnp.isfinite(norm) & (spike == 0)
        weight = jnp.maximum(1 / (state.step + 1).astype(jnp.float32), 1 / SETTLED)
        # A spike counts as the largest of what is usual, so that a lasting change becomes usual itself.
        most = jnp.where(settled, state.log_norm + math.log(self.spike or 1.0), jnp.inf)
        mean = state.log_norm + weight * (jnp.minimum(log, most) - state.log_norm)
        return usual, jnp.where(jnp.isfinite(norm) & (norm > 0), mean, state.log_norm), spike


def init_state(
    params: Params,
    patterns: Sequence[str],
    *,
    frozen_dtype: jnp.dtype | str,
    mu_dtype: jnp.dtype | str = "float32",
) -> TrainState:
    """The state before the first step; `patterns` as in `partition`. Frozen parameters are cast.

    First moments may be bfloat16. Second ones may not: with `b2` near 1 a step changes them by less than what
    bfloat16 can tell apart.
    """
    trained, frozen = partition(params, patterns)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trained=trained,
        frozen=jax.tree.map(lambda x: x.astype(frozen_dtype), frozen),
        mu=jax.tree.map(lambda x: jnp.zeros_like(x, dtype=mu_dtype), trained),
        nu=jax.tree.map(jnp.zeros_like, trained),
        log_norm=jnp.zeros(()),
    )


def _float32(x: Array) -> Array:
    return x.astype(jnp.float32)


def partition(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
    """Parts a tree of parameters, or of anything about them, into the trained and the frozen ones.

    A leaf is trained where one of the regular expressions matches its whole path, such as
    `decoder/layers/mlp/up_proj/kernel`. In a part of the model that has adapters, such as `decoder`, they are
    trained and nothing else is, whatever the expressions say. Raises ValueError for an expression that is
    malformed or matches no path.
    """
    flat = flatten(params)
    trained: dict[str, Any] = {}
    for pattern in patterns:
        try:
            found = {path: leaf for path, leaf in flat.items() if re.fullmatch(pattern, path)}
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        if not found:
            raise ValueError(f"no parameter's path matches {pattern!r}; paths begin with {', '.join(params)}")
        trained |= found
    if not trained:
        raise ValueError("no pattern names parameters to train")
    adapted = {path.partition("/")[0] for path in flat if is_adapter(path)}

    def learns(path: str) -> bool:
        return is_adapter(path) if path.partition("/")[0] in adapted else path in trained

    # In the tree's own order, whatever the order of the patterns.
    ours = {path: leaf for path, leaf in flat.items() if learns(path)}
    return unflatten(ours), unflatten({path: leaf for path, leaf in flat.items() if not learns(path)})


def merge(trained: Params, frozen: Params) -> Params:
    """The inverse of `partition`."""
    return unflatten(flatten(trained) | flatten(frozen))


def global_norm(tree: Params) -> Float[Array, ""]:
    """L2 norm of all leaves together, in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))
