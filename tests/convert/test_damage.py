"""Damaged checkpoints: one line that names the directory and what is unreadable, and no noise after it."""

import gc
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from osprey_jax import checkpoint, convert
from osprey_jax.config import tiny
from osprey_jax.models.osprey import abstract_params
from tests.convert.releases import FileTokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "checkpoint"
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), abstract_params(tiny()))
    checkpoint.save_params(directory, params, tiny(), FileTokenizer(b"pieces"))
    return directory


def data(params: Path) -> Path:
    """The file of all but the smallest leaves."""
    return max((path for path in params.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated data": (lambda p: halve(data(p)), r"\w+(/\w+)+: .*Requested byte range .* not valid"),
    "no data": (lambda p: data(p).unlink(), r"\w+(/\w+)+: .*size of 0 bytes, but expected"),
    "truncated index": (lambda p: halve(p / "state" / "manifest.ocdbt"), r".*manifest\.ocdbt.*Length"),
    "truncated node": (
        lambda p: halve(*(p / "state" / "d").iterdir()),
        ".*Requested byte range .* not valid",
    ),
    "truncated names": (lambda p: halve(p / "state" / "_METADATA"), "params/state/_METADATA: Unterminated"),
    "truncated placement": (lambda p: halve(p / "state" / "_sharding"), "params/state/_sharding: "),
    "truncated header": (lambda p: halve(p / "_CHECKPOINT_METADATA"), "params/_CHECKPOINT_METADATA: "),
    "no arrays": (lambda p: shutil.rmtree(p / "state"), ".*No such file .*params/state"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_and_quiet(
    whole: Path,
    tmp_path: Path,
    damage: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory = tmp_path / "checkpoint"
    shutil.copytree(whole, directory)
    change, reason = DAMAGES[damage]
    change(directory / "params")
    expected = rf"^the checkpoint {directory} is damaged: {reason}[^\n]*$"
    with caplog.at_level(logging.WARNING):
        with pytest.raises(ValueError, match=expected) as raised:
            checkpoint.load_params(directory, abstract_params(tiny()))
        assert "tensorstore_spec" not in str(raised.value)
        del raised
        gc.collect()  # where a task was abandoned, it complains now
        assert capfd.readouterr().err == ""
        assert convert.main(["--to-torch", str(directory), str(tmp_path / "out")]) == 2
        gc.collect()
    *progress, error = capfd.readouterr().err.splitlines()
    assert error.startswith(f"error: the checkpoint {directory} is damaged: ")
    assert all(not line or line.startswith("writing: ") for line in progress)
    assert not caplog.records
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
