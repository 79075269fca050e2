"""Conversion there and back, its options, and every error it promises."""

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osprey_jax import checkpoint, convert, convert_rules, torch_files
from osprey_jax.config import osprey_7b
from osprey_jax.models.osprey import abstract_params

torch = pytest.importorskip("torch")
reference = pytest.importorskip("tests.parity.reference")

SIZES = reference.ReferenceConfig(
    vocab_size=64, num_kv_heads=2, extractor_dim=20, image_size=96, norm_eps=1e-6, rope_theta=5000.0
)
TRUNK = "model.vision_tower.vision_tower.visual.trunk."
DTYPE_OF = {"model.vision_tower.": torch.float16, "mask_extractor.": torch.float32}


class FileTokenizer:
    """Stands for the tokenizer: a file that travels along, 64 pieces before the placeholders."""

    mask_id, position_id, bos_id, eos_id = 64, 65, 1, 2

    def __init__(self, data: bytes):
        self.data = data

    @classmethod
    def load(cls, directory: Path) -> "FileTokenizer":
        path = Path(directory) / "tokenizer.model"
        if not path.is_file():
            raise ValueError(f"no tokenizer.model in {directory}")
        return cls(path.read_bytes())

    def save(self, directory: Path) -> None:
        (Path(directory) / "tokenizer.model").write_bytes(self.data)


@pytest.fixture(autouse=True)
def _file_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "Tokenizer", FileTokenizer)


@pytest.fixture(scope="module")
def model() -> "reference.OspreyReference":
    return reference.OspreyReference(SIZES)


@pytest.fixture
def release(tmp_path: Path, model: "reference.OspreyReference") -> Path:
    """A release of two `.bin` shards with the original's mix of dtypes."""
    return write_release(model, tmp_path / "release")


def write_release(model: "reference.OspreyReference", directory: Path, **options: object) -> Path:
    tokenizer = directory.parent / "pieces"
    tokenizer.write_bytes(b"pieces")
    reference.write_release(model, directory, tokenizer_model=tokenizer, **options)
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | {"image_size": SIZES.image_size}))
    for path in [*directory.glob("*.bin"), *directory.glob("*.safetensors")]:
        edit_shard(path, lambda tensors: {name: cast(name, tensor) for name, tensor in tensors.items()})
    return directory


def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(next((v for k, v in DTYPE_OF.items() if name.startswith(k)), torch.bfloat16))


