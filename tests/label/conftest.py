"""A stand-in for the model, and the command with it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from osprey_jax.label import command, plan
from tests.label.data_files import coco
from tests.label.stand_in import UNIT_IMAGES, StandIn

Run = Callable[..., int]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    model = StandIn()
    monkeypatch.setattr(command, "Osprey", model)
    monkeypatch.setattr(plan, "UNIT_IMAGES", UNIT_IMAGES)
    return model


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a checkpoint's directory and a data set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    coco(tmp_path)
    return tmp_path


@pytest.fixture
def run(stand_in: StandIn) -> Run:
    def started(*options: object, output: str = "out", masks: object = "coco.json") -> int:
        data = ["--images", "images", "--masks", masks] if masks is not None else []
        given = ["--checkpoint", "checkpoint", *data, "--output", output, *options]
        return command.main(list(map(str, given)))

    return started


def lines(output: str | Path, kind: str = "labels") -> list[dict]:
    """All lines of an output, shard after shard."""
    paths = sorted(Path(output).glob(f"{kind}-*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def contents(output: str | Path) -> dict[str, bytes]:
    """Every file of an output; but for the lock, which is empty, and the setting's paths."""
    paths = [path for path in Path(output).rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}
