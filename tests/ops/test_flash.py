"""The accelerators' attention kernels against the plain form and torch; how they are split and compiled."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from osprey_jax import sharding
from osprey_jax.config import DecoderConfig
from osprey_jax.models.layers import on_shards
from osprey_jax.models.llama import Llama
from osprey_jax.ops.attention import attention, visibility
from osprey_jax.ops.flash import cudnn_attention, flash_attention, splash_attention, suits
from osprey_jax.typing import Array

LENGTH = 640  # no multiple of any block that doesn't leave it two of them, so that the last one is padded


def packed_rows() -> tuple[Array, Array, Array]:
    """Positions, segments and prefixes of two rows, each with padding at its end.

    In the first two conversations go on behind one prefix, and one stands beside them; the second has one
    segment, which ends before its last block begins.
    """
    parts = (
        (0, 300, 1, 0),
        (300, 80, 2, 1),
        (300, 120, 3, 1),
        (0, 100, 4, 0),
    )  # start, length, segment, prefix
    first = np.concatenate(
        [
            np.stack([start + np.arange(length), np.full(length, segment), np.full(length, prefix)])
            for start, length, segment, prefix in parts
        ],
        axis=1,
    )
    second = np.stack([np.arange(200), np.ones(200, int), np.zeros(200, int)])
    rows = [np.pad(row, ((0, 0), (0, LENGTH - row.shape[1]))) for row in (first, second)]
    positions, segments, prefixes = jnp.asarray(np.stack(rows, axis=1), jnp.int32)
    return positions, segments, prefixes


def packed_mask() -> Array:
    positions, segments, prefixes = packed_rows()
    return visibility(
        query_positions=positions,
        key_positions=positions,
        query_segments=segments,
        key_segments=segments,
        prefix_segments=prefixes,
    )


def inputs(*, dtype: str = "float32") -> tuple[Array, ...]:
    """Queries, keys, values, and a gradient of the output that is zero at padding."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, g = (jax.random.normal(key, (2, LENGTH, 2, 128)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 1, LENGTH, 128)) for key in keys[2:])
    g = jnp.where((packed_rows()[1] != 0)[..., None, None], g, 0)
    return tuple(x.astype(dtype) for x in (q, k, v, g))


def values_and_gradients(form: Callable[..., Array], q: Array, k: Array, v: Array, g: Array) -> list[Array]:
    @jax.jit
    def run(q: Array, k: Array, v: Array, g: Array) -> list[Array]:
        out, pull = jax.vjp(lambda q, k, v: form(q, k, v, packed_mask()), q, k, v)
        return [out, *pull(g)]

    return run(q, k, v, g)


@pytest.fixture(scope="module")
def of_torch() -> list[np.ndarray]:
    """Output and gradients of torch's attention, in float32."""
    q, k, v, g = (torch.tensor(np.asarray(x)) for x in inputs())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mask = torch.tensor(np.asarray(packed_mask()))
    mask = mask | (~mask.any(-1, keepdim=True))
    group = q.shape[2] // k.shape[1]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.repeat_interleave(group, 1),
        v.repeat_interleave(group, 1),
        attn_mask=mask[:, None],
    ).transpose(1, 2)
    return [x.detach().numpy() for x in (out, *torch.autograd.grad(out, (q, k, v), g))]


@pytest.mark.parametrize(
    "form",
    [
        partial(splash_attention, interpret=True),
        partial(cudnn_attention, implementation="xla"),
        flash_attention,
    ],
    ids=["splash", "cudnn's interface", "on a CPU"],
)
def test_outputs_and_gradients_are_those_of_torch(
    form: Callable[..., Array], of_torch: list[np.ndarray]
) -> None:
    with jax.default_matmul_precision("highest"):
        ours = values_and_gradients(form, *inputs())
    seeing = np.asarray(packed_rows()[1] != 0)
    for mine, theirs in zip(ours, of_torch, strict=True):
        assert np.isfinite(mine).all(), "also where a query sees nothing"
        if mine.shape[1] != LENGTH:
            mine, theirs = np.swapaxes(mine, 1, 2), np.swapaxes(theirs, 1, 2)
        # Float32 sums of up to 640 terms, in another order.
        np.testing.assert_allclose(mine[seeing], theirs[seeing], atol=2e-5)
    for gradient in ours[1:]:
        rows = np.asarray(gradient if gradient.shape[1] == LENGTH else np.swapaxes(gradient, 1, 2))
        assert not rows[~seeing].any(), "padding has no gradient"


