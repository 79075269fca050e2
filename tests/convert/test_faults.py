"""Every error that conversion promises, and that it leaves nothing behind."""

import dataclasses
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from osprey_jax import checkpoint, convert, convert_leaves, torch_files
from tests.convert.releases import (
    TRUNK,
    FileTokenizer,
    assert_fails,
    edit_fields,
    edit_shard,
    edit_tensors,
)
from tests.parity import reference


def test_values_beyond_float16_are_an_error(tmp_path: Path, release: Path) -> None:
    edit_tensors(release, lambda tensors: tensors | {"model.norm.weight": torch.full((32,), 1e6)})
    assert_fails(release, tmp_path / "out", "decoder/norm/scale .* float16", dtype="float16")


def test_plain_decoder_without_decoder_option_says_so(
    tmp_path: Path, model: reference.OspreyReference
) -> None:
    (tmp_path / "pieces").write_bytes(b"pieces")
    reference.write_vicuna(model, tmp_path / "vicuna", tokenizer_model=tmp_path / "pieces")
    reference.write_open_clip(model, tmp_path / "open_clip.bin")
    tower = tmp_path / "open_clip.bin"
    assert_fails(tmp_path / "vicuna", tmp_path / "out", "mask extractor.*--decoder", vision_tower=tower)


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
    "axes": (
        lambda t: t | {"model.embed_tokens.weight": torch.ones(5)},
        r"embed_tokens\.weight has shape \(5,\)",
    ),
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


FIELD_FAULTS = [
    ("hidden_size", 64, "config.json says hidden_size 64, the tensors .* say 32"),
    ("num_hidden_layers", 3, "config.json says num_hidden_layers 3, the tensors .* say 2"),
    ("intermediate_size", 65, "config.json says intermediate_size 65, the tensors .* say 64"),
    ("vocab_size", 66, "config.json says vocab_size 66, the tensors .* say 64"),
    ("num_attention_heads", None, "config.json has no num_attention_heads"),
    ("num_attention_heads", 0, "num_attention_heads must be a positive integer, got 0"),
    ("num_key_value_heads", "two", "num_key_value_heads must be a positive integer, got 'two'"),
    ("num_key_value_heads", 0, "num_key_value_heads must be a positive integer, got 0"),
    ("num_key_value_heads", -2, "num_key_value_heads must be a positive integer, got -2"),
    ("head_dim", True, "head_dim must be a positive integer, got True"),
    ("rms_norm_eps", "abc", "rms_norm_eps must be a positive number, got 'abc'"),
    ("rms_norm_eps", False, "rms_norm_eps must be a positive number, got False"),
    ("rope_theta", [1e4], r"rope_theta must be a positive number, got \[10000\.0\]"),
    ("rope_theta", float("inf"), "rope_theta must be a positive number, got inf"),
    ("rope_scaling", "linear", "rope_scaling must be a mapping, got 'linear'"),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling is .*linear.*not supported"),
    ("rope_scaling", {"factor": 2.0}, "rope_scaling is .*factor.*not supported"),
    ("rope_parameters", {"rope_type": "yarn"}, "rope_parameters is .*yarn.*not supported"),
    ("tie_word_embeddings", True, r"tie_word_embeddings is true, so there is no lm_head\.weight"),
    ("mm_projector_type", "linear", "mm_projector_type is 'linear', only 'mlp2x_gelu'"),
    ("mm_use_im_start_end", True, "mm_use_im_start_end is true; prompts .* not supported"),
    ("mm_use_im_patch_token", True, "mm_use_im_patch_token is true; prompts .* not supported"),
    ("hidden_act", "gelu", "hidden_act is 'gelu', only 'silu'"),
]


@pytest.mark.parametrize(("key", "value", "message"), FIELD_FAULTS)
def test_config_json_that_contradicts_or_asks_for_more_is_an_error(
    tmp_path: Path, release: Path, key: str, value: object, message: str
) -> None:
    edit_fields(release, **{key: value})
    assert_fails(release, tmp_path / "out", message)


def test_null_in_config_json_is_the_default(tmp_path: Path, release: Path) -> None:
    edit_fields(release, rope_theta=None, rms_norm_eps=None, rope_scaling=None, num_key_value_heads=None)
    tensors = reference.read_shards(release)
    for layer in range(2):  # without num_key_value_heads there are as many as query heads
        for name in ("k_proj", "v_proj"):
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = torch.ones(32, 32)
    edit_tensors(release, lambda _: tensors)
    convert.convert(release, tmp_path / "out")
    decoder = checkpoint.load_config(tmp_path / "out").decoder
    assert (decoder.rope_theta, decoder.norm_eps, decoder.num_kv_heads) == (10000.0, 1e-5, 4)


def test_base_of_transformers_5_is_read(tmp_path: Path, release: Path) -> None:
    edit_fields(release, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 7e5})
    convert.convert(release, tmp_path / "out")
    assert checkpoint.load_config(tmp_path / "out").decoder.rope_theta == 7e5


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
    edit_shard(path, lambda tensors: tensors | {TRUNK + "stem.1.weight": torch.ones(16)})


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
        r"duplicate tensor .*\.stem\.1\.weight: in .*00001-of-00002\.bin "
        r"and in .*00002-of-00002\.bin",
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
    with pytest.raises(ValueError, match=r"PyTorch release.*convert it first"):
        convert.to_torch(release, tmp_path / "out")


@pytest.mark.parametrize("back", [False, True])
def test_interrupt_leaves_nothing_behind(
    tmp_path: Path, release: Path, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    convert.convert(release, tmp_path / "checkpoint")
    before = sorted(tmp_path.iterdir())
    owner, name = (torch_files, "_to_tensor") if back else (convert_leaves, "_assign")
    original, calls = getattr(owner, name), []

    def interrupted(*args: object) -> object:
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, name, interrupted)
    monkeypatch.setattr(convert_leaves, "PART_BYTES", 1)
    run = convert.to_torch if back else convert.convert
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "checkpoint" if back else release, tmp_path / "out")
    assert len(calls) == 20
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [["a"], ["a", "b", "c"], ["--decoder", "v", "b"], ["--to-torch", "--dtype", "float32", "a", "b"]],
)
def test_wrong_arguments_exit_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        convert.main(arguments)
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_config_that_fits_no_leaf_shapes_is_refused_on_the_way_back(tmp_path: Path, release: Path) -> None:
    convert.convert(release, tmp_path / "checkpoint")
    config = checkpoint.load_config(tmp_path / "checkpoint")
    wrong = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=65))
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(wrong.to_dict()))
    with pytest.raises(ValueError, match=r"not those of its config\.json"):
        convert.to_torch(tmp_path / "checkpoint", tmp_path / "out")


def test_without_torch_the_extra_to_install_is_named(
    tmp_path: Path, release: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert convert.main([str(release), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: import of torch halted")
    assert error.endswith("PyTorch's files need pip install 'osprey-jax[convert]'\n")
    assert not (tmp_path / "out").exists()
