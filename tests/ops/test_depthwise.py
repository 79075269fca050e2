"""Depthwise convolution: both platforms' forms and the gradients written by hand, against torch's conv2d."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from osprey_jax.ops import depthwise
from osprey_jax.typing import Array

Form = Callable[[Array, Array], Array]
KernelGrad = Callable[[Array, Array, Array], Array]

# Which of the two a platform takes is decided when the program is lowered; here is only a CPU.
FORMS: dict[str, tuple[Form, KernelGrad]] = {
    "cpu": (depthwise._shifted_sums, depthwise._kernel_grad_sums),
    "convolution": (depthwise._convolution, depthwise._kernel_grad_convolution),
}
SIZES = [
    (7, 2, 9, 14, 5),
    (7, 1, 3, 3, 4),
    (7, 1, 16, 1, 2),
    (3, 2, 6, 5, 3),
    (5, 1, 8, 8, 1),
    (1, 1, 4, 4, 2),
]


def case(side: int, batch: int, rows: int, columns: int, channels: int) -> tuple[np.ndarray, ...]:
    """Input, kernel and a cotangent of the output."""
    rng = np.random.default_rng(0)
    shapes = (batch, rows, columns, channels), (side, side, channels), (batch, rows, columns, channels)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def of_torch(x: np.ndarray, kernel: np.ndarray, cotangent: np.ndarray) -> list[np.ndarray]:
    """Output and the gradients of input and kernel, in our layout."""
    image = torch.from_numpy(x).permute(0, 3, 1, 2).detach().requires_grad_()
    weight = torch.from_numpy(kernel).permute(2, 0, 1)[:, None].detach().requires_grad_()
    out = F.conv2d(image, weight, padding=kernel.shape[0] // 2, groups=x.shape[-1])
    out.backward(torch.from_numpy(cotangent).permute(0, 3, 1, 2))
    of_image, of_weight = image.grad.permute(0, 2, 3, 1), weight.grad[:, 0].permute(1, 2, 0)
    return [out.detach().permute(0, 2, 3, 1).numpy(), of_image.numpy(), of_weight.numpy()]


def assert_all_close(found: list[Array], expected: list[np.ndarray], tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        difference = np.linalg.norm(np.asarray(ours, np.float32) - theirs) / np.linalg.norm(theirs)
        assert difference <= tolerance


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_each_form_and_its_gradients_equal_torch(form: str, size: tuple[int, ...]) -> None:
    """The input's gradient is the form itself with the kernel turned, as the rule has it."""
    correlate, kernel_grad = FORMS[form]
    x, kernel, cotangent = case(*size)
    found = jax.jit(lambda x, k, g: [correlate(x, k), correlate(g, k[::-1, ::-1]), kernel_grad(x, k, g)])(
        x, kernel, cotangent
    )
    assert_all_close(found, of_torch(x, kernel, cotangent), 1e-6)


@pytest.mark.parametrize("size", SIZES[:4])
def test_the_rule_of_differentiation_equals_torch(size: tuple[int, ...]) -> None:
    x, kernel, cotangent = case(*size)

    def run(x: Array, kernel: Array, cotangent: Array) -> list[Array]:
        out, pullback = jax.vjp(depthwise.depthwise_conv, x, kernel)
        return [out, *pullback(cotangent)]

    assert_all_close(jax.jit(run)(x, kernel, cotangent), of_torch(x, kernel, cotangent), 1e-6)


def test_gradients_stay_exact_where_a_sum_has_many_terms() -> None:
    """16,384 pixels far from zero mean, as many as res2 has: sums of one sign lose the most digits."""
    x, kernel, cotangent = case(7, 1, 128, 128, 2)
    x, cotangent = x + 2, cotangent + 1
    expected = of_torch(x, kernel, cotangent)
    for correlate, kernel_grad in FORMS.values():
        found = [
            correlate(x, kernel),
            correlate(cotangent, kernel[::-1, ::-1]),
            kernel_grad(x, kernel, cotangent),
        ]
        assert_all_close(found, expected, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_costs_only_its_rounding(form: str) -> None:
    """Against torch in float32 on the rounded inputs: half a step of bfloat16, 2^-9, is lost at most."""
    correlate, kernel_grad = FORMS[form]
    narrow = [jnp.asarray(array, jnp.bfloat16) for array in case(7, 2, 12, 12, 6)]
    expected = of_torch(*(np.array(array, np.float32) for array in narrow))
    x, kernel, cotangent = narrow
    found = [
        correlate(x, kernel),
        correlate(cotangent, kernel[::-1, ::-1]),
        kernel_grad(x, kernel, cotangent),
    ]
    assert {array.dtype for array in found} == {jnp.dtype(jnp.bfloat16)}
    # Relative L2 of a rounding spread evenly over half a step is 2^-9 / √3 · √2 or less.
    assert_all_close(found, expected, 2**-9)
