"""SAM's conversion from both of PyTorch's layouts, and back to the original's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import SamModel

from osprey_jax import checkpoint, convert, convert_sam
from osprey_jax.convert_rules import slots_of
from osprey_jax.convert_sam_rules import read_sizes, rules
from osprey_jax.sam import config as sam_configs
from osprey_jax.sam import files
from osprey_jax.sam.network import abstract_params
from tests.convert.releases import bits, edit_fields, leaves
from tests.convert.sam_releases import (
    SHARED,
    TIED,
    assert_fails,
    assert_same_leaves,
    edit,
    original_names,
    without,
)
from tests.parity.sam_models import B_LIKE, L_LIKE, random_model


def test_the_original_there_and_back_is_bit_identical(tmp_path: Path, sam_file: Path) -> None:
    dtypes = {"image_encoder": torch.bfloat16, "prompt_encoder": torch.float32, "mask_decoder": torch.float16}
    edit(sam_file, lambda t: {k: v.to(dtypes[k.partition(".")[0]]) for k, v in t.items()})
    before = torch.load(sam_file)
    assert convert.main(["--sam", str(sam_file), str(tmp_path / "sam")]) == 0
    sam_file.unlink()
    assert convert.main(["--to-torch", str(tmp_path / "sam"), str(tmp_path / "new" / "back.pth")]) == 0
    after = torch.load(tmp_path / "new" / "back.pth")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["back.pth"]
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(after[name]) == bits(tensor), name


def test_every_leaf_is_its_tensor(sam_checkpoint: Path, sam_model: SamModel) -> None:
    """A few by hand, of each way to rearrange axes."""
    found, tensors = leaves(sam_checkpoint), {k: v.numpy() for k, v in sam_model.state_dict().items()}
    qkv = tensors["vision_encoder.layers.2.attn.qkv.weight"]
    kernel = found["image_encoder/blocks_2/attn/qkv/kernel"]
    assert kernel.shape == (48, 3, 3, 16)
    np.testing.assert_array_equal(kernel[5, 1, 2], qkv[48 + 32 : 48 + 48, 5])
    out = tensors["mask_decoder.transformer.layers.1.self_attn.out_proj.weight"]
    np.testing.assert_array_equal(
        found["mask_decoder/layers_1/self_attn/out_proj/kernel"][3, 2], out[:, 3 * 4 + 2]
    )
    conv = tensors["vision_encoder.neck.conv2.weight"]
    np.testing.assert_array_equal(found["image_encoder/neck_conv2/kernel"][0, 2, 7], conv[:, 7, 0, 2])
    up = tensors["mask_decoder.upscale_conv1.weight"]
    np.testing.assert_array_equal(found["mask_decoder/upscale_conv1/conv/kernel"][7, 0, 1], up[7, :, 0, 1])
    np.testing.assert_array_equal(
        found["prompt_encoder/kinds"][3], tensors["prompt_encoder.point_embed.3.weight"][0]
    )


@pytest.mark.parametrize("kind", ["safetensors", "shards", "bin"])
def test_transformers_directories_give_the_same(
    tmp_path: Path, sam_model: SamModel, sam_checkpoint: Path, kind: str
) -> None:
    sam_model.save_pretrained(tmp_path / "hf", max_shard_size="100KB" if kind == "shards" else "1GB")
    if kind == "bin":
        (tmp_path / "hf" / "model.safetensors").unlink()
        torch.save(
            sam_model.state_dict(), tmp_path / "hf" / "pytorch_model.bin"
        )  # holds the shared tensor twice
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file() == (kind == "shards")
    assert convert.main(["--sam", str(tmp_path / "hf"), str(tmp_path / "sam")]) == 0
    assert_same_leaves(tmp_path / "sam", sam_checkpoint)
    # As each of them computes.
    assert files.load_config(tmp_path / "sam").decoder.norm_eps == 1e-6
    assert files.load_config(sam_checkpoint).decoder.norm_eps == 1e-5
    assert files.load_config(tmp_path / "sam").encoder == files.load_config(sam_checkpoint).encoder


def test_other_sizes_are_inferred(tmp_path: Path) -> None:
    model = random_model(L_LIKE)
    model.save_pretrained(tmp_path / "hf")
    torch.save(original_names(model), tmp_path / "sam.pth")
    convert_sam.convert(tmp_path / "hf", tmp_path / "a")
    convert_sam.convert(tmp_path / "sam.pth", tmp_path / "b")
    found = files.load_config(tmp_path / "a")
    assert found == sam_configs.SamConfig(
        encoder=sam_configs.EncoderConfig(
            image_size=44,
            patch_size=4,
            dim=64,
            ffn_dim=128,
            num_layers=6,
            num_heads=4,
            window_size=7,
            global_layers=(2, 5),
            out_dim=64,
            norm_eps=1e-3,
        ),
        decoder=sam_configs.DecoderConfig(
            num_layers=3,
            num_heads=4,
            ffn_dim=80,
            num_masks=2,
            iou_dim=40,
            iou_layers=4,
            mask_channels=24,
            norm_eps=1e-3,
        ),
    )
    assert files.load_config(tmp_path / "b").decoder.num_heads == 8
    with pytest.raises(ValueError, match="has 4 heads in its decoder"):
        convert_sam.to_torch(tmp_path / "a", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_the_releases_sizes_are_inferred(name: str, layout: str) -> None:
    config = sam_configs.PRESETS[name]()
    shapes = {path: leaf.shape for path, leaf in checkpoint.flatten(abstract_params(config)).items()}
    slots = slots_of(shapes, rules(config, layout))
    found = read_sizes({name: slot.torch_shape for name, slot in slots.items()}, {}, layout)
    assert found.encoder == config.encoder
    assert (found.decoder.norm_eps, found.decoder.num_masks) == (1e-5 if layout == "original" else 1e-6, 3)


def test_windows_as_large_as_the_grid_are_global(tmp_path: Path) -> None:
    sizes = {**B_LIKE, "vision_config": {**B_LIKE["vision_config"], "window_size": 10}}
    random_model(sizes).save_pretrained(tmp_path / "hf")
    convert_sam.convert(tmp_path / "hf", tmp_path / "sam")
    encoder = files.load_config(tmp_path / "sam").encoder
    assert (encoder.window_size, encoder.global_layers) == (10, (0, 1, 2, 3))


def test_dtype_of_all_leaves(tmp_path: Path, sam_file: Path) -> None:
    assert convert.main(["--sam", str(sam_file), "--dtype", "bfloat16", str(tmp_path / "sam")]) == 0
    assert {leaf.dtype.name for leaf in leaves(tmp_path / "sam").values()} == {"bfloat16"}
    large = torch.full((32,), 1e6)
    edit(sam_file, lambda t: t | {"image_encoder.neck.1.weight": large})
    assert_fails(sam_file, tmp_path / "out", "image_encoder/neck_norm1/scale .* float16", dtype="float16")


def test_what_is_loaded_is_what_was_converted(sam_checkpoint: Path) -> None:
    config, params = files.load(sam_checkpoint)
    assert config == files.load_config(sam_checkpoint)
    expected = leaves(sam_checkpoint)
    for path, leaf in checkpoint.flatten(params).items():
        np.testing.assert_array_equal(np.asarray(leaf), expected[path])
    _, params = files.load(sam_checkpoint, "bfloat16")
    assert {leaf.dtype.name for leaf in checkpoint.flatten(params).values()} == {"bfloat16"}


def test_sides_may_be_given_twice_and_sections_left_out(tmp_path: Path, sam_directory: Path) -> None:
    fields = json.loads((sam_directory / "config.json").read_text())["vision_config"]
    edit_fields(sam_directory, vision_config=fields | {"image_size": [80, 80]}, prompt_encoder_config=None)
    convert_sam.convert(sam_directory, tmp_path / "sam")
    assert files.load_config(tmp_path / "sam").encoder.image_size == 80


def test_shared_tensors_have_to_be_equal(tmp_path: Path, sam_directory: Path, sam_model: SamModel) -> None:
    (sam_directory / "model.safetensors").unlink()
    tensors = sam_model.state_dict()
    for change, name in ((without(SHARED), "one"), (without(TIED), "other")):
        torch.save(change(tensors), sam_directory / "pytorch_model.bin")
        convert_sam.convert(sam_directory, tmp_path / name)
    assert_same_leaves(tmp_path / "one", tmp_path / "other")
    torch.save(tensors | {TIED: tensors[TIED] + 1}, sam_directory / "pytorch_model.bin")
    assert_fails(sam_directory, tmp_path / "out", "positional_embedding differ, but are one parameter")
