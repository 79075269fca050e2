"""Runs that train adapters: what they learn and save, how they go on, and what they leave to others."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from osprey_jax import Osprey, checkpoint, convert, train, train_config, train_step
from osprey_jax.models.osprey import abstract_params
from osprey_jax.prompt import Tokenizer
from tests.parity import bridge, reference, scenes
from tests.train.runs import Command, learned, leaves
from tests.train.test_refusals import refusal

# ml_collections loads a config file by a method that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ADAPTED = {
    "lora.rank": 4,
    "lora.alpha": 8.0,
    "lora.targets": ("decoder/layers/(self_attn/[vo]_proj|mlp/up_proj)",),
    "trained": ("projector/.*", "decoder/.*"),
    "frozen_dtype": "bfloat16",
    "steps": 4,
    "checkpoint_every": 2,
    "eval_every": 0,
    "learning_rate": 0.05,
}


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
    assert len(learning) == 6 + 4
    assert {path for path in last if not np.array_equal(first[path], last[path])} == learning
    assert {path for path, leaf in last.items() if leaf.dtype == np.float32} == learning
    moments = leaves(run[0] / "checkpoints" / "4" / "optimizer")
    expected = {f"{moment}/{path}" for moment in ("mu", "nu") for path in learning}
    assert moments.keys() == expected | {"log_norm"}


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


def test_a_checkpoint_has_the_logits_of_the_export_in_torch(run: tuple, tmp_path: Path) -> None:
    config = checkpoint.load_config(run[0] / "export")
    sizes = reference.ReferenceConfig(
        image_size=64, depths=config.vision.depths, dims=config.vision.dims, extractor_dim=16,
        position_size=16, vocab_size=512, dim=32, ffn_dim=32, num_layers=2, num_heads=2, num_kv_heads=2,
    )  # fmt: skip
    image, masks = scenes.picture(64, 96), scenes.region_masks(64, 96)[:2]
    prompt = "<image>\nThis provides an overview of the picture. USER: <mask><pos> and <mask><pos>"
    ours = Osprey.load(run[0] / "checkpoints/4")
    found = ours.logits(image, masks, prompt)
    convert.to_torch(run[0] / "export", tmp_path / "torch")
    twin = reference.OspreyReference(sizes, seed=3)
    twin.load_release_state_dict(reference.read_shards(tmp_path / "torch"))
    expected = twin.logits(image, masks, ours.tokenize(prompt)).numpy()
    assert bridge.largest_difference(found, expected) <= bridge.FORWARD


def test_an_export_begins_the_next_run_which_adapts_it_anew_on_a_mesh(
    run: tuple, command: Command, tmp_path: Path
) -> None:
    export = run[0] / "export"
    own = ADAPTED | {"init_from": export, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    config, *_ = train_config.parse(command(tmp_path / "run", **own))
    mesh, model_config = train_step.make_mesh(config), checkpoint.load_config(export)
    create, abstract = train_step.make_state(config, model_config, mesh, origin=export)
    state = create()
    for leaf, struct in zip(*map(jax.tree.leaves, (state, abstract)), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (struct.shape, struct.dtype, struct.sharding)
    found, before = (
        {path: np.asarray(leaf) for path, leaf in checkpoint.flatten(tree).items()}
        for tree in (state.params, checkpoint.unflatten(leaves(export / "params")))
    )
    for path, leaf in before.items():
        np.testing.assert_array_equal(found[path], leaf.astype(found[path].dtype), err_msg=path)
    added = found.keys() - before.keys()
    assert len(added) == 6
    assert {path for path in added if found[path].any()} == {path for path in added if "lora_a" in path}
    # What lies on a mesh is merged and written as well.
    lora, tokenizer = train_step.make_lora(config), Tokenizer.load(export)
    checkpoint.save_params(tmp_path / "again", state.params, model_config, tokenizer, lora=lora)
    again = leaves(tmp_path / "again" / "params")
    assert again.keys() == before.keys()
    for path, leaf in again.items():
        np.testing.assert_array_equal(leaf, found[path].astype(leaf.dtype), err_msg=path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lora.rank": -1}, "config.lora.rank must not be negative, got -1"),
        ({"lora.alpha": 0.0}, "config.lora.alpha must be positive, got 0.0"),
        ({"lora.targets": ("(",)}, "lora.targets: '(' is no regular expression: missing )"),
        (
            {"lora.targets": (".*/q_proj", "decoder/lm_head")},
            "lora.targets: 'decoder/lm_head' matches none of decoder/layers/mlp/down_proj, decoder/",
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
