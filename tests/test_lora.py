"""Low-rank adapters against torch, and what they are beside, and merged into, the matrices."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from osprey_jax import train_step
from osprey_jax.checkpoint import flatten, unflatten
from osprey_jax.config import DecoderConfig
from osprey_jax.lora import Lora, is_adapter, merge_adapters, merge_kernel, without_adapters
from osprey_jax.models.llama import Llama
from osprey_jax.models.osprey import Osprey, boxed_params
from osprey_jax.optim import partition
from osprey_jax.typing import Params
from tests.parity import bridge, reference
from tests.train.test_gradients import QUICKLY, batch_of, dialogues

LORA = Lora(rank=3, alpha=4.5, targets=("decoder/layers/self_attn/[qkvo]_proj", "decoder/layers/mlp/.*"))
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


class TorchLora(torch.nn.Module):
    """A linear layer of torch with an adapter, as its paper has it: Wx + BAx · alpha / rank."""

    def __init__(self, linear: torch.nn.Linear, a: np.ndarray, b: np.ndarray):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a, self.b = (torch.nn.Parameter(torch.tensor(x)) for x in (a, b))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + (x @ self.a.T) @ self.b.T * (4.5 / 3)


@pytest.fixture(scope="module")
def pair() -> "bridge.Pair":
    return bridge.Pair.of(reference.ReferenceConfig(image_size=64, vocab_size=61, num_kv_heads=2))


@pytest.fixture(scope="module")
def adapted(pair: "bridge.Pair") -> tuple[Params, dict[tuple[int, str], TorchLora]]:
    """Our parameters with random adapters, and torch's layers, adapted the same, by layer and name."""
    params, rng = flatten(pair.params), np.random.default_rng(0)
    theirs = {}
    for name in NAMES:
        layer = f"decoder/layers/{name.replace('.', '/')}"
        kernel = params[f"{layer}/kernel"]
        inputs = kernel.ndim - 2 if name.endswith("o_proj") else 1  # heads and head size
        into, out = kernel.shape[1 : 1 + inputs], kernel.shape[1 + inputs :]
        a = rng.normal(size=(2, *into, 3)).astype(np.float32) * 0.2
        b = rng.normal(size=(2, 3, *out)).astype(np.float32) * 0.2
        params |= {f"{layer}/lora_a": a, f"{layer}/lora_b": b}
        for number in range(2):
            parent = pair.reference.llama.model.layers[number].get_submodule(name.partition(".")[0])
            child = name.partition(".")[2]
            flat = a[number].reshape(-1, 3).T, b[number].reshape(3, -1).T
            theirs[number, layer] = TorchLora(getattr(parent, child), *flat)
            setattr(parent, child, theirs[number, layer])
    return unflatten(params), theirs


def test_loss_and_gradients_of_adapters_equal_torchs(pair: "bridge.Pair", adapted: tuple) -> None:
    params, theirs = adapted
    trained, frozen = partition(params, ["projector/.*", "decoder/.*"])
    model = Osprey(pair.config, remat="dots", lora=LORA)
    gradients = jax.jit(train_step.make_gradients(model, accumulation=1), compiler_options=QUICKLY)
    loss, found = gradients(trained, frozen, batch_of(pair))

    losses = []
    for image, masks, ids, answers in dialogues(pair):
        logits, place = pair.reference(image, masks, ids), ids.index(reference.IMAGE_ID)
        labels = [token if marked else -100 for token, marked in zip(ids, answers, strict=True)]
        labels[place:place] = [-100] * (len(logits) - len(ids))
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(labels[1:])))
    pair.reference.zero_grad()
    expected = torch.stack(losses).mean()
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=2e-6)
    flat = flatten(found)
    assert {path.partition("/")[0] for path in flat} == {"projector", "decoder"}
    assert sum(path.startswith("decoder/") for path in flat) == 14
    ours, torchs = {}, {}
    for (number, layer), module in theirs.items():
        for name, rank_axis, grad in (("lora_a", 1, module.a.grad), ("lora_b", 0, module.b.grad)):
            leaf = np.asarray(flat[f"{layer}/{name}"][number])
            shape = (-1, 3) if rank_axis else (3, -1)
            ours[f"{layer} {number} {name}"] = leaf.reshape(shape)
            torchs[f"{layer} {number} {name}"] = grad.numpy().T
    bridge.assert_gradients_agree(ours, torchs)


