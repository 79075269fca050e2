"""Runs that train adapters: what they learn and save, how they go on, and what they leave to others."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from osprey_jax import Osprey, checkpoint, convert, train
from osprey_jax.models.osprey import abstract_params
from tests.parity import bridge, reference, scenes
from tests.train.runs import Command, learned, leaves
from tests.train.test_refusals import refusal

# ml_collections loads a config file by a method that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ADAPTED = {"lora.rank": 4, "lora.alpha": 8.0, "trained": ("projector/.*", "decoder/.*"), "eval_every": 0,
           "frozen_dtype": "bfloat16", "steps": 4, "checkpoint_every": 2, "learning_rate": 0.05}  # fmt: skip


@pytest.fixture(scope="module")
def run(command: Command, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run of four steps, and its command."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    arguments = command(workdir, **ADAPTED)
    assert train.main(arguments) == 0
    return workdir, arguments


def test_adapters_and_named_parts_alone_are_trained(run: tuple) -> None:
    first, last = (leaves(run[0] / "checkpoints" / step / "params") for step in ("2", "4"))
    learning = {path for path in last if "lora_" in path or path.startswith("projector/")}
    assert len(learning) == 14 + 4
    assert {path for path in last if not np.array_equal(first[path], last[path])} == learning
    assert {path for path, leaf in last.items() if leaf.dtype == np.float32} == learning
    moments = leaves(run[0] / "checkpoints" / "4" / "optimizer")
    assert moments.keys() == {f"{moment}/{path}" for moment in ("mu", "nu") for path in learning}


def test_a_run_goes_on_bit_for_bit(run: tuple, command: Command, tmp_path: Path) -> None:
    shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/export")
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    assert train.main(command(tmp_path / "run", **ADAPTED)) == 0
    assert learned(tmp_path / "run") == learned(run[0])
    for part in ("params", "optimizer"):
        found, expected = (leaves(at / "checkpoints/4" / part) for at in (tmp_path / "run", run[0]))
        assert found.keys() == expected.keys()
        for path, leaf in expected.items():
            np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_the_export_and_checkpoints_read_as_plain_ones(run: tuple) -> None:
    export, last = run[0] / "export", run[0] / "checkpoints/4"
    config = checkpoint.load_config(last)
    assert json.loads((last / "config.json").read_text())["lora"]["rank"] == 4
    assert "lora" not in json.loads((export / "config.json").read_text())
    exported, merged = (dict(checkpoint.load_leaves(each)) for each in (export, last))
    stored = leaves(last / "params")
    assert exported.keys() == merged.keys() == checkpoint.flatten(abstract_params(config)).keys()
    for path, leaf in exported.items():
        assert leaf.dtype == merged[path].dtype
        np.testing.assert_allclose(
            np.float32(leaf), np.float32(merged[path]), rtol=1e-6, atol=1e-7, err_msg=path
        )
    kernel = "decoder/layers/self_attn/v_proj/kernel"
    a, b = (stored[kernel.replace("kernel", name)].astype(np.float64) for name in ("lora_a", "lora_b"))
    expected = stored[kernel].astype(np.float64) + np.einsum("ldr,lrkh->ldkh", a, b) * 2
    assert exported[kernel].dtype == np.float32
    assert np.abs(expected - stored[kernel].astype(np.float64)).max() > 1e-3
    np.testing.assert_allclose(exported[kernel], expected, rtol=1e-5, atol=1e-6)
    placed = checkpoint.load_params(last, abstract_params(config, "bfloat16"))
    np.testing.assert_array_equal(
        placed["decoder"]["layers"]["self_attn"]["v_proj"]["kernel"],
        merged[kernel].astype(jax.numpy.bfloat16),
    )


def test_the_trained_model_has_the_same_logits_in_torch(run: tuple, tmp_path: Path) -> None:
    config = checkpoint.load_config(run[0] / "export")
    sizes = reference.ReferenceConfig(
        image_size=64, depths=config.vision.depths, dims=config.vision.dims, extractor_dim=16,
        position_size=16, vocab_size=512, dim=32, ffn_dim=32, num_layers=2, num_heads=2, num_kv_heads=2,
    )  # fmt: skip
    image, masks = scenes.picture(64, 96), scenes.region_masks(64, 96)[:2]
    prompt = "<image>\nThis provides an overview of the picture. USER: <mask><pos> and <mask><pos>"
    ours = Osprey.load(run[0] / "export")
    found = ours.logits(image, masks, prompt)
    for source in ("export", "checkpoints/4"):
        convert.to_torch(run[0] / source, tmp_path / source)
        twin = reference.OspreyReference(sizes, seed=3)
        twin.load_release_state_dict(reference.read_shards(tmp_path / source))
        expected = twin.logits(image, masks, ours.tokenize(prompt)).numpy()
        assert bridge.largest_difference(found, expected) <= bridge.FORWARD


def test_an_export_begins_the_next_run_which_adapts_it_anew(
    run: tuple, command: Command, tmp_path: Path
) -> None:
    export = run[0] / "export"
    own = ADAPTED | {"init_from": export, "steps": 1, "checkpoint_every": 1, "mesh.data": 2, "mesh.fsdp": 2}
    assert train.main(command(tmp_path / "run", **own)) == 0
    found, before = leaves(tmp_path / "run/checkpoints/1/params"), leaves(export / "params")
    # The first update of a warm-up has a rate of 0.
    for path, leaf in before.items():
        np.testing.assert_array_equal(found[path], leaf.astype(found[path].dtype), err_msg=path)
    old = leaves(run[0] / "checkpoints/2/params")
    added = found.keys() - before.keys()
    assert {path for path in added if found[path].any()} == {path for path in old if "lora_a" in path}
    assert train.main(command(tmp_path / "run", **own)) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lora.rank": -1}, "config.lora.rank must not be negative, got -1"),
        ({"lora.alpha": 0.0}, "config.lora.alpha must be positive, got 0.0"),
        ({"lora.targets": ("(",)}, "lora.targets: '(' is no regular expression: missing )"),
        (
            {"lora.targets": (".*/q_proj", "decoder/lm_head")},
            "lora.targets: 'decoder/lm_head' matches none of decoder/layers/mlp/down_proj, decoder/layers/mlp/",
        ),
        ({"trained": ("tower/.*",)}, "no parameter's path matches 'tower/.*'"),
    ],
)
def test_what_can_t_be_adapted_is_said_in_one_line(
    overrides: dict, message: str, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(command(tmp_path / "run", **{**ADAPTED, **overrides}), capsys)


def test_another_rank_is_another_run(
    run: tuple, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = refusal(command(run[0], **{**ADAPTED, "lora.rank": 2}), capsys)
    assert refused == f"{run[0]} holds another run: lora.rank was 4, is 2"
