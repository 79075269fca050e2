"""Two processes on one machine train as one: over loopback, each on devices and with samples of its own."""

import json
import re
import signal
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

from osprey_jax import cluster
from tests.train.runs import Command, Start, learned, leaves, newest, rows, steps, wait_until

STEPS = 6
PAIR = {
    "steps": STEPS,
    "checkpoint_every": 3,
    "eval_every": 3,
    "eval_batches": 1,
    "trained": ("projector/.*", "extractor/.*"),
    "mesh__data": 2,
    "mesh__fsdp": 2,
}
"""Copies of the parameters lie on both processes, their parts inside each."""
ROUNDING = 1e-5
"""Of float32 sums over other numbers of devices: they differ by a few 1e-7 a step. Other samples, or the
same ones twice, would move a loss by 1e-2 and more."""


def start_pair(start: Start, arguments: list[str], *, devices: int = 2) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    return [start(arguments, devices=devices, **told, JAX_PROCESS_ID=str(number)) for number in range(2)]


def ends(pair: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Status, result and what else was said of both."""
    said = [process.communicate(timeout=300) for process in pair]
    # Gloo, the CPU's network, tells of its connections on stdout.
    results = [re.sub(r"\[Gloo\].*\n|.* peer ranks is : \d+\n", "", out) for out, _ in said]
    return [(p.returncode, out, err) for p, out, (_, err) in zip(pair, results, said, strict=True)]


@pytest.fixture(scope="module")
def together(
    tmp_path_factory: pytest.TempPathFactory, command: Command, start: Start
) -> tuple[Path, list[tuple[int, str, str]]]:
    """A run of two processes from its first step to its last."""
    workdir = tmp_path_factory.mktemp("together") / "run"
    ended = ends(start_pair(start, command(workdir, **PAIR)))
    assert [status for status, *_ in ended] == [0, 0], ended
    return workdir, ended


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, command: Command, start: Start) -> Path:
    """The same run of one process on as many devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    process = start(command(workdir, **PAIR), devices=4)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return workdir


def assert_close(found: list[dict], expected: list[dict]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert [row["tokens"] for row in found] == [row["tokens"] for row in expected]
    for name in ("loss", "grad_norm", "held_out_loss"):
        values = ([row[name] for row in rows if name in row] for rows in (found, expected))
        np.testing.assert_allclose(*values, rtol=ROUNDING, err_msg=name)


def test_losses_are_those_of_one_process_on_the_same_batches(together: tuple, alone: Path) -> None:
    assert_close(learned(together[0]), learned(alone))
    assert sum("held_out_loss" in row for row in learned(alone)) == 2


def test_each_process_reads_half_of_every_batch_and_says_where_it_is(together: tuple) -> None:
    """With the losses of whole batches, which two equal halves would not have."""
    states = [
        json.loads((together[0] / "checkpoints" / str(STEPS) / "loader" / str(number)).read_text())
        for number in range(2)
    ]
    assert [state["identity"]["host"] for state in states] == [0, 1]
    assert [state["identity"]["num_hosts"] for state in states] == [2, 2]
    assert [state["place"] + state["taken"] for state in states] == [STEPS * 4, STEPS * 4]


def test_the_first_process_alone_tells_of_steps_and_of_the_result(together: tuple) -> None:
    workdir, ((_, out, err), (_, other_out, other_err)) = together
    assert out.startswith(f"trained for {STEPS} steps; ")
    assert f"step 0 of {STEPS}" in err
    assert f"step {STEPS}/{STEPS} · loss" in err
    assert other_out == ""
    assert "step 0 of" not in other_err
    assert "· loss" not in other_err
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert [row["step"] for row in rows(workdir)] == list(range(1, STEPS + 1))
    assert {path.name for path in workdir.iterdir()} == {
        "checkpoints",
        "export",
        "metrics.jsonl",
        "tensorboard",
        "train_config.json",
    }


def test_one_process_goes_on_from_what_two_have_saved_with_equal_arrays(
    together: tuple, alone: Path, command: Command, start: Start, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    checkpoints = workdir / "checkpoints"
    checkpoints.mkdir(parents=True)
    (together[0] / "checkpoints" / "3").rename(checkpoints / "3")
    for name in ("train_config.json", "metrics.jsonl"):
        (workdir / name).write_bytes((together[0] / name).read_bytes())
    before = leaves(checkpoints / "3" / "params")
    process = start(command(workdir, **PAIR | {"mesh__data": 1, "mesh__fsdp": 1}), devices=1)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"step 3 of {STEPS}" in err
    assert "warning" not in err
    assert_close(learned(workdir), learned(alone))
    # What is frozen went through the one process unchanged.
    after = leaves(checkpoints / str(STEPS) / "params")
    frozen = [path for path in before if not path.startswith(("projector/", "extractor/"))]
    for path in frozen:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)


@pytest.mark.slow
def test_a_signal_to_one_stops_both_after_the_same_step_and_a_kill_of_one_ends_the_other(
    command: Command, start: Start, tmp_path: Path
) -> None:
    long = {**PAIR, "steps": 60, "eval_every": 0, "checkpoint_every": 5}
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    for status, *said in ends(start_pair(start, command(whole, **long))):
        assert status == 0, said
    for number, victim in enumerate((1, 0)):
        before = steps(workdir)
        pair = start_pair(start, command(workdir, **long))
        wait_until(lambda before=before: steps(workdir) > before + 6, pair[0])
        pair[victim].send_signal(signal.SIGTERM)
        ended = ends(pair)
        assert [status for status, *_ in ended] == [0, 0], ended
        assert f"after step {newest(workdir)}; the same command goes on from there" in ended[0][1]
        assert steps(workdir) == newest(workdir), "the step in flight ends, and is saved"

        before = steps(workdir)
        pair = start_pair(start, command(workdir, **long))
        wait_until(lambda before=before: steps(workdir) > before + 6, pair[0])
        pair[victim].kill()
        ended = ends(pair)
        assert ended[victim][0] == -signal.SIGKILL
        assert ended[1 - victim][0] not in (0, 2), (number, ended)
    # What one of them finds damaged both leave aside.
    for path in (workdir / "checkpoints" / str(newest(workdir)) / "params" / "state" / "d").iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    for status, *said in ends(start_pair(start, command(workdir, **long))):
        assert status == 0, said
        assert "is damaged: " in said[1]
    assert learned(workdir) == learned(whole)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID is set, but not JAX_COORDINATOR_ADDRESS, JAX_NUM_PROC"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers: ",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID must be from 0 to 1, got 2",
        ),
    ],
)
def test_half_told_clusters_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster.join(environ)


@pytest.mark.parametrize("environ", [{}, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}])
def test_a_lone_process_joins_nothing(environ: dict[str, str]) -> None:
    cluster.join({"JAX_PLATFORMS": "cpu", **environ})
    assert not cluster.is_several()
    assert cluster.is_first()
