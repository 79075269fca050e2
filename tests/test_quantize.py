"""Low precision: integers, scales and products against NumPy and torch; checkpoints; shards."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from osprey_jax import checkpoint, convert, quantize, sharding
from osprey_jax.config import DecoderConfig, OspreyConfig, VisionConfig, osprey_7b
from osprey_jax.models.layers import Linear
from osprey_jax.models.llama import Llama
from osprey_jax.models.osprey import abstract_params, boxed_params
from tests.convert.releases import SIZES, FileTokenizer, write_release
from tests.parity import reference

INT8, INT4 = jnp.dtype("int8"), jnp.dtype("int4")
FLOAT32 = jnp.dtype("float32")
LARGEST = {"int8": 127, "int4": 7}
CONFIG = OspreyConfig(
    vision=VisionConfig(image_size=32, depths=(1, 1, 1, 1), dims=(4, 4, 4, 4)),
    decoder=DecoderConfig(
        vocab_size=64, dim=64, ffn_dim=384, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=32
    ),
    mask_token_id=64,
    position_token_id=65,
)


def by_numpy(weight: np.ndarray, group: int, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales of a matrix of inputs × outputs, column by column and group by group."""
    integers = np.zeros(weight.shape, np.int64)
    scales = np.zeros((len(weight) // group, weight.shape[1]), np.float32)
    for place in range(len(scales)):
        for column in range(weight.shape[1]):
            part = weight[place * group : (place + 1) * group, column].astype(np.float32)
            top = np.abs(part).max()
            scales[place, column] = top / np.float32(largest)
            integers[place * group : (place + 1) * group, column] = np.rint(part * np.float32(largest) / top)
    return integers, scales


def assert_nearest(
    integers: np.ndarray, scale: np.ndarray, weight: np.ndarray, group: int, largest: int
) -> None:
    """Exactly, in float64: the nearest integers, within 1e-5 of a tie either one; scales to the last bit."""
    parts = weight.astype(np.float64).reshape(-1, group, weight.shape[1])
    tops = np.abs(parts).max(1, keepdims=True)
    off = np.asarray(integers, np.float64).reshape(parts.shape) - parts * largest / tops
    assert np.abs(off).max() <= 0.5 + 1e-5
    np.testing.assert_array_max_ulp(np.asarray(scale), (tops[:, 0] / largest).astype(np.float32), maxulp=1)


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def decoder(name: str | None, dtype: str = "float32") -> dict:
    """Abstract parameters of the decoder alone."""
    return {"decoder": abstract_params(CONFIG, dtype, quantization=name)["decoder"]}


def random_leaves() -> dict[str, np.ndarray]:
    """The decoder's parameters by path, in float32."""
    structs = checkpoint.flatten(decoder(None))
    return {path: weights(*leaf.shape, seed=seed) / 8 for seed, (path, leaf) in enumerate(structs.items())}


def quantized(name: str) -> dict[str, np.ndarray]:
    """The same quantised."""
    return dict(quantize.quantized_leaves(random_leaves().items(), checkpoint.flatten(decoder(name))))


def product(
    x: np.ndarray,
    kernel: np.ndarray,
    scale: np.ndarray,
    *,
    outputs: Sequence[int],
    name: str,
    dtype: jnp.dtype = FLOAT32,
) -> jax.Array:
    """What a Linear with these parameters gives; its inputs are all axes of `x` but the first."""
    inputs = x.shape[1:]
    axes = ("heads", "head_dim")[: len(inputs)], ("embed", "head_dim")[: len(outputs)]
    layer = Linear(inputs, outputs, (*axes[0], *axes[1]), use_bias=False, dtype=dtype, quantization=name)
    params = {"kernel": jnp.asarray(kernel), "kernel_scale": jnp.asarray(scale)}
    return jax.jit(layer.apply)({"params": params}, x)


def test_a_column_is_scaled_by_its_largest_weight_and_rounded_to_even() -> None:
    weight = np.array([[127.0, 0.0, 0.7], [-2.5, 0.0, -1.4], [3.5, 0.0, 0.3]], np.float32)
    integers, scale = quantize.quantize(weight, (1, 3), INT8)
    np.testing.assert_array_equal(integers, [[127, 0, 64], [-2, 0, -127], [4, 0, 27]])
    np.testing.assert_array_max_ulp(np.asarray(scale), np.array([[1, 1, 1.4 / 127]], np.float32), maxulp=1)
    assert (integers.dtype, scale.dtype) == (INT8, FLOAT32)


def test_a_group_of_four_bits_is_scaled_by_its_own_largest_weight() -> None:
    weight = np.array([[14.0], [-3.0], [0.5], [-0.7]], np.float32)
    integers, scale = quantize.quantize(weight, (2, 1), INT4)
    np.testing.assert_array_equal(integers.astype(jnp.int32), [[7], [-2], [5], [-7]])
    np.testing.assert_array_max_ulp(np.asarray(scale), np.array([[2], [0.1]], np.float32), maxulp=1)


def test_extreme_weights_stay_within_the_integers() -> None:
    weight = np.array([[1e36, 1e-45], [-1e36, -1e-45]], np.float32)
    integers, scale = quantize.quantize(weight, (1, 2), INT8)
    assert np.isfinite(scale).all()
    np.testing.assert_array_equal(integers[:, 0], [127, -127])


@pytest.mark.parametrize(("dtype", "blocks"), [(INT8, 1), (INT4, 1), (INT4, 4)])
def test_weights_are_within_half_a_scale_of_what_they_stand_for(dtype: jnp.dtype, blocks: int) -> None:
    weight = weights(64, 48)
    integers, scale = quantize.quantize(weight, (blocks, 48), dtype)
    stands_for = np.asarray(quantize.dequantize(integers, scale, FLOAT32), np.float64)
    bound = np.repeat(np.asarray(scale, np.float64) / 2, 64 // blocks, axis=0)
    assert (np.abs(stands_for - weight) <= bound * (1 + 1e-5)).all()
    assert_nearest(integers, scale, weight, 64 // blocks, LARGEST[dtype.name])


@pytest.mark.parametrize(("dtype", "blocks"), [(INT8, 1), (INT4, 4)])
def test_compiled_or_not_the_integers_and_scales_are_the_same(dtype: jnp.dtype, blocks: int) -> None:
    """bfloat16 weights, of which many lie exactly between two integers."""
    weight = weights(512, 256).astype(jnp.bfloat16)
    quantized = partial(quantize.quantize, shape=(blocks, 256), dtype=dtype)
    for eager, compiled in zip(quantized(weight), jax.jit(quantized)(weight), strict=True):
        np.testing.assert_array_equal(eager, compiled)
    exact = np.abs(weight.astype(np.float64)).reshape(blocks, -1, 256)
    exact *= LARGEST[dtype.name] / exact.max(1, keepdims=True)
    assert (np.abs(exact % 1 - 0.5) < 1e-9).sum() > 100
    assert_nearest(*quantized(weight), weight.astype(np.float64), 512 // blocks, LARGEST[dtype.name])


def test_integers_and_products_are_those_of_torch() -> None:
    rng, x = np.random.default_rng(0), weights(5, 96, seed=1)
    # Nothing near a tie, where the last bit of a division decides.
    steps = rng.integers(-126, 127, (96, 40)) + rng.uniform(-0.4, 0.4, (96, 40))
    steps[0] = 127
    weight = (steps * 0.01).astype(np.float32)
    integers, scale = quantize.quantize(weight, (1, 40), INT8)
    theirs, scales = torch.from_numpy(weight), torch.from_numpy(np.abs(weight).max(0) / 127)
    whole = torch.round(theirs / scales).clamp(-127, 127).to(torch.int8)
    np.testing.assert_array_equal(integers, whole.numpy())
    expected = torch.from_numpy(x) @ (whole.float() * scales)
    ours = product(x, integers, scale, outputs=(40,), name="int8")
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_activations_are_multiplied_as_integers(dtype: str) -> None:
    """With a 127 in each row and column all scales are 1; sums above 2^24 would show a float accumulator."""
    rng = np.random.default_rng(0)
    x, kernel = rng.integers(90, 127, (3, 8, 512)), rng.integers(100, 127, (8 * 512, 6))
    x[:, 0, 0], kernel[0] = 127, 127
    given = x.astype(np.float32) if dtype == "float32" else jnp.asarray(x, jnp.bfloat16)
    integers, scale = quantize.quantize(kernel.astype(np.float32), (1, 6), INT8)
    layer = partial(product, given, integers, scale, outputs=(2, 3), name="int8_dynamic")
    exact = (x.reshape(3, -1).astype(np.int64) @ kernel).reshape(3, 2, 3)
    assert exact.min() > 1 << 24
    expected = jnp.asarray(exact.astype(np.float32)).astype(dtype)
    np.testing.assert_array_equal(np.asarray(layer(dtype=jnp.dtype(dtype))), np.asarray(expected))


def test_each_token_of_int8_activations_has_its_own_scale() -> None:
    x = weights(4, 64) * np.array([[1e-3], [1], [50], [0]], np.float32)
    kernel, scale = by_numpy(weights(64, 32, seed=1), 64, 127)
    ours = product(x, kernel.astype(np.int8), scale, outputs=(32,), name="int8_dynamic")
    tokens = np.where(x.any(1), np.abs(x).max(1), 127).astype(np.float32)[:, None] / np.float32(127)
    accumulated = np.rint(x / tokens).astype(np.int64) @ kernel
    np.testing.assert_allclose(ours, accumulated * tokens.astype(np.float64) * scale, rtol=1e-6)


def test_groups_of_four_bits_are_summed_with_their_scales() -> None:
    """Two heads of 192 inputs: three groups of 128, one of which spans both heads."""
    weight, x = weights(384, 24), weights(5, 2, 192, seed=1)
    kernel, scale = by_numpy(weight, 128, 7)
    assert scale.shape == (3, 24)
    expected = x.reshape(5, 384).astype(np.float64) @ (kernel * np.repeat(scale, 128, axis=0))
    ours = product(x, kernel.astype(INT4), scale, outputs=(4, 6), name="int4")
    np.testing.assert_allclose(ours.reshape(5, 24), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_products_lose_no_more_than_bfloat16() -> None:
    """The integers are exact in bfloat16, so only the input and the result are rounded, by 2^-9 each."""
    x, weight = weights(7, 256), weights(256, 32, seed=1)
    for name, group in (("int8", 256), ("int4", 128)):
        kernel, scale = by_numpy(weight, group, LARGEST[name])
        kernel_ = kernel.astype(quantize.SCHEMES[name].dtype)
        ours = product(x, kernel_, scale, outputs=(32,), name=name, dtype=jnp.dtype("bfloat16"))
        assert ours.dtype == jnp.bfloat16
        stands_for = np.abs(kernel * np.repeat(scale, group, axis=0))
        exact = x.astype(np.float64) @ (kernel * np.repeat(scale, group, axis=0))
        bound = (np.abs(x) @ stands_for) * 2.0**-8 + np.abs(exact) * 2.0**-8
        assert (np.abs(np.asarray(ours, np.float64) - exact) <= bound).all()


def test_shapes_and_dtypes_of_a_quantised_decoder() -> None:
    """8 query heads of 32 and 4 of keys and values; width 64, 384 in the feed-forward network, 3 layers."""
    expected = {
        "self_attn/q_proj": ((3, 64, 256), (3, 1, 256), (3, 1, 256)),
        "self_attn/k_proj": ((3, 64, 128), (3, 1, 128), (3, 1, 128)),
        "self_attn/v_proj": ((3, 64, 128), (3, 1, 128), (3, 1, 128)),
        "self_attn/o_proj": ((3, 256, 64), (3, 1, 64), (3, 2, 64)),
        "mlp/gate_proj": ((3, 64, 384), (3, 1, 384), (3, 1, 384)),
        "mlp/up_proj": ((3, 64, 384), (3, 1, 384), (3, 1, 384)),
        "mlp/down_proj": ((3, 384, 64), (3, 1, 64), (3, 3, 64)),
    }
    plain = checkpoint.flatten(abstract_params(CONFIG, "bfloat16"))
    for name, dtype, column in (("int8", INT8, 1), ("int8_dynamic", INT8, 1), ("int4", INT4, 2)):
        structs = checkpoint.flatten(abstract_params(CONFIG, "bfloat16", quantization=name))
        for layer, shapes in expected.items():
            path = f"decoder/layers/{layer}/kernel"
            assert (structs[path].shape, structs[path].dtype) == (shapes[0], dtype)
            scale = structs.pop(f"{path}_scale")
            assert (scale.shape, scale.dtype) == (shapes[column], FLOAT32)
            del structs[path]
        assert len(structs) == len(plain) - len(expected)
        assert all(leaf == plain[path] for path, leaf in structs.items())


def test_four_bits_of_7b_are_in_groups_of_128() -> None:
    structs = checkpoint.flatten(abstract_params(osprey_7b(), quantization="int4"))
    for path, leaf in structs.items():
        if path.endswith("/kernel_scale"):
            kernel = structs[path.removesuffix("_scale")]
            assert kernel.shape == (32, 128 * leaf.shape[1], leaf.shape[2])


@pytest.mark.parametrize("name", list(quantize.SCHEMES))
def test_a_quantised_checkpoint_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    structs = decoder(name)
    params = quantized(name)
    checkpoint.save_params(
        tmp_path / "saved", checkpoint.unflatten(params), CONFIG, FileTokenizer(b""), quantization=name
    )
    assert checkpoint.load_quantization(tmp_path / "saved") == name
    assert checkpoint.load_config(tmp_path / "saved") == CONFIG
    found = checkpoint.flatten(checkpoint.load_params(tmp_path / "saved", structs))
    assert found.keys() == params.keys()
    for path, leaf in found.items():
        assert leaf.dtype == params[path].dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), params[path], err_msg=path)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of bfloat16 matrices."""
    directory = tmp_path_factory.mktemp("original") / "checkpoint"
    params = {path: leaf.astype(jnp.bfloat16) for path, leaf in random_leaves().items()}
    checkpoint.save_params(directory, checkpoint.unflatten(params), CONFIG, FileTokenizer(b""))
    return directory


@pytest.mark.parametrize(("name", "group"), [("int8", 384), ("int4", 128)])
def test_loading_quantises_an_original_into_its_shards(name: str, group: int, original: Path) -> None:
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    targets, originals = (
        jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            decoder(each, "bfloat16"),
            sharding.param_shardings({"decoder": boxed_params(CONFIG, quantization=each)["decoder"]}, mesh),
        )
        for each in (name, None)
    )
    params = checkpoint.load_params(original, targets, unquantized=originals)
    layer = params["decoder"]["layers"]["mlp"]["down_proj"]
    wanted = targets["decoder"]["layers"]["mlp"]["down_proj"]
    saved = dict(checkpoint.load_leaves(original))
    weight = saved["decoder/layers/mlp/down_proj/kernel"].astype(np.float32)
    for number in range(3):
        integers, scale = layer["kernel"][number], layer["kernel_scale"][number]
        assert_nearest(integers, scale, weight[number], group, LARGEST[name])
    assert layer["kernel"].sharding.is_equivalent_to(wanted["kernel"].sharding, 3)
    assert not layer["kernel"].is_fully_replicated
    embedding = params["decoder"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(embedding, saved["decoder/embed_tokens/embedding"])


def test_the_converter_writes_the_integers_of_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "Tokenizer", FileTokenizer)
    model = reference.OspreyReference(SIZES)
    release = write_release(model, tmp_path / "release")
    convert.convert(release, tmp_path / "ours", quantization="int4")
    assert checkpoint.load_quantization(tmp_path / "ours") == "int4"
    saved = dict(checkpoint.load_leaves(tmp_path / "ours"))
    tensors = reference.read_shards(release)
    for ours, theirs in (("self_attn/o_proj", "self_attn.o_proj"), ("mlp/gate_proj", "mlp.gate_proj")):
        for number in range(SIZES.num_layers):
            weight = tensors[f"model.layers.{number}.{theirs}.weight"].float().numpy().T
            kernel = saved[f"decoder/layers/{ours}/kernel"][number]
            scale = saved[f"decoder/layers/{ours}/kernel_scale"][number]
            assert_nearest(kernel, scale, weight, np.gcd(len(weight), 128), 7)
    with pytest.raises(ValueError, match="is quantised \\(int4\\)"):
        convert.to_torch(tmp_path / "ours", tmp_path / "back")
    # From a checkpoint of ours they come out the same.
    convert.convert(release, tmp_path / "whole")
    assert convert.main([str(tmp_path / "whole"), str(tmp_path / "again"), "--quantize", "int4"]) == 0
    assert checkpoint.load_quantization(tmp_path / "again") == "int4"
    again = dict(checkpoint.load_leaves(tmp_path / "again"))
    assert again.keys() == saved.keys()
    assert all(np.array_equal(again[path], saved[path]) for path in saved)
    assert convert.main([str(tmp_path / "again"), str(tmp_path / "no"), "--quantize", "int8"]) == 2
    options = ["--quantize", "int8", "--dtype", "bfloat16"]
    assert convert.main([str(tmp_path / "whole"), str(tmp_path / "no"), *options]) == 2


def test_eight_devices_give_the_same_logits() -> None:
    config = CONFIG.decoder
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    x = weights(4, 5, config.dim)
    place = {"positions": np.tile(np.arange(5, dtype=np.int32), (4, 1)), "segment_ids": np.ones((4, 5), int)}
    place["segment_ids"] = place["segment_ids"].astype(np.int32)

    def logits(model: Llama, params: dict) -> jax.Array:
        hidden, _ = model.apply({"params": params}, x, **place)
        return model.apply({"params": params}, hidden, method=Llama.logits)

    for name in ("int8", "int4"):
        boxed = boxed_params(CONFIG, quantization=name)["decoder"]
        params = checkpoint.unflatten(quantized(name))["decoder"]
        step = jax.jit(partial(logits, Llama(config, quantization=name)))
        expected = np.asarray(step(params))
        split = jax.device_put(params, sharding.param_shardings(boxed, mesh))
        assert not split["layers"]["self_attn"]["o_proj"]["kernel"].is_fully_replicated
        with sharding.use_mesh(mesh):
            found = np.asarray(jax.jit(partial(logits, Llama(config, quantization=name)))(split))
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_an_unknown_scheme_is_refused_with_the_names_there_are(original: Path) -> None:
    for refuse in (
        lambda: quantize.scheme("int3"),
        lambda: checkpoint.load_quantization(original, "int3"),
        lambda: abstract_params(CONFIG, quantization="int3"),
        lambda: convert.convert(original, original.with_name("new"), quantization="int3"),
    ):
        with pytest.raises(ValueError, match="'int3'; choose one of int8, int8_dynamic, int4"):
            refuse()


def test_saved_integers_are_only_computed_with_as_what_they_are(tmp_path: Path) -> None:
    directory = tmp_path / "saved"
    params = checkpoint.unflatten(quantized("int8"))
    checkpoint.save_params(directory, params, CONFIG, FileTokenizer(b""), quantization="int8")
    assert checkpoint.load_quantization(directory, "int8_dynamic") == "int8_dynamic"
    with pytest.raises(ValueError, match="quantised as 'int8', which can't be computed with as 'int4'"):
        checkpoint.load_quantization(directory, "int4")
    for other in (None, "int4"):
        with pytest.raises(ValueError, match="! decoder/layers/mlp/gate_proj/kernel: saved int8, wanted"):
            checkpoint.load_params(directory, decoder(other))
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace('"int8"', '"int5"'))
    with pytest.raises(ValueError, match="no quantization 'int5'"):
        checkpoint.load_config(directory)
