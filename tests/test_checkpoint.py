"""Checkpoints of a training: whole or not there, checked when read, the newest ones kept."""

import gc
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from osprey_jax import checkpoint, sharding, training_checkpoints
from osprey_jax.config import tiny
from osprey_jax.training_checkpoints import TrainingCheckpoints


class WordList:
    """Stands for a tokenizer."""

    def save(self, directory: Path) -> None:
        (Path(directory) / "tokenizer.json").write_text("[]")


def arrays(step: int) -> dict:
    """Trees of the dtypes that a state has; nothing about them repeats from step to step."""
    rng = np.random.default_rng(step)
    kernel = jnp.asarray(rng.normal(size=(64, 32)).astype(np.float32))
    return {
        "params": {"decoder": {"kernel": kernel, "scale": kernel[0].astype(jnp.bfloat16)}},
        "optimizer": {"mu": {"decoder": {"kernel": kernel * 2}}, "nu": {"decoder": {"kernel": kernel**2}}},
    }


def structs() -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays(0))


def run(directory: Path, *, keep: int = 3) -> TrainingCheckpoints:
    return TrainingCheckpoints(directory, keep=keep, config=tiny(), tokenizer=WordList())


def save(checkpoints: TrainingCheckpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, arrays(step), b"place %d" % step)
    checkpoints.wait()


def no_report(message: str) -> None:
    raise AssertionError(message)


def assert_equal(found: dict, expected: dict) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    save(run(tmp_path / "checkpoints"), 7, 11)
    restored = run(tmp_path / "checkpoints").restore_newest(structs(), report=no_report)
    assert restored is not None
    assert (restored.step, restored.loader_states) == (11, [b"place 11"])
    assert_equal(restored.arrays, arrays(11))


def test_a_new_run_has_nothing_to_restore(tmp_path: Path) -> None:
    checkpoints = run(tmp_path / "checkpoints")
    checkpoints.clean_up()
    assert checkpoints.steps() == []
    assert checkpoints.restore_newest(structs(), report=no_report) is None


def test_the_newest_stay_and_steps_are_numbers_not_names(tmp_path: Path) -> None:
    checkpoints = run(tmp_path, keep=2)
    save(checkpoints, 8, 9, 10, 100)
    assert checkpoints.steps() == [10, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "100"]


def test_a_training_checkpoint_is_a_checkpoint(tmp_path: Path) -> None:
    save(run(tmp_path), 5)
    assert checkpoint.load_config(tmp_path / "5") == tiny()
    shapes = checkpoint.saved_shapes(tmp_path / "5")
    assert_equal(checkpoint.load_params(tmp_path / "5", shapes), arrays(5)["params"])
    assert dict(checkpoint.load_leaves(tmp_path / "5")).keys() == checkpoint.flatten(shapes).keys()
    assert (tmp_path / "5" / "tokenizer.json").is_file()


def test_arrays_may_be_donated_while_they_are_written(tmp_path: Path) -> None:
    checkpoints = run(tmp_path, keep=9)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: (x * 1.5 + 1).astype(x.dtype), tree), donate_argnums=0)
    state, expected = arrays(0), {}
    for number in range(1, 5):
        expected[number] = jax.tree.map(np.array, state)
        checkpoints.save(number, state, b"")
        for _ in range(5):
            state = step(state)
    checkpoints.wait()
    for number, tree in expected.items():
        assert_equal(checkpoints.restore(number, structs()).arrays, tree)


def test_arrays_come_back_in_the_shardings_asked_for(tmp_path: Path) -> None:
    save(run(tmp_path), 1)
    place = NamedSharding(sharding.make_mesh(fsdp=4, tensor=2), sharding.partition_spec(("embed", "ffn")))
    whole = NamedSharding(place.mesh, sharding.partition_spec(()))

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place if len(leaf.shape) == 2 else whole)

    restored = run(tmp_path).restore(1, jax.tree.map(placed, structs()))
    kernel = restored.arrays["params"]["decoder"]["kernel"]
    assert kernel.sharding == place
    assert kernel.addressable_shards[0].data.shape == (16, 16)
    assert_equal(restored.arrays, arrays(1))


def array_file(directory: Path) -> Path:
    """The file that is read: Orbax merges what each process wrote, small arrays by copying."""
    (path,) = (directory / "state" / "d").iterdir()
    return path


def flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit in the parameters": (lambda d: flip(array_file(d / "params")), ""),
    "a flipped bit in the moments": (lambda d: flip(array_file(d / "optimizer")), ""),
    "a truncated array file": (lambda d: truncate(array_file(d / "optimizer")), ""),
    "no array files": (lambda d: shutil.rmtree(d / "params"), ""),
    "an emptied array file": (lambda d: array_file(d / "params").write_bytes(b""), ""),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "No such file"),
    "a truncated manifest": (lambda d: truncate(d / "manifest.json"), ""),
    "a changed loader's place": (lambda d: flip(d / "loader" / "0"), "loader/0 has changed"),
    "a changed config": (lambda d: flip(d / "config.json"), "config.json has changed"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "No such file"),
}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    save(run(directory), 20, 30)
    return directory


@pytest.fixture
def _collected() -> Iterator[None]:
    """Has Orbax's coroutines, abandoned where a read fails, complain in the test that they belong to."""
    yield
    gc.collect()


reads_damage = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@reads_damage
@pytest.mark.usefixtures("_collected")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(
    two_steps: Path, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(two_steps, tmp_path / "run")
    change, reason = DAMAGES[damage]
    change(tmp_path / "run" / "30")
    checkpoints, told = run(tmp_path / "run"), []
    restored = checkpoints.restore_newest(structs(), report=told.append)
    assert restored is not None
    assert (restored.step, restored.loader_states) == (20, [b"place 20"])
    assert_equal(restored.arrays, arrays(20))
    (message,) = told
    assert f"{tmp_path / 'run' / '30'} is damaged: " in message
    assert reason in message
    assert message.endswith("called 30.damaged, going on from step 20")
    # Out of the way: the step can be written anew, and counts no more among those that stay.
    assert checkpoints.steps() == [20]
    save(checkpoints, 30)
    assert_equal(checkpoints.restore(30, structs()).arrays, arrays(30))


@reads_damage
@pytest.mark.usefixtures("_collected")
def test_every_bit_of_a_saved_array_counts(two_steps: Path, tmp_path: Path) -> None:
    """Uncompressed data has no checksum in the format itself; the manifest's is what finds these."""
    for number, place in enumerate((0.3, 0.6, 0.9)):
        shutil.copytree(two_steps, tmp_path / str(number))
        for name in ("params", "optimizer"):
            flip(array_file(tmp_path / str(number) / "30" / name), place)
        with pytest.raises(ValueError, match=r"30 is damaged"):
            run(tmp_path / str(number)).restore(30, structs())


@reads_damage
@pytest.mark.usefixtures("_collected")
def test_nothing_is_moved_where_all_are_damaged(two_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps, tmp_path / "run")
    for step in ("20", "30"):
        (tmp_path / "run" / step / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"none of the checkpoints in .* can be restored.*30 is.*20 is"):
        run(tmp_path / "run").restore_newest(structs(), report=no_report)
    assert run(tmp_path / "run").steps() == [20, 30]


def test_a_save_that_was_cut_off_is_no_checkpoint_and_is_removed(two_steps: Path, tmp_path: Path) -> None:
    shutil.copytree(two_steps, tmp_path / "run")
    (tmp_path / "run" / "30").rename(tmp_path / "run" / ".30.incomplete")
    checkpoints = run(tmp_path / "run")
    assert checkpoints.steps() == [20]
    checkpoints.clean_up()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["20"]


def test_a_save_has_its_name_only_when_all_of_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, release = threading.Event(), threading.Event()
    original = training_checkpoints._write_manifest

    def held(*args: object) -> None:
        original(*args)
        written.set()
        release.wait(60)

    monkeypatch.setattr(training_checkpoints, "_write_manifest", held)
    checkpoints = run(tmp_path)
    checkpoints.save(3, arrays(3), b"")
    assert written.wait(60)
    assert checkpoints.steps() == []
    assert [path.name for path in tmp_path.iterdir()] == [".3.incomplete"]
    release.set()
    checkpoints.wait()
    assert checkpoints.steps() == [3]


def test_a_failed_save_leaves_the_one_before_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = run(tmp_path, keep=1)
    save(checkpoints, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(training_checkpoints, "_write_manifest", full)
        checkpoints.save(2, arrays(2), b"")
        with pytest.raises(OSError, match=rf"cannot write {tmp_path}/2: .*No space left on device"):
            checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    save(checkpoints, 2)
    assert checkpoints.steps() == [2]


def test_the_manifest_names_every_leaf_and_file(two_steps: Path) -> None:
    manifest = json.loads((two_steps / "30" / "manifest.json").read_text())
    expected = [f"params/{path}" for path in checkpoint.flatten(arrays(0)["params"])]
    expected += [f"optimizer/{path}" for path in checkpoint.flatten(arrays(0)["optimizer"])]
    assert sorted(manifest["arrays"]) == sorted(expected)
    assert sorted(manifest["files"]) == ["config.json", "loader/0", "tokenizer.json"]
