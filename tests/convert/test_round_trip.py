"""Conversion there and back, and its options."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from osprey_jax import checkpoint, convert, convert_rules, prompt, torch_files
from osprey_jax.config import osprey_7b
from osprey_jax.models.osprey import abstract_params
from tests.convert.releases import (
    SIZES,
    TRUNK,
    assert_fails,
    bits,
    edit_tensors,
    leaves,
    used,
    write_release,
)
from tests.parity import reference

TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")


@pytest.mark.parametrize("safetensors", [False, True])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_there_and_back_is_bit_identical(
    tmp_path: Path, model: reference.OspreyReference, safetensors: bool, num_shards: int
) -> None:
    release = write_release(model, tmp_path / "a", safetensors=safetensors, num_shards=num_shards)
    convert.convert(release, tmp_path / "b")
    before, fields = used(reference.read_shards(release)), json.loads((release / "config.json").read_text())
    beside = {name: json.loads((release / name).read_text()) for name in TOKENIZER_FILES}
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
    assert {name: json.loads((tmp_path / "c" / name).read_text()) for name in TOKENIZER_FILES} == beside
    convert.convert(tmp_path / "c", tmp_path / "d")
    assert checkpoint.load_config(tmp_path / "d") == checkpoint.load_config(tmp_path / "b")


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")  # null, as in the release
def test_transformers_opens_an_exported_tokenizer_json(
    tmp_path: Path, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert.convert(release, tmp_path / "a")
    (tmp_path / "a" / "tokenizer.model").unlink()
    words = tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "dog": 3}, unk_token="<unk>")
    tokenizers.Tokenizer(words).save(str(tmp_path / "a" / "tokenizer.json"))
    monkeypatch.setattr(convert, "Tokenizer", prompt.Tokenizer)
    convert.to_torch(tmp_path / "a", tmp_path / "b")
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert opened("dog").input_ids == [3]
    assert (opened.bos_token_id, opened.eos_token_id, opened.unk_token_id) == (1, 2, 0)
    assert (opened.model_max_length, opened.padding_side) == (2048, "right")


def test_config_has_sizes_of_tensors_and_hyperparameters_of_config_json(
    tmp_path: Path, release: Path
) -> None:
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
    attention = {
        name: found[f"decoder/layers/self_attn/{name}/kernel"] for name in ("q_proj", "o_proj", "v_proj")
    }
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
    np.testing.assert_array_equal(
        found["vision/stages_2/blocks/dwconv/kernel"][1, 2, 6], depthwise[:, 0, 2, 6]
    )
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


def test_old_torch_files_are_read(tmp_path: Path, release: Path) -> None:
    for path in release.glob("*.bin"):
        tensors = reference._read_shard(path)
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    convert.convert(release, tmp_path / "out")
    convert.to_torch(tmp_path / "out", tmp_path / "back")
    before, after = used(reference.read_shards(release)), reference.read_shards(tmp_path / "back")
    assert {k: bits(v) for k, v in before.items()} == {k: bits(v) for k, v in after.items()}


def test_tower_may_come_from_open_clip(tmp_path: Path, model: reference.OspreyReference) -> None:
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
    tmp_path: Path, model: reference.OspreyReference, release: Path
) -> None:
    reference.write_open_clip(model, tmp_path / "open_clip.bin")
    message = r"duplicate tensor model\.vision_tower.* in .*pytorch_model.* and in .*open_clip\.bin"
    assert_fails(release, tmp_path / "out", message, vision_tower=tmp_path / "open_clip.bin")


@pytest.mark.parametrize("with_projector", [False, True])
def test_stage_2_starts_from_plain_decoder_tower_and_projector(
    tmp_path: Path, model: reference.OspreyReference, with_projector: bool
) -> None:
    (tmp_path / "pieces").write_bytes(b"pieces")
    reference.write_vicuna(
        model, tmp_path / "vicuna", tokenizer_model=tmp_path / "pieces", dtype=torch.float16
    )
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


def test_of_a_hub_id_only_what_is_read_is_fetched(
    tmp_path: Path, model: reference.OspreyReference, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    hub = tmp_path / "hub"
    shutil.copytree(release, hub)
    for other in ("training_args.bin", "model.safetensors.sig", "README.md", "tokenizer_checker.py"):
        (hub / other).write_bytes(b"unwanted")

    def list_files(name: str) -> list[str]:
        assert name == "someone/Osprey-7b"
        return [path.name for path in hub.iterdir()]

    def fetch(name: str, *, allow_patterns: list[str]) -> str:
        """Puts what the patterns allow, by the Hub's own rules, into an empty directory."""
        assert name == "someone/Osprey-7b"
        fetched = tmp_path / "fetched"
        shutil.rmtree(fetched, ignore_errors=True)
        fetched.mkdir()
        names = [path.name for path in hub.iterdir()]
        for file in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(hub / file, fetched)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    convert.convert("someone/Osprey-7b", tmp_path / "out")
    assert checkpoint.load_config(tmp_path / "out").decoder.dim == 32
    pickles = {"pytorch_model.bin.index.json", *(f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2))}
    always = {"config.json", "tokenizer.model"}
    assert {path.name for path in (tmp_path / "fetched").iterdir()} == always | pickles

    write_release(model, tmp_path / "other_kind", safetensors=True, num_shards=3)
    for path in (tmp_path / "other_kind").glob("model*"):
        shutil.copy(path, hub)
    convert.convert("someone/Osprey-7b", tmp_path / "again")
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    fetched = {path.name for path in (tmp_path / "fetched").iterdir()}
    assert fetched == always | shards | {"model.safetensors.index.json"}


def test_what_the_hub_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(name: str) -> list[str]:
        raise OSError("offline\nand a long story")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", refuse)
    assert_fails("someone/Osprey-7b", tmp_path / "other", "no directory someone/Osprey-7b.*offline$")
    assert_fails("nowhere", tmp_path / "other", "no directory nowhere")


def test_every_expected_leaf_is_a_plain_struct() -> None:
    assert all(
        isinstance(leaf, jax.ShapeDtypeStruct)
        for leaf in jax.tree.leaves(abstract_params(osprey_7b(), jnp.float32))
    )
