"""What is told of a step for chips elsewhere; fake CPU devices stand for the chips."""

import re
from pathlib import Path

import jax
import pytest

from osprey_jax import compile_topology, train
from osprey_jax.topologies import Topology
from tests.train.runs import SMALL, Command

# ml_collections loads a config file by a method that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

GIB = 2**30


def asked(command: Command, **overrides: object) -> list[str]:
    arguments = command(Path("unused"), **{"mesh__data": 1, **overrides})
    return ["--compile_topology=here" if each.startswith("--workdir") else each for each in arguments]


@pytest.fixture
def chips(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How many chips there are, and how many GiB each has."""
    sizes = [4, 1.0]

    def open_topology(name: str) -> Topology:
        return Topology(name, jax.devices()[: int(sizes[0])], sizes[1] * GIB, most=sizes[1] * GIB)

    monkeypatch.setattr(compile_topology, "open_topology", open_topology)
    return sizes


def test_a_step_that_fits_is_told_by_kind_with_its_collectives(
    command: Command, chips: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(asked(command, mesh__fsdp=4, remat="full")) == 0
    out, err = capsys.readouterr()
    assert not err
    first, *lines, last = out.splitlines()
    assert first == "here: 4 chips of 1.00 GiB, mesh {'data': 1, 'fsdp': 4, 'tensor': 1}, batch 8"
    sizes = {
        line.split()[0]: float(line.split()[1])
        for line in lines
        if "GiB a chip" in line and "a step" not in line
    }
    assert {"parameters", "optimizer", "batch", "activations", "temporaries"} <= sizes.keys()
    # Two moments of four bytes for each parameter of four.
    assert sizes["optimizer"] == pytest.approx(2 * sizes["parameters"], abs=0.0011)
    assert any(re.match(r" +all-gather +\d+ a step", line) for line in lines)
    assert any("TFLOP a step" in line for line in lines)
    total = float(re.fullmatch(r"fits: ([\d.]+) of 1.00 GiB a chip", last)[1])
    assert total == pytest.approx(sum(sizes.values()), abs=0.011)


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        ({"remat": "full"}, "compute a batch in more parts: --config.accumulation=2"),
    ],
)
def test_a_step_that_does_not_fit_is_told_with_the_knob_to_turn(
    overrides: dict, advice: str, command: Command, chips: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    chips[1] = 0.001
    assert train.main(asked(command, mesh__fsdp=2, **overrides)) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"doesn't fit: [\d.]+ of 0.00 GiB a chip; {re.escape(advice)}", last)


def test_a_slice_that_is_too_small_for_the_mesh_is_one_clear_line(
    command: Command, chips: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(asked(command, mesh__fsdp=16)) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "a mesh of data=1, fsdp=16, tensor=1 needs 16 devices, there are 4" in err
    assert SMALL["batch_size"] == 8
    assert train.main(asked(command, mesh__fsdp=4, batch_size=6)) == 2
    assert "config.batch_size 6 doesn't divide by 4" in capsys.readouterr().err
