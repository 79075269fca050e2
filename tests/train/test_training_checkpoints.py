"""Saves that are cut off, refused by the disk, or restored onto other devices; and which ones stay."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import base
from data_pipelines.shapes.tokenizer import train_tokenizer
from osprey_jax import train, training_checkpoints
from osprey_jax.config import OspreyConfig, from_config, tiny
from osprey_jax.prompt import Tokenizer
from osprey_jax.train_step import make_mesh, make_state
from osprey_jax.training_checkpoints import TrainingCheckpoints, kept, starting_point
from tests.train.runs import FEW, SMALL, Command, newest, rows

Make = Callable[..., TrainingCheckpoints]
CONFIG = tiny()

# ml_collections loads a config file by a method that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(directory)
    tokenizer = Tokenizer.load(directory)

    def made(directory: Path, **options: Any) -> TrainingCheckpoints:
        return TrainingCheckpoints(
            directory, **{"keep": 9, "config": CONFIG, "tokenizer": tokenizer, **options}
        )

    return made


def trees(step: int) -> dict[str, Any]:
    values = np.random.default_rng(step).normal(size=(64, 64)).astype(np.float32)
    return {"params": {"kernel": jax.device_put(values)}, "optimizer": {"mu": jax.device_put(-values)}}


def shapes(arrays: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)


def saved(checkpoints: TrainingCheckpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, trees(step), b"{}")
    checkpoints.wait()


def test_kept_are_the_newest_and_every_so_many() -> None:
    steps = [5, 10, 15, 18, 20, 25, 30]
    assert kept(steps, keep=2, every=0) == [25, 30]
    assert kept(steps, keep=2, every=10) == [10, 20, 25, 30]
    assert kept(steps, keep=1, every=15) == [15, 30]
    assert kept([], keep=2, every=5) == []


def test_the_others_go_when_a_newer_one_is_there(make: Make, tmp_path: Path) -> None:
    checkpoints = make(tmp_path, keep=1, keep_every=4)
    saved(checkpoints, 2, 4, 6, 8, 9, 10)
    assert checkpoints.steps() == [4, 8, 10]
    assert {path.name for path in tmp_path.iterdir()} == {"4", "8", "10"}


def test_a_checkpoint_cut_at_any_byte_of_any_file_leaves_the_one_before(make: Make, tmp_path: Path) -> None:
    """What a kill can't leave, as the name comes last; a disk without power, a copy or a full bucket can."""
    whole = make(tmp_path / "whole")
    saved(whole, 1, 2)
    rng = np.random.default_rng(0)
    newest_one = tmp_path / "whole" / "2"
    files = sorted(path.relative_to(newest_one) for path in newest_one.rglob("*") if path.is_file())
    assert len(files) > 10
    target, expected = shapes(trees(1)), trees(1)
    fell_back = 0
    for number, file in enumerate(files):
        directory = tmp_path / f"cut-{number}"
        shutil.copytree(tmp_path / "whole", directory)
        path = directory / "2" / file
        size = path.stat().st_size
        os.truncate(path, rng.integers(size) if size else 0)
        restored = make(directory).restore_newest(target, report=lambda _: None)
        assert restored is not None
        # Some of Orbax's files tell nothing that is needed: then all is there and checked.
        expected = trees(restored.step)
        fell_back += restored.step == 1
        for name, tree in expected.items():
            for leaf, value in tree.items():
                np.testing.assert_array_equal(restored.arrays[name][leaf], value, err_msg=str(file))
        assert (directory / "2.damaged").exists() == (restored.step == 1)
    assert fell_back > len(files) // 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("place", ["write_description", "_write_manifest", "persist", "save_trees"])
def test_a_save_that_the_disk_refuses_names_the_path_and_leaves_the_one_before(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, place: str
) -> None:
    checkpoints = make(tmp_path)
    saved(checkpoints, 1)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(training_checkpoints, place, refuse)
        with pytest.raises(OSError, match=f"cannot write {tmp_path}/2: .*{os.strerror(number)}"):
            saved(checkpoints, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"1"}
    restored = checkpoints.restore_newest(shapes(trees(1)), report=lambda _: None)
    assert restored is not None
    np.testing.assert_array_equal(restored.arrays["params"]["kernel"], trees(1)["params"]["kernel"])


def test_a_disk_that_fills_up_stops_the_training_with_what_was_saved(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = training_checkpoints._write_manifest

    def refuse(directory: Path, sums: Any) -> None:
        if directory.name == ".4.incomplete":
            raise OSError(errno.ENOSPC, "No space left on device", str(directory / "manifest.json"))
        write(directory, sums)

    monkeypatch.setattr(training_checkpoints, "_write_manifest", refuse)
    workdir = tmp_path / "run"
    arguments = command(workdir, **{**FEW, "steps": 8, "checkpoint_every": 2})
    assert train.main(arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: cannot write {workdir}/checkpoints/4: ")
    assert "No space left on device" in line
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"2"}
    monkeypatch.undo()
    assert train.main(arguments) == 0
    assert newest(workdir) == 8
    assert [row["step"] for row in rows(workdir)] == list(range(1, 9))


def test_a_state_saved_on_eight_devices_is_the_same_on_other_meshes(make: Make, tmp_path: Path) -> None:
    config = from_config({**CONFIG.to_dict(), **_small(CONFIG)})
    settings = base.get_config()
    settings.update({"frozen_dtype": "float32", "seed": 3, "batch_size": 8, "mesh": {"data": 1, "fsdp": 8}})
    create, _ = make_state(settings, config, make_mesh(settings))
    arrays = create().to_arrays()
    checkpoints = make(tmp_path)
    checkpoints.save(1, arrays, b"{}")
    checkpoints.wait()
    expected = jax.tree.map(np.asarray, arrays)
    for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 1, "tensor": 1}):
        settings.mesh.update(sizes)
        mesh = make_mesh(settings)
        _, abstract = make_state(settings, config, mesh)
        restored = checkpoints.restore(1, abstract.to_arrays())
        jax.tree.map(np.testing.assert_array_equal, restored.arrays, expected)
        jax.tree.map(
            lambda leaf, target: leaf.sharding == target.sharding or pytest.fail(f"{leaf.sharding}"),
            restored.arrays,
            abstract.to_arrays(),
        )


def _small(config: OspreyConfig) -> dict[str, Any]:
    """The sizes of the small run, every one of which eight divides."""
    values = config.to_dict()
    for key, value in SMALL.items():
        if key.startswith("model."):
            *parents, name = key.split(".")[1:]
            node = values
            for parent in parents:
                node = node[parent]
            node[name] = value
    return values


def test_a_run_stands_for_its_export_or_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (5, 20, 10):
        (tmp_path / "checkpoints" / str(step) / "params").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".30.incomplete").mkdir()
    (tmp_path / "checkpoints" / "25.damaged").mkdir()
    assert starting_point(tmp_path) == tmp_path / "checkpoints" / "20"
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    assert starting_point(tmp_path) == tmp_path / "export"
    assert starting_point(tmp_path / "export") == tmp_path / "export"