def edit_shard(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(reference._read_shard(path))
    if path.suffix == ".safetensors":
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # not a view of the file itself
        reference.save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrites all tensors of a release as one file, without an index."""
    tensors = change(reference.read_shards(directory))
    for path in [*directory.glob("*.bin"), *directory.glob("*.index.json")]:
        path.unlink()
    torch.save(tensors, directory / "pytorch_model.bin")


def edit_fields(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def used(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not convert_rules.is_ignored(name)}


def leaves(directory: Path) -> dict[str, np.ndarray]:
    shapes = checkpoint.saved_shapes(directory)
    return {k: np.asarray(v) for k, v in checkpoint.flatten(checkpoint.load_params(directory, shapes)).items()}


def assert_fails(source: Path | str, destination: Path, message: str, **options: object) -> None:
    before = sorted(destination.parent.iterdir())
    with pytest.raises(ValueError, match=message):
        convert.convert(source, destination, **options)
    assert sorted(destination.parent.iterdir()) == before


@pytest.mark.parametrize("safetensors", [False, True])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_there_and_back_is_bit_identical(
    tmp_path: Path, model: "reference.OspreyReference", safetensors: bool, num_shards: int
) -> None:
    release = write_release(model, tmp_path / "a", safetensors=safetensors, num_shards=num_shards)
    convert.convert(release, tmp_path / "b")
    before, fields = used(reference.read_shards(release)), json.loads((release / "config.json").read_text())
    shutil.rmtree(release)
    convert.to_torch(tmp_path / "b", tmp_path / "c", shard_bytes=100_000)
    after = reference.read_shards(tmp_path / "c")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(after[name]) == bits(tensor), name
    assert len(list((tmp_path / "c").glob("pytorch_model-*-of-*.bin"))) > 2
    assert (tmp_path / "c" / "tokenizer.model").read_bytes() == b"pieces"
    written = json.loads((tmp_path / "c" / "config.json").read_text())
    assert {k: v for k, v in written.items() if k in fields and fields[k] != v} == {"torch_dtype": "bfloat16"}
    convert.convert(tmp_path / "c", tmp_path / "d")
    assert checkpoint.load_config(tmp_path / "d") == checkpoint.load_config(tmp_path / "b")


def test_config_has_sizes_of_tensors_and_hyperparameters_of_config_json(tmp_path: Path, release: Path) -> None:
    convert.convert(release, tmp_path / "out")
    config = checkpoint.load_config(tmp_path / "out")
    assert (config.vision.depths, config.vision.dims) == (SIZES.depths, SIZES.dims)
    assert config.vision.image_size == 96
    assert (config.extractor.dim, config.extractor.position_size) == (20, 112)
    decoder = config.decoder
    assert (decoder.vocab_size, decoder.dim, decoder.ffn_dim, decoder.num_layers) == (64, 32, 64, 2)
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim) == (4, 2, 8)
    assert (decoder.norm_eps, decoder.rope_theta) == (1e-6, 5000.0)
    assert (config.mask_token_id, config.position_token_id) == (64, 65)


def test_leaves_are_the_tensors_in_our_axes_and_their_dtypes(tmp_path: Path, release: Path) -> None:
    tensors = reference.read_shards(release)
    convert.convert(release, tmp_path / "out")
    found = leaves(tmp_path / "out")
    query = tensors["model.layers.1.self_attn.q_proj.weight"].float().numpy()
    output = tensors["model.layers.1.self_attn.o_proj.weight"].float().numpy()
    value = tensors["model.layers.0.self_attn.v_proj.weight"].float().numpy()
    attention = {name: found[f"decoder/layers/self_attn/{name}/kernel"] for name in ("q_proj", "o_proj", "v_proj")}
    assert attention["q_proj"].dtype == jnp.bfloat16
    # Head 3, feature 5 is row 3·8 + 5 of the projection, and column 3·8 + 5 of the output's.
    np.testing.assert_array_equal(attention["q_proj"][1, :, 3, 5].astype(np.float32), query[29])
    np.testing.assert_array_equal(attention["o_proj"][1, 3, 5].astype(np.float32), output[:, 29])
    np.testing.assert_array_equal(attention["v_proj"][0, :, 1, 2].astype(np.float32), value[10])
    conv = tensors[TRUNK + "stages.2.downsample.1.weight"].numpy()
    kernel = found["vision/stages_2/downsample_conv/kernel"]
    assert (kernel.shape, kernel.dtype) == ((2, 2, 32, 48), np.float16)
    np.testing.assert_array_equal(kernel[0, 1, 7], conv[:, 7, 0, 1])
    depthwise = tensors[TRUNK + "stages.2.blocks.1.conv_dw.weight"].numpy()
    np.testing.assert_array_equal(found["vision/stages_2/blocks/dwconv/kernel"][1, 2, 6], depthwise[:, 0, 2, 6])
    linear = tensors["mask_extractor.mask_linear.layers.0.weight"].numpy()
    np.testing.assert_array_equal(found["extractor/mask_linear_0/kernel"], linear.T)
    np.testing.assert_array_equal(
        found["decoder/lm_head/kernel"].astype(np.float32), tensors["lm_head.weight"].float().numpy().T
    )


def test_every_leaf_of_7b_is_written_by_tensors_of_its_size() -> None:
    shapes = {k: v.shape for k, v in checkpoint.flatten(abstract_params(osprey_7b(), jnp.float32)).items()}
    slots = convert_rules.torch_slots(shapes)
    assert len(slots) == 291 + 4 + 16 + 3 * 4 + 4 + 36 * 9
    assert {slot.path for slot in slots.values()} == shapes.keys()
    sizes = dict.fromkeys(shapes, 0)
    for slot in slots.values():
        sizes[slot.path] += int(np.prod(slot.torch_shape))
    assert sizes == {path: int(np.prod(shape)) for path, shape in shapes.items()}
    assert slots["model.layers.31.self_attn.q_proj.weight"].torch_shape == (4096, 4096)
    assert slots[TRUNK + "stages.2.blocks.26.conv_dw.weight"].torch_shape == (768, 1, 7, 7)
    assert not any(convert_rules.is_ignored(name) for name in slots)


def test_layers_of_different_dtypes_are_widened_without_loss(tmp_path: Path, release: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(release, lambda tensors: tensors | {name: tensors[name].to(torch.float16)})
    convert.convert(release, tmp_path / "out")
    kernel = leaves(tmp_path / "out")["decoder/layers/mlp/up_proj/kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[1], reference.read_shards(release)[name].float().numpy().T)


@pytest.mark.parametrize("dtype", torch_files.DTYPES)
def test_dtype_option_casts_every_leaf(tmp_path: Path, release: Path, dtype: str) -> None:
    convert.convert(release, tmp_path / "out", dtype=dtype)
    found = leaves(tmp_path / "out")
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype(dtype)}
    weight = reference.read_shards(release)["mask_extractor.res3.bias"].to(getattr(torch, dtype)).float()
    np.testing.assert_array_equal(found["extractor/res3/bias"].astype(np.float32), weight.numpy())


def test_values_beyond_float16_are_an_error(tmp_path: Path, release: Path) -> None:
    edit_tensors(release, lambda tensors: tensors | {"model.norm.weight": torch.full((32,), 1e6)})
    assert_fails(release, tmp_path / "out", "decoder/norm/scale .* float16", dtype="float16")


def test_old_torch_files_are_read(tmp_path: Path, release: Path) -> None:
    for path in release.glob("*.bin"):
        tensors = reference._read_shard(path)
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    convert.convert(release, tmp_path / "out")
    convert.to_torch(tmp_path / "out", tmp_path / "back")
    before, after = used(reference.read_shards(release)), reference.read_shards(tmp_path / "back")
    assert {k: bits(v) for k, v in before.items()} == {k: bits(v) for k, v in after.items()}


def test_tower_may_come_from_open_clip(tmp_path: Path, model: "reference.OspreyReference") -> None:
    whole = write_release(model, tmp_path / "whole")
    without = write_release(model, tmp_path / "without", with_tower=False)
    reference.write_open_clip(model, tmp_path / "open_clip.bin")
    assert_fails(without, tmp_path / "out", "vision tower.*--vision-tower")
    convert.convert(without, tmp_path / "out", vision_tower=tmp_path / "open_clip.bin", dtype="float32")
    convert.convert(whole, tmp_path / "expected", dtype="float32")
    found, expected = leaves(tmp_path / "out"), leaves(tmp_path / "expected")
    for path, leaf in expected.items():
        tolerance = 1e-3 if path.startswith("vision/") else 0.0  # the release's tower is in float16
        np.testing.assert_allclose(found[path], leaf, rtol=tolerance, atol=1e-6 * bool(tolerance))


def test_tower_given_twice_is_a_duplicate(
    tmp_path: Path, model: "reference.OspreyReference", release: Path
) -> None:
    reference.write_open_clip(model, tmp_path / "open_clip.bin")
    message = r"duplicate tensor model\.vision_tower.* in .*pytorch_model.* and in .*open_clip\.bin"
    assert_fails(release, tmp_path / "out", message, vision_tower=tmp_path / "open_clip.bin")


@pytest.mark.parametrize("with_projector", [False, True])
def test_stage_2_starts_from_plain_decoder_tower_and_projector(
    tmp_path: Path, model: "reference.OspreyReference", with_projector: bool
) -> None:
    (tmp_path / "pieces").write_bytes(b"pieces")
    reference.write_vicuna(model, tmp_path / "vicuna", tokenizer_model=tmp_path / "pieces", dtype=torch.float16)
    reference.write_open_clip(model, tmp_path / "open_clip.bin")
    reference.write_projector(model, tmp_path / "projector.bin")
    arguments = ["--decoder", str(tmp_path / "vicuna"), "--vision-tower", str(tmp_path / "open_clip.bin")]
    arguments += ["--projector", str(tmp_path / "projector.bin")] if with_projector else []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert convert.main([*arguments, "--seed", str(seed), str(tmp_path / name)]) == 0
    one, same, other = (leaves(tmp_path / name) for name in "abc")
    fresh = {path for path in one if not np.array_equal(one[path], other[path])}
    parts = ("extractor/",) if with_projector else ("extractor/", "projector/")
    assert fresh == {path for path in one if path.startswith(parts)}
    assert all(np.array_equal(one[path], same[path]) for path in one)
    assert one["decoder/norm/scale"].dtype == np.float16
    kernel = one["extractor/mask_linear_0/kernel"]
    assert kernel.shape == (12544, 1024)
    assert abs(np.abs(kernel).max() - 1 / 112) < 1e-5
    assert abs(kernel.std() - 1 / 112 / 3**0.5) < 1e-5
    assert not np.array_equal(one["extractor/res2/bias"], one["extractor/res3/bias"])


def test_plain_decoder_without_decoder_option_says_so(
    tmp_path: Path, model: "reference.OspreyReference"
) -> None:
    (tmp_path / "pieces").write_bytes(b"pieces")
    reference.write_vicuna(model, tmp_path / "vicuna", tokenizer_model=tmp_path / "pieces")
    reference.write_open_clip(model, tmp_path / "open_clip.bin")
    tower = tmp_path / "open_clip.bin"
    assert_fails(tmp_path / "vicuna", tmp_path / "out", "mask extractor.*--decoder", vision_tower=tower)


def test_hub_id_is_fetched(tmp_path: Path, release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def fetch(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(release)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    convert.convert("someone/Osprey-7b", tmp_path / "out")
    assert asked[0][0] == "someone/Osprey-7b"
    assert checkpoint.load_config(tmp_path / "out").decoder.dim == 32

    def refuse(name: str, *, allow_patterns: list[str]) -> str:
        raise OSError("offline\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert_fails("someone/Osprey-7b", tmp_path / "other", "no directory someone/Osprey-7b.*offline$")
    assert_fails("nowhere", tmp_path / "other", "no directory nowhere")


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


TENSOR_FAULTS = {
    "missing": (drop("model.layers.1.mlp.up_proj.weight"), r"- model\.layers\.1\.mlp\.up_proj\.weight$"),
    "missing size": (drop("model.embed_tokens.weight"), r"missing tensors.*model\.embed_tokens\.weight"),
    "unknown": (lambda t: t | {"model.extra.weight": torch.ones(2)}, r"\+ model\.extra\.weight$"),
    "unknown stage": (
        lambda t: t | {TRUNK + "stages.0.downsample.0.weight": torch.ones(16)},
        r"\+ .*stages\.0\.downsample\.0\.weight$",
    ),
    "misshapen": (
        lambda t: t | {"mask_extractor.res4.weight": torch.ones(20, 47)},
        r"! mask_extractor\.res4\.weight: \(20, 47\), expected \(20, 48\)$",
    ),
    "transposed heads": (
        lambda t: t | {"model.layers.0.self_attn.k_proj.weight": torch.ones(32, 16)},
        r"! model\.layers\.0\.self_attn\.k_proj\.weight: \(32, 16\), expected \(16, 32\)$",
    ),
    "axes": (lambda t: t | {"model.embed_tokens.weight": torch.ones(5)}, r"embed_tokens\.weight has shape \(5,\)"),
    "oblong mask": (
        lambda t: t | {"mask_extractor.mask_linear.layers.0.weight": torch.ones(20, 12545)},
        r"layers\.0\.weight has shape \(20, 12545\).*square",
    ),
    "integers": (
        lambda t: t | {"model.norm.weight": torch.ones(32, dtype=torch.int32)},
        r"only float32, bfloat16, float16 .*model\.norm\.weight",
    ),
    "few rows": (
        lambda t: t | {key: t[key][:60].clone() for key in ("model.embed_tokens.weight", "lm_head.weight")},
        "config.json says vocab_size 64, the tensors .* say 60",
    ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_wrong_tensors_are_named(tmp_path: Path, release: Path, fault: str) -> None:
    change, message = TENSOR_FAULTS[fault]
    edit_tensors(release, change)
    assert_fails(release, tmp_path / "out", message)


FIELD_FAULTS = {
    "hidden_size": (64, "config.json says hidden_size 64, the tensors .* say 32"),
    "num_hidden_layers": (3, "config.json says num_hidden_layers 3, the tensors .* say 2"),
    "intermediate_size": (65, "config.json says intermediate_size 65, the tensors .* say 64"),
    "vocab_size": (66, "config.json says vocab_size 66, the tensors .* say 64"),
    "num_attention_heads": (None, "config.json has no num_attention_heads"),
    "num_key_value_heads": ("two", "num_key_value_heads must be an integer, got 'two'"),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, "rope_scaling is .*linear.*not supported"),
    "rope_parameters": ({"rope_type": "yarn"}, "rope_scaling is .*yarn.*not supported"),
    "tie_word_embeddings": (True, r"tie_word_embeddings is true, so there is no lm_head\.weight"),
    "mm_projector_type": ("linear", "mm_projector_type is 'linear', only 'mlp2x_gelu'"),
    "hidden_act": ("gelu", "hidden_act is 'gelu', only 'silu'"),
}


@pytest.mark.parametrize("key", FIELD_FAULTS)
def test_config_json_that_contradicts_or_asks_for_more_is_an_error(
    tmp_path: Path, release: Path, key: str
) -> None:
    value, message = FIELD_FAULTS[key]
    edit_fields(release, **{key: value})
    assert_fails(release, tmp_path / "out", message)


def test_tokenizer_of_another_vocabulary_is_an_error(
    tmp_path: Path, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileTokenizer, "mask_id", 70)
    monkeypatch.setattr(FileTokenizer, "position_id", 71)
    assert_fails(release, tmp_path / "out", r"tokenizer has 70 pieces.*embed_tokens\.weight only 64 rows")


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def truncate(directory: Path) -> None:
    path = directory / "pytorch_model-00002-of-00002.bin"
    os.truncate(path, path.stat().st_size - 1000)


def truncate_safetensors(directory: Path) -> None:
    tensors = {k: v.clone() for k, v in reference.read_shards(directory).items()}
    reference.save_file(tensors, directory / "model.safetensors")
    os.truncate(directory / "model.safetensors", 20_000)


def poison(directory: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {directory.parent / 'owned'}",)

    (directory / "pytorch_model-00001-of-00002.bin").write_bytes(pickle.dumps({"x": Evil()}))


def add_to_shard(directory: Path) -> None:
    path = directory / "pytorch_model-00002-of-00002.bin"
    edit_shard(path, lambda tensors: tensors | {"model.embed_tokens.weight": torch.ones(64, 32)})


def forget_in_shard(directory: Path) -> None:
    edit_shard(directory / "pytorch_model-00002-of-00002.bin", drop("model.norm.weight"))
    edit_shard(directory / "pytorch_model-00001-of-00002.bin", drop("model.norm.weight"))


FILE_FAULTS = {
    "no config": (remove("config.json"), "no config.json in .*release"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
    "list config": (lambda d: (d / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "no tokenizer": (remove("tokenizer.model"), "no tokenizer.* in .*release"),
    "no index": (remove("pytorch_model.bin.index.json"), "no weights in .*release"),
    "empty index": (
        lambda d: (d / "pytorch_model.bin.index.json").write_text("{}"),
        r"index\.json has no weight_map",
    ),
    "missing shard": (
        remove("pytorch_model-00002-of-00002.bin"),
        r"index\.json names shards that are not there: pytorch_model-00002-of-00002\.bin",
    ),
    "truncated shard": (truncate, r"cannot read .*pytorch_model-00002-of-00002\.bin.*truncated"),
    "truncated safetensors": (truncate_safetensors, r"cannot read .*model\.safetensors.*truncated"),
    "code in a pickle": (poison, r"cannot read .*pytorch_model-00001-of-00002\.bin"),
    "duplicate": (
        add_to_shard,
        r"duplicate tensor model\.embed_tokens\.weight: in .*00001-of-00002\.bin and in .*00002-of-00002\.bin",
    ),
    "only in index": (forget_in_shard, r"- model\.norm\.weight in pytorch_model-0000\d-of-00002\.bin$"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_wrong_files_are_one_line_and_status_2(
    tmp_path: Path, release: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = FILE_FAULTS[fault]
    change(release)
    assert_fails(release, tmp_path / "out", message)
    before = sorted(tmp_path.iterdir())
    assert convert.main([str(release), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_existing_destination_is_untouched(tmp_path: Path, release: Path) -> None:
    convert.convert(release, tmp_path / "checkpoint")
    (tmp_path / "out").mkdir()
    assert_fails(release, tmp_path / "out", "out exists already")
    with pytest.raises(ValueError, match="out exists already"):
        convert.to_torch(tmp_path / "checkpoint", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_each_direction_tells_the_other_ones_source(tmp_path: Path, release: Path) -> None:
    convert.convert(release, tmp_path / "checkpoint")
    assert_fails(tmp_path / "checkpoint", tmp_path / "out", "osprey-jax checkpoint already; --to-torch")
    with pytest.raises(ValueError, match="PyTorch release.*convert it first"):
        convert.to_torch(release, tmp_path / "out")


@pytest.mark.parametrize("back", [False, True])
def test_interrupt_leaves_nothing_behind(
    tmp_path: Path, release: Path, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    convert.convert(release, tmp_path / "checkpoint")
    before = sorted(tmp_path.iterdir())
    owner, name = (torch_files, "_to_tensor") if back else (convert, "_assign")
    original, calls = getattr(owner, name), []

    def interrupted(*args: object) -> object:
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, name, interrupted)
    monkeypatch.setattr(convert, "PART_BYTES", 1)
    run = convert.to_torch if back else convert.convert
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "checkpoint" if back else release, tmp_path / "out")
    assert len(calls) == 20
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [["a"], ["a", "b", "c"], ["--decoder", "v", "b"], ["--to-torch", "--dtype", "float32", "a", "b"]],
)
def test_wrong_arguments_exit_with_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        convert.main(arguments)
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_config_that_fits_no_leaf_shapes_is_refused_on_the_way_back(tmp_path: Path, release: Path) -> None:
    convert.convert(release, tmp_path / "checkpoint")
    config = checkpoint.load_config(tmp_path / "checkpoint")
    wrong = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=65))
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(wrong.to_dict()))
    with pytest.raises(ValueError, match="not those of its config.json"):
        convert.to_torch(tmp_path / "checkpoint", tmp_path / "out")


def test_every_expected_leaf_is_a_plain_struct() -> None:
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract_params(osprey_7b(), jnp.float32)))