def test_bfloat16_differs_from_the_plain_form_by_its_rounding() -> None:
    args = inputs(dtype="bfloat16")
    plain = values_and_gradients(attention, *args)
    ours = values_and_gradients(partial(splash_attention, interpret=True), *args)
    exact = values_and_gradients(attention, *(x.astype(jnp.float32) for x in args))
    seeing = np.asarray(packed_rows()[1] != 0)
    for number, (mine, theirs, true) in enumerate(zip(ours, plain, exact, strict=True)):
        assert mine.dtype == jnp.bfloat16
        mine, theirs, true = (
            np.asarray(x, np.float32).swapaxes(1, 1 if number < 2 else 2)[seeing]
            for x in (mine, theirs, true)
        )
        # Twice the plain form's own error: the queries are rounded once more.
        assert np.linalg.norm(mine - true) < 2 * np.linalg.norm(theirs - true)


def test_only_what_the_kernels_can_take_suits_them() -> None:
    def accepted(*shape: int, dtype: str = "bfloat16") -> bool:
        return suits(jnp.zeros(shape, dtype))

    assert accepted(1, 1152, 4, 128)
    assert not accepted(1, 1152, 4, 128, dtype="float32")
    assert not accepted(1, 1152, 4, 64)
    assert not accepted(1, 1100, 4, 128)
    assert not accepted(1, 128, 4, 128)


@pytest.mark.parametrize(
    ("rows", "kv_heads"), [(4, 2), (3, 2), (4, 1)], ids=["divide", "rows don't", "heads don't"]
)
def test_each_device_computes_its_rows_and_heads(rows: int, kv_heads: int) -> None:
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (rows, 8, 4, 16))
    k, v = (jax.random.normal(key, (rows, kv_heads, 8, 16)) for key in keys[1:])
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((8, 8), bool)), (rows, 8, 8))
    seen = []

    def recorded(*args: Array) -> Array:
        seen.append([x.shape[:3] for x in args[:2]])
        return flash_attention(*args)

    def split(q: Array, k: Array, v: Array) -> Array:
        queries, keys = (
            ("batch", None, "activation_heads", None),
            ("batch", "activation_kv_heads", None, None),
        )
        axes = (queries, keys, keys, ("batch", None, None))
        return on_shards(recorded, q, k, v, mask, axes=axes, out=queries)

    def gradients(form: Callable[..., Array]) -> tuple[Array, ...]:
        return jax.jit(jax.grad(lambda *args: jnp.sum(form(*args) ** 2), argnums=(0, 1, 2)))(q, k, v)

    alone = gradients(lambda *args: flash_attention(*args, mask))
    with sharding.use_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        together = gradients(split)
    row_parts, head_parts = 1 if rows == 3 else 4, 1 if kv_heads == 1 else 2
    own = rows // row_parts
    assert seen[0] == [(own, 8, 4 // head_parts), (own, kv_heads // head_parts, 8)]
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def decoder(remat: str) -> Llama:
    config = DecoderConfig(vocab_size=8, dim=32, ffn_dim=32, num_layers=2, num_heads=2, num_kv_heads=2)
    return Llama(config, jnp.dtype("bfloat16"), remat=remat)


def test_stacked_layers_attend_by_the_kernel_where_they_are_lowered_for_a_tpu() -> None:
    positions, segments, prefixes = packed_rows()
    model = decoder("dots")
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, 32))
    seen = {"positions": positions, "segment_ids": segments, "prefix_segment_ids": prefixes}
    shapes = jax.eval_shape(lambda: nn.unbox(model.init(jax.random.key(0), x, **seen)))

    def loss(params: dict) -> Array:
        return jnp.sum(model.apply(params, x, **seen)[0], dtype=jnp.float32)

    def text(platform: str) -> str:
        return jax.jit(jax.grad(loss)).trace(shapes).lower(lowering_platforms=(platform,)).as_text()

    on_tpu, on_cpu = text("tpu"), text("cpu")
    kernel, scores = "tpu_custom_call", f"tensor<2x2x1x{LENGTH}x1x{LENGTH}xf32>"
    assert kernel in on_tpu
    assert scores not in on_tpu
    assert kernel not in on_cpu


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialised_layers_have_the_gradients_of_plain_attention(
    remat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions, segments, prefixes = packed_rows()
    model = decoder(remat)
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, 32))
    seen = {"positions": positions, "segment_ids": segments, "prefix_segment_ids": prefixes}
    params = nn.unbox(model.init(jax.random.key(0), x[:, :8], **{k: y[:, :8] for k, y in seen.items()}))
    weights = jnp.where(segments != 0, 1.0, 0.0)[..., None]

    def gradients() -> dict:
        def loss(params: dict) -> Array:
            return jnp.sum(weights * model.apply(params, x, **seen)[0].astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss))(params)

    ours = gradients()
    monkeypatch.setattr("osprey_jax.models.llama.suits", lambda q: False)
    # The same operations in another program: bfloat16 may be rounded elsewhere.
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(gradients()), strict=True):
        assert np.linalg.norm(mine - theirs) <= 0.02 * np.linalg.norm(theirs)
