"""Every error that SAM's conversion and its checkpoints promise, and that nothing is left behind."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from osprey_jax import checkpoint, convert, convert_sam, torch_files
from osprey_jax.config import tiny
from osprey_jax.sam import files
from tests.convert.releases import FileTokenizer, edit_fields
from tests.convert.sam_releases import assert_fails, edit, without

TENSOR_FAULTS = {
    "missing": (
        without("image_encoder.blocks.3.attn.rel_pos_w"),
        r"- image_encoder\.blocks\.3\.attn\.rel_pos_w$",
    ),
    "missing size": (
        without("mask_decoder.mask_tokens.weight"),
        r"missing tensors, .*unknown: mask_decoder\.mask_tokens\.weight$",
    ),
    "missing table": (
        without("image_encoder.blocks.2.attn.rel_pos_h"),
        r"- image_encoder\.blocks\.2\.attn\.rel_pos_h$",
    ),
    "unknown": (
        lambda t: t | {"mask_decoder.extra.weight": torch.ones(2)},
        r"\+ mask_decoder\.extra\.weight$",
    ),
    "of Osprey": (
        lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
        r"\+ model\.layers\.0\.self_attn\.rotary_emb\.inv_freq$",
    ),
    "misshapen": (
        lambda t: t | {"image_encoder.neck.2.weight": torch.ones(32, 32, 1, 1)},
        r"! image_encoder\.neck\.2\.weight: \(32, 32, 1, 1\), expected \(32, 32, 3, 3\)$",
    ),
    "even table": (
        lambda t: t | {"image_encoder.blocks.1.attn.rel_pos_h": torch.ones(20, 16)},
        r"! image_encoder\.blocks\.1\.attn\.rel_pos_h: \(20, 16\), expected \(19, 16\)$",
    ),
    "several windows": (
        lambda t: t | {"image_encoder.blocks.2.attn.rel_pos_h": torch.ones(9, 16)},
        r"windows of image_encoder\.blocks.* several sizes: 4, 5$",
    ),
    "oblong": (
        lambda t: t | {"image_encoder.pos_embed": torch.ones(1, 10, 9, 48)},
        r"pos_embed has shape \(1, 10, 9, 48\), which is not a square's$",
    ),
    "axes": (
        lambda t: t | {"image_encoder.pos_embed": torch.ones(100, 48)},
        r"pos_embed has shape \(100, 48\), expected 4 axes",
    ),
    "empty": (
        lambda t: t | {"mask_decoder.mask_tokens.weight": torch.ones(0, 32)},
        r"mask_tokens\.weight has shape \(0, 32\), expected 2 axes, none of them empty",
    ),
    "head size": (
        lambda t: t | {"image_encoder.blocks.0.attn.rel_pos_h": torch.ones(7, 13)},
        r"rel_pos_h has shape \(7, 13\), but 13 doesn't divide the width of 48$",
    ),
    "integers": (
        lambda t: t | {"mask_decoder.iou_token.weight": torch.ones(1, 32, dtype=torch.int64)},
        r"only float32, bfloat16, float16 tensors .*mask_decoder\.iou_token\.weight",
    ),
    "transformers' names": (
        lambda t: t | {"vision_encoder.pos_embed": torch.ones(1)},
        r"sam\.pth has transformers' names; give its directory",
    ),
    "another model": (lambda t: {"conv.weight": torch.ones(1)}, "missing tensors, without which SAM's sizes"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_wrong_tensors_are_named(tmp_path: Path, sam_file: Path, fault: str) -> None:
    change, message = TENSOR_FAULTS[fault]
    edit(sam_file, change)
    assert_fails(sam_file, tmp_path / "out", message)


FIELD_FAULTS = [
    ("vision_config", "use_rel_pos", False, "vision_config.use_rel_pos is False, only True is supported"),
    ("vision_config", "use_abs_pos", False, "vision_config.use_abs_pos is False, only True is supported"),
    ("vision_config", "qkv_bias", False, "vision_config.qkv_bias is False, only True is supported"),
    ("vision_config", "hidden_act", "relu", "vision_config.hidden_act is 'relu', only 'gelu' is supported"),
    ("vision_config", "image_size", 96, "says vision_config.image_size 96, the tensors say 80"),
    ("vision_config", "patch_size", [8, 16], r"says vision_config.patch_size \[8, 16\], the tensors say 8"),
    ("vision_config", "num_attention_heads", 4, "says vision_config.num_attention_heads 4, .* say 3"),
    ("vision_config", "window_size", 5, "says vision_config.window_size 5, the tensors say 4"),
    ("vision_config", "global_attn_indexes", [1], r"global_attn_indexes \[1\], the tensors say \[1, 3\]"),
    ("vision_config", "global_attn_indexes", 1, "global_attn_indexes 1, the tensors say"),
    ("vision_config", "layer_norm_eps", "x", "vision_config.layer_norm_eps must be a positive number"),
    ("prompt_encoder_config", "hidden_act", "relu", "hidden_act is 'relu', only 'gelu'"),
    ("prompt_encoder_config", "layer_norm_eps", 1e-5, "layer_norm_eps is 1e-05, only 1e-06 is supported"),
    ("prompt_encoder_config", "image_size", 1024, "prompt_encoder_config.image_size 1024, .* say 80"),
    ("mask_decoder_config", "hidden_act", "gelu", "mask_decoder_config.hidden_act is 'gelu', only 'relu'"),
    ("mask_decoder_config", "attention_downsample_rate", 4, "downsample_rate 4, the tensors say 2"),
    ("mask_decoder_config", "num_attention_heads", 0, "num_attention_heads must be a positive integer"),
    ("mask_decoder_config", "num_attention_heads", 5, "must be a multiple of the decoder's num_heads"),
    ("mask_decoder_config", "iou_head_depth", 4, "iou_head_depth 4, the tensors say 3"),
]


@pytest.mark.parametrize(("section", "key", "value", "message"), FIELD_FAULTS)
def test_config_json_that_contradicts_or_asks_for_more_is_an_error(
    tmp_path: Path, sam_directory: Path, section: str, key: str, value: object, message: str
) -> None:
    fields = json.loads((sam_directory / "config.json").read_text())[section]
    edit_fields(sam_directory, **{section: fields | {key: value}})
    assert_fails(sam_directory, tmp_path / "out", message)


def spoil(sam_directory: Path) -> None:
    os.truncate(sam_directory / "model.safetensors", 20_000)


FILE_FAULTS = {
    "no file": (lambda d: None, "nothing", "no file .*nothing"),
    "truncated": (
        lambda d: os.truncate(d / "sam.pth", 50_000),
        "sam.pth",
        r"cannot read .*sam\.pth.*truncated",
    ),
    "no tensors": (
        lambda d: torch.save({"model": {}}, d / "sam.pth"),
        "sam.pth",
        "cannot read .*dictionary of tensors",
    ),
    "truncated safetensors": (
        lambda d: spoil(d / "hf"),
        "hf",
        r"cannot read .*model\.safetensors.*truncated",
    ),
    "no config": (lambda d: (d / "hf" / "config.json").unlink(), "hf", r"no config\.json in .*\.pth itself"),
    "broken config": (
        lambda d: (d / "hf" / "config.json").write_text("{"),
        "hf",
        "config.json is not valid JSON",
    ),
    "list config": (lambda d: (d / "hf" / "config.json").write_text("[]"), "hf", "is not a JSON object"),
    "other model": (
        lambda d: edit_fields(d / "hf", model_type="sam2"),
        "hf",
        "model_type is 'sam2', only 'sam'",
    ),
    "section": (lambda d: edit_fields(d / "hf", vision_config=[1]), "hf", "vision_config must be a mapping"),
    "no weights": (lambda d: (d / "hf" / "model.safetensors").unlink(), "hf", "no weights in .*hf"),
}


@pytest.mark.usefixtures("sam_file", "sam_directory")
@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_wrong_files_are_one_line_and_status_2(
    tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, source, message = FILE_FAULTS[fault]
    change(tmp_path)
    assert_fails(tmp_path / source, tmp_path / "out", message)
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert convert.main(["--sam", str(tmp_path / source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_existing_destinations_are_untouched(tmp_path: Path, sam_file: Path, sam_checkpoint: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out.pth").write_bytes(b"mine")
    assert_fails(sam_file, tmp_path / "out", "out exists already")
    with pytest.raises(ValueError, match=r"out\.pth exists already"):
        convert_sam.to_torch(sam_checkpoint, tmp_path / "out.pth")
    assert not list((tmp_path / "out").iterdir())
    assert (tmp_path / "out.pth").read_bytes() == b"mine"


def test_an_interrupt_leaves_nothing_behind(
    tmp_path: Path, sam_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def interrupted(array: np.ndarray) -> torch.Tensor:
        calls.append(array)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return torch.from_numpy(np.array(array))

    monkeypatch.setattr(torch_files, "_to_tensor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_sam.to_torch(sam_checkpoint, tmp_path / "out.pth")
    assert not list(tmp_path.iterdir())


def test_each_kind_of_checkpoint_tells_the_other(
    tmp_path: Path, sam_file: Path, sam_directory: Path, sam_checkpoint: Path
) -> None:
    osprey = tmp_path / "osprey"
    checkpoint.save_params(osprey, {"x": np.ones(1, np.float32)}, tiny(), FileTokenizer(b"pieces"))
    with pytest.raises(ValueError, match=r"osprey is an Osprey checkpoint, not one of SAM$"):
        files.load(osprey)
    with pytest.raises(
        ValueError, match=r"sam is a checkpoint of SAM, not of Osprey; it is what --sam takes$"
    ):
        checkpoint.load_config(sam_checkpoint)
    with pytest.raises(
        ValueError, match=r"sam\.pth is a file, .*convert_torch_ckpt\.py --sam .*sam\.pth DST$"
    ):
        files.load(sam_file)
    with pytest.raises(
        ValueError, match=r"holds a PyTorch release, .*convert_torch_ckpt\.py --sam .*hf DST$"
    ):
        files.load(sam_directory)
    with pytest.raises(ValueError, match=r"no directory .*nowhere"):
        files.load(tmp_path / "nowhere")
    for source, message in (
        (sam_directory, "transformers' SAM, .* --sam"),
        (sam_file, "is a file; .* --sam"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.convert(source, tmp_path / "out")
    assert_fails(sam_checkpoint, tmp_path / "out", "osprey-jax checkpoint already; --to-torch")
    assert_fails(osprey, tmp_path / "out", "osprey-jax checkpoint already")


def test_damaged_checkpoints_are_named(tmp_path: Path, sam_file: Path) -> None:
    convert_sam.convert(sam_file, sam := tmp_path / "sam")
    values = json.loads((sam / "config.json").read_text())
    assert values["model"] == "sam"

    def write(changed: dict) -> None:
        (sam / "config.json").write_text(json.dumps(changed))

    for changed, message in (
        (values | {"seed": 1}, r"config\.json: unknown config keys: seed$"),
        (values | {"model": "other"}, r"config\.json: model must be 'sam', got 'other'$"),
        (
            values | {"encoder": {**values["encoder"], "dim": 50}},
            r"config\.json: dim \(50\) must be a multiple",
        ),
        (
            values | {"encoder": {**values["encoder"], "ffn_dim": 95}},
            r"! image_encoder/blocks_0/fc1/kernel: saved",
        ),
    ):
        write(changed)
        with pytest.raises(ValueError, match=message):
            files.load(sam)
    with pytest.raises(ValueError, match=r"not those of its config\.json"):
        convert_sam.to_torch(sam, tmp_path / "out.pth")
    write(values)
    (sam / "params" / "state" / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match=f"the checkpoint {sam} is damaged: params/state/_METADATA: "):
        files.load(sam)


@pytest.mark.parametrize(
    "arguments",
    [["--sam", "a"], ["--sam", "a", "b", "c"]]
    + [["--sam", "a", "b", *more] for more in (["--to-torch"], ["--seed", "1"], ["--quantize", "int8"])]
    + [["--sam", "a", "b", f"--{name}", "c"] for name in ("decoder", "vision-tower", "projector")],
)
def test_wrong_arguments_exit_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        convert.main(arguments)
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err
