"""What of a checkpoint counts, and how one that is none is refused."""

import json
import shutil
from pathlib import Path

import pytest

from osprey_jax.label.output import RUN
from osprey_jax.label.setting import model_version
from tests.label.conftest import Run, contents
from tests.label.stand_in import StandIn

CONFIG = Path("checkpoint/config.json")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--checkpoint", "images"], "images is not an osprey-jax checkpoint: it has no config.json"),
        (["--checkpoint", "nowhere"], "no directory nowhere"),
        (["--quantize", "int4"], "checkpoint holds weights quantised as 'int8'"),
    ],
)
def test_what_cant_be_loaded_is_refused_at_once(
    options: list[str],
    told: str,
    run: Run,
    stand_in: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    CONFIG.write_text('{"quantization": "int8"}')
    monkeypatch.setattr("osprey_jax.label.command.open_input", lambda **_: pytest.fail("masks were read"))
    assert run(*options) == 2
    assert told in capsys.readouterr().err
    assert stand_in.loads == []
    assert not Path("out").exists()


def test_parameters_that_cant_be_read_leave_no_output(
    run: Run, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise ValueError("the checkpoint is damaged")

    monkeypatch.setattr(stand_in, "load", load)
    assert run() == 2
    assert not Path("out").exists()


@pytest.mark.parametrize(("first", "second"), [([], ["--quantize", "int8"]), (["--quantize", "int8"], [])])
def test_naming_the_scheme_that_a_checkpoint_has_changes_nothing(
    first: list[str], second: list[str], run: Run
) -> None:
    CONFIG.write_text('{"quantization": "int8"}')
    assert run(*first) == 0
    before = contents("out")
    assert json.loads(before[RUN])["setting"]["prompt"]["quantize"] == "int8"
    assert run(*second) == 0
    assert contents("out") == before
    assert run("--quantize", "int8_dynamic") == 2


def test_a_models_version_is_of_what_answers_depend_on() -> None:
    version = model_version("checkpoint")
    Path("checkpoint/notes.txt").write_text("to read later")
    for name in ("optimizer", "loader"):
        Path("checkpoint", name).mkdir()
        Path("checkpoint", name, "0").write_bytes(b"state")
    shutil.copytree("checkpoint", "copy")
    assert model_version("checkpoint") == model_version("copy") == version
    found = {version}
    for name in ("config.json", "tokenizer.model", "params/d/a1"):
        path = Path("checkpoint", name)
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as file:
            file.write(b" ")
        found.add(model_version("checkpoint"))
    assert len(found) == 4
