"""Floating-point operations of a program, and what devices can do: what a rate is measured against.

Convention: a multiplication and an addition are two. Matrix products and convolutions count, whatever they
give afterwards is masked: causal attention counts in full. The model's own operations are those of the
forward and the backward pass, recomputation left out, the frozen parts' gradients left out; MFU is their rate
over the devices' peak (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B).
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.extend import core

PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""Published bfloat16 operations per second, without sparsity, by the beginning of a device kind's name."""


def peak(device: jax.Device) -> float | None:
    """Operations per second that a device can do in bfloat16; None where it isn't known, as for CPUs."""
    names = [name for name in PEAK if device.device_kind.startswith(name)]
    return PEAK[max(names, key=len)] if names else None


def count(jaxpr: core.Jaxpr) -> int:
    """Operations of the matrix products and convolutions of a program, over all devices.

    Loops count as often as they run, of branches the dearest. `cost_analysis` of a compiled program counts a
    loop's body once.
    """
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = _shape(equation.invars[0])
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(_shape(equation.outvars[0]))
        elif name == "conv_general_dilated":
            kernel = _shape(equation.invars[1])
            outputs = equation.params["dimension_numbers"].rhs_spec[0]
            inner = math.prod(kernel) // kernel[outputs]
            total += 2 * inner * math.prod(_shape(equation.outvars[0]))
        parts = [count(part) for part in _programs(equation.params.values())]
        times = 1
        if name == "scan":
            times = equation.params["length"]
        elif name == "shard_map":  # what each device does
            times = equation.params["mesh"].size
        total += times * (max(parts, default=0) if name == "cond" else sum(parts))
    return total


def _programs(values: Iterable[Any]) -> Iterator[core.Jaxpr]:
    """The programs among an equation's parameters."""
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _programs(value)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
