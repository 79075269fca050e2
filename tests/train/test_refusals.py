"""What the trainer refuses to begin, and its configurations."""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from osprey_jax import sharding, train, train_config, train_step
from osprey_jax.config import from_config
from tests.train.runs import ROOT, Command

# ml_collections loads a config file by a method that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

REFUSED: dict[str, tuple[dict, str]] = {
    "unknown key": ({"lerning_rate": 1}, "unknown key lerning_rate in --config.lerning_rate=1; did you mean"),
    "unknown nested key": (
        {"model__decoder__widht": 1},
        "unknown key widht in --config.model.decoder.widht=1",
    ),
    "word for a number": ({"steps": "many"}, "flag --config.steps=many: invalid literal for int()"),
    "fraction for a count": ({"steps": 1.5}, "flag --config.steps=1.5: invalid literal for int()"),
    "nothing for a number": ({"learning_rate": ""}, "flag --config.learning_rate=: could not convert"),
    "empty batch": ({"batch_size": 0}, "config.batch_size must be at least 1, got 0"),
    "half a float": ({"dtype": "float16"}, "config.dtype must be 'float32' or 'bfloat16', got 'float16'"),
    "steps and epochs": ({"epochs": 1.0}, "config.steps or epochs (1.0) must be 0, got 50"),
    "keeping what is never saved": (
        {"keep_every": 7},
        "config.keep_every must be a multiple of checkpoint_every 5, got 7",
    ),
    "odd batch": ({"accumulation": 3}, "config.batch_size 8 doesn't divide by 3: 1 shards on the devices"),
    "batch over devices": ({"batch_size": 12, "mesh__data": 8}, "config.batch_size 12 doesn't divide by 8"),
    "too many devices": (
        {"mesh__fsdp": 16},
        "a mesh of data=1, fsdp=16, tensor=1 needs 16 devices, there are 8",
    ),
    "odd model for a mesh": ({"mesh__tensor": 4}, "doesn't divide over {'data': 1, 'fsdp': 1, 'tensor': 4}"),
    "no such parameters": ({"trained": ("tower/.*",)}, "no parameter's path matches 'tower/.*'"),
    "wrong pattern": ({"trained": ("(",)}, "'(' is no regular expression: missing )"),
    "data that isn't there": (
        {"data__sources": ("custom:my.jsonl",), "data__root": "/nowhere"},
        "data is missing under config.data.root, which is '/nowhere':\n"
        "- custom:my.jsonl: there is no file /nowhere/my.jsonl",
    ),
    "a source that nobody knows": ({"data__sources": ("cocoa",)}, "no source 'cocoa', and no prepared"),
    "evaluation on nothing": ({"data__held_out": ()}, "config.data.held_out must name data or eval_every be"),
    "evaluation on what is trained on": (
        {"data__sources": ("vg", "coco"), "data__held_out": ("coco",)},
        "config.data.held_out names what is trained on: coco",
    ),
    "a source evaluated twice": (
        {"data__held_out": ("shapes", "shapes")},
        "config.data.held_out names a source twice: shapes, shapes",
    ),
    "fewer than no samples": ({"eval_samples": -1}, "config.eval_samples must not be negative, got -1"),
    "no share": ({"data__tolerance": 0.0}, "config.data.tolerance must be a share above 0, at most 1"),
    "no image in a row": (
        {"data__images_per_row": 0},
        "config.data.images_per_row must be at least 1, got 0",
    ),
    "packed epochs": (
        {"data__share_image": 4, "steps": 0, "epochs": 1.0},
        "config.data.share_image above 1 needs --config.steps=N --config.epochs=0., got 4",
    ),
    "no checkpoint to begin with": ({"init_from": "/nowhere"}, "no directory /nowhere"),
    "unknown system": (
        {"data__systems": ("mine",)},
        "config.data.systems names mine; there is training, inference in this version",
    ),
    "no tokenizer": ({"data__tokenizer": "/nowhere"}, "no tokenizer in /nowhere"),
    "buckets of another form": ({"data__buckets": (200, 8)}, "config.data.buckets must be a tuple of pairs"),
    "buckets of no size": ({"data__buckets": ((-1, 7),)}, "config.data.buckets must be a tuple of pairs"),
    "words for weights": ({"data__weights": ("a",)}, "config.data.weights must be a tuple of numbers"),
    "no system": ({"data__systems": ()}, "config.data.systems must be a tuple of strings"),
    "epochs without end": ({"steps": 0, "epochs": float("inf")}, "config.epochs must be finite"),
    "another share in the loss": (
        {"data__loss_per": "tokens"},
        "config.data.loss_per must be 'dialogue' or 'token', got 'tokens'",
    ),
    "too few embeddings": (
        {"model__decoder__vocab_size": 100},
        "the tokenizer has 512 tokens before <mask> and <pos>, the config's decoder.vocab_size is 100",
    ),
    "a model of other ids": (
        {"model__mask_token_id": 7},
        "<mask> and <pos> are (512, 513) in the tokenizer and (7, 513) in the config",
    ),
    "a model that can't be": (
        {"model__vision__image_size": 100},
        "image_size must be a multiple of 32",
    ),
}


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line, or the line and a list, that a start writes which is refused."""
    assert train.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line, *listed = captured.err.splitlines()
    assert line.startswith("error: ")
    assert all(entry.startswith("- ") for entry in listed)
    return captured.err.strip().removeprefix("error: ")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_in_one_line_before_anything_is_written(
    name: str, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, message = REFUSED[name]
    assert message in refusal(command(tmp_path / "run", **overrides), capsys)
    assert not (tmp_path / "run").exists()


def test_a_missing_or_wrong_config_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = f"--workdir={tmp_path / 'run'}"
    missing = refusal([f"--config={tmp_path / 'none.py'}", workdir], capsys)
    assert missing.startswith("cannot read the config: [Errno 2] No such file or directory: ")
    own = tmp_path / "own.py"
    own.write_text(
        "from configs import base\n\ndef get_config():\n    c = base.get_config()\n    c.leyers = 3\n"
    )
    assert refusal([f"--config={own}", workdir], capsys) == f"unknown key leyers in {own}:5"
    own.write_text("def get_config():\n    return {\n")
    assert refusal([f"--config={own}", workdir], capsys).startswith(f"{own}:2: SyntaxError: ")
    own.write_text(
        "from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({'steps': 1})\n"
    )
    assert refusal([f"--config={own}", workdir], capsys).startswith(
        "the configuration lacks: accumulation, b1"
    )
    tiny = f"--config={ROOT / 'configs' / 'tiny.py'}"
    assert refusal([tiny], capsys).startswith("usage: python -m osprey_jax.train")
    assert refusal([tiny, workdir, "--wrokdir=x"], capsys).startswith("Unknown command line flag 'wrokdir'")


def test_a_directory_of_another_run_is_refused_by_the_key_that_differs(
    finished: tuple, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = finished[0]
    other = refusal(command(workdir, model__decoder__ffn_dim=64), capsys)
    assert other == f"{workdir} holds another run: model.decoder.ffn_dim was 32, is 64"
    assert "seed was 0, is 3" in refusal(command(workdir, seed=3), capsys)
    exported = refusal(command(workdir / "export"), capsys)
    assert exported == f"{workdir / 'export'} is a checkpoint: give a run a directory of its own"


def test_a_directory_that_can_t_be_written_is_refused(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    refused = refusal(command(tmp_path / "file" / "run"), capsys)
    assert refused == f"cannot write to {tmp_path / 'file' / 'run'}: Not a directory"


def test_a_full_disk_is_refused_before_the_first_step(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=300_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused = refusal(command(tmp_path / "run", keep_checkpoints=2), capsys)
    assert re.match(
        rf"no space for checkpoints: {tmp_path}/run has 0.3 MB free, needed are \d\.\d MB", refused
    )
    # 10, 20, 30, 40 and, as the newest, 45 and 50.
    assert "of which 6 stay" in refusal(command(tmp_path / "run", keep_checkpoints=2, keep_every=10), capsys)


def test_what_an_interrupted_save_left_takes_no_space(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = tmp_path / "run" / "checkpoints" / ".5.incomplete"
    left.mkdir(parents=True)
    usage, there = shutil.disk_usage(tmp_path), []

    def measured(_: Path) -> object:
        there.append(left.exists())
        return usage._replace(free=0)

    monkeypatch.setattr(shutil, "disk_usage", measured)
    assert refusal(command(tmp_path / "run"), capsys).startswith("no space for checkpoints")
    assert there == [False]


def test_a_directory_with_nothing_to_begin_with_is_refused_by_what_was_looked_for(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tmp_path / "before"
    (before / "checkpoints" / ".5.incomplete").mkdir(parents=True)
    assert refusal(command(tmp_path / "run", init_from=before), capsys) == (
        f"{before} is neither a checkpoint nor a run that has saved one: "
        "it has no config.json, no export/ and nothing complete in checkpoints/"
    )
    assert not (tmp_path / "run").exists()


def test_a_model_without_its_runs_checkpoints_is_not_passed_off_as_this_runs(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "export").mkdir(parents=True)
    refused = refusal(command(tmp_path / "run"), capsys)
    assert refused == (
        f"{tmp_path}/run/export is a trained model, but its run's checkpoints are gone: move it away first"
    )


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("stage1", {"projector"}),
        ("stage2", {"extractor"}),
        ("stage3", {"projector", "extractor", "decoder"}),
        ("osprey_chat", {"projector", "extractor", "decoder"}),
        ("tpu_v4", {"projector", "extractor", "decoder"}),
        ("tpu_v5e:stage2", {"extractor"}),
    ],
)
def test_the_stages_train_their_parts_of_the_released_model_and_tell_what_data_to_get(
    name: str, parts: set[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file, colon, stage = name.partition(":")
    arguments = [f"--config={ROOT / 'configs' / file}.py{colon}{stage}", f"--workdir={tmp_path / 'run'}"]
    config, *_ = train_config.parse(arguments)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    _, state = train_step.make_state(config, from_config(config.model.to_dict()), mesh)
    assert set(state.trained) == set(state.mu) == set(state.nu) == parts
    assert set(state.frozen) == {"vision", "projector", "extractor", "decoder"} - parts
    assert state.params["decoder"]["layers"]["mlp"]["up_proj"]["kernel"].shape == (32, 4096, 11008)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == pytest.approx(6.98e9, rel=0.01)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((state.trained, state.mu, state.nu))} == {"float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.frozen)} == {"bfloat16"}
    one = ["--config.mesh.data=1", "--config.mesh.fsdp=1", f"--config.data.root={tmp_path}"]
    first, *lacking = refusal([*arguments, *one], capsys).split("\n- ")
    assert first == f"data is missing under config.data.root, which is '{tmp_path}':"
    assert [line.partition(":")[0] for line in lacking] == list(config.data.sources)
    assert all(f"there is no {tmp_path}/" in line and len(line) > 100 for line in lacking)


def test_fine_tuning_asks_for_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [f"--config={ROOT / 'configs' / 'finetune_custom'}.py", f"--workdir={tmp_path / 'run'}"]
    assert refusal(arguments, capsys).startswith("ValueError: name your file behind a colon: --config=")
    config, *_ = train_config.parse([f"{arguments[0]}:mine.jsonl", arguments[1]])
    assert config.data.sources == (f"custom:{Path('mine.jsonl').absolute()}",)


def test_help_teaches_and_begins_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "python -m osprey_jax.train --config=configs/tiny.py" in out
    assert "configs/base.py" in out


def keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield from keys(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [prefix + name]


def test_every_key_of_the_configuration_is_read_and_explained() -> None:
    config, *_ = train_config.parse([f"--config={ROOT / 'configs' / 'tiny.py'}", "--workdir=x"])
    used = set()
    for name in ("train", "train_data", "train_step", "evaluation"):
        for node in ast.walk(ast.parse((ROOT / "osprey_jax" / f"{name}.py").read_text())):
            used |= {node.attr} if isinstance(node, ast.Attribute) else set()
            used |= {node.value} if isinstance(node, ast.Constant) else set()
    # The model is read whole, by `from_config`, and so is the mesh, by `make_mesh`.
    own = [key for key in keys(config) if not key.startswith(("model.", "mesh."))]
    assert len(own) > 20
    assert [key for key in own if key.split(".")[-1] not in used] == []
    lines = [line.strip() for line in (ROOT / "configs" / "base.py").read_text().splitlines()]
    for key in {key.split(".")[0] for key in keys(config)} - {"data"}:
        (number,) = (i for i, line in enumerate(lines) if line.startswith(f"config.{key} = "))
        while lines[number].startswith("config."):
            number -= 1
        assert lines[number].startswith("#"), key