def test_a_merged_kernel_is_float32_however_coarse_it_was() -> None:
    kernel = jnp.full((2, 4, 2, 3), 256.0, jnp.bfloat16)
    a, b = np.full((2, 4, 1), 0.25, np.float32), np.ones((2, 1, 2, 3), np.float32)
    merged = merge_kernel(kernel, a, b, scale=0.5, sharding=None)
    assert merged.dtype == jnp.float32  # a step of bfloat16 is 2 here
    np.testing.assert_array_equal(merged, np.full((2, 4, 2, 3), 256.125, np.float32))


DECODER = DecoderConfig(
    vocab_size=8, dim=8, ffn_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4
)  # fmt: skip
OWN = Lora(rank=2, alpha=3.0, targets=("layers/(self_attn|mlp)/.*",))
EMBEDDINGS = np.random.default_rng(0).normal(size=(1, 5, 8)).astype(np.float32)


def run_layers(lora: Lora | None, params: Params | None = None, remat: str = "none") -> Any:
    """The decoder's hidden states, or without parameters, fresh ones."""
    decoder = Llama(DECODER, lora=lora, remat=remat)
    how = {"positions": np.arange(5)[None], "segment_ids": np.ones((1, 5), np.int32)}

    @partial(jax.jit, compiler_options=QUICKLY)
    def init(key: jax.Array) -> Params:
        return nn.unbox(decoder.init(key, EMBEDDINGS, **how)["params"])

    @partial(jax.jit, compiler_options=QUICKLY)
    def hidden(params: Params) -> jax.Array:
        return decoder.apply({"params": params}, EMBEDDINGS, **how)[0]

    return init(jax.random.key(1)) if params is None else hidden(params)


@pytest.fixture(scope="module")
def fresh() -> Params:
    """Of a small decoder all of whose matrices are adapted."""
    return run_layers(OWN)


def test_fresh_adapters_are_as_the_authors_have_them_and_change_nothing(fresh: Params) -> None:
    adapters = {path: np.asarray(leaf) for path, leaf in flatten(fresh).items() if is_adapter(path)}
    assert len(adapters) == 14
    for path, leaf in adapters.items():
        if path.endswith("lora_b"):
            assert not leaf.any()
        else:
            limit = np.prod(leaf.shape[1:-1]) ** -0.5
            assert 0.7 * limit < np.abs(leaf).max() <= limit
            assert not np.array_equal(leaf[0], leaf[1])
    np.testing.assert_array_equal(run_layers(OWN, fresh), run_layers(None, without_adapters(fresh)))


def test_the_merged_model_computes_what_the_adapted_one_does(fresh: Params) -> None:
    rng = np.random.default_rng(2)
    drawn = {
        path: jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32)) if is_adapter(path) else leaf
        for path, leaf in flatten(fresh).items()
    }
    adapted = unflatten(drawn)
    merged = merge_adapters(adapted, OWN)
    assert flatten(merged).keys() == flatten(without_adapters(fresh)).keys()
    found, expected = run_layers(None, merged), run_layers(OWN, adapted)
    assert bridge.largest_difference(found, expected) <= bridge.FORWARD
    assert bridge.largest_difference(run_layers(OWN, fresh), expected) > 0.1


def test_only_what_a_target_matches_is_adapted() -> None:
    lora = Lora(rank=2, alpha=2.0, targets=("layers/self_attn/[qv]_proj",))
    paths = flatten(run_layers(lora, remat="full"))
    found = {path.rpartition("/")[0] for path in paths if path.endswith("lora_a")}
    assert found == {"layers/self_attn/q_proj", "layers/self_attn/v_proj"}


def test_a_part_with_adapters_is_frozen_but_for_them(pair: "bridge.Pair") -> None:
    boxed = boxed_params(pair.config, lora=LORA)
    for patterns, parts in ((["decoder/.*"], set()), ([".*"], {"vision", "projector", "extractor"})):
        trained, frozen = partition(boxed, patterns)
        assert set(trained) == parts | {"decoder"}
        assert {path.rpartition("/")[2] for path in flatten(trained["decoder"])} == {"lora_a", "lora_b"}
        assert {"embed_tokens", "lm_head", "norm", "layers"} == set(frozen["decoder"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "adapters need a rank"),
        ({"alpha": 0.0}, "adapters need a rank, an alpha above 0"),
        ({"targets": ("(",)}, r"'\(' is no regular expression: missing \)"),
    ],
)
def test_adapters_that_can_t_be_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lora(**{"rank": 2, "alpha": 2.0, "targets": (".*",), **values})
