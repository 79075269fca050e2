"""Kills, a damaged checkpoint and a signal to stop: the losses are those of a run without them."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.train.runs import STEPS, Command, Start, learned, leaves, newest, rows, steps, wait_until


def kill_when(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    wait_until(condition, process)
    process.kill()
    process.communicate()


def finish(process: subprocess.Popen) -> str:
    """What the process writes to stderr until its end, which must be a good one."""
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return err


def is_saving(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob(".*.incomplete"))


@pytest.fixture(scope="session")
def disturbed(
    tmp_path_factory: pytest.TempPathFactory, command: Command, start: Start
) -> tuple[Path, dict[str, str]]:
    """A run that was killed in a step, killed in a save, told to stop, and had its newest checkpoint damaged.

    Gives its directory and what its last two starts wrote.
    """
    workdir = tmp_path_factory.mktemp("disturbed") / "run"
    checkpoints, said = workdir / "checkpoints", {}

    kill_at = np.random.default_rng().integers(6, 18)
    kill_when(start(command(workdir)), lambda: steps(workdir) >= kill_at)
    kill_when(start(command(workdir)), lambda: newest(workdir) >= 15 and is_saving(workdir))

    before = newest(workdir)
    process = start(command(workdir))
    wait_until(lambda: newest(workdir) > before, process)
    process.send_signal(signal.SIGTERM)
    said["out"], _ = process.communicate(timeout=200)
    said["status"], said["stopped at"] = str(process.returncode), str(newest(workdir))

    (path,) = (checkpoints / said["stopped at"] / "params" / "state" / "d").iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    said["fallen back"] = finish(start(command(workdir)))
    return workdir, said


def test_losses_after_kills_and_damage_are_bit_identical_to_an_undisturbed_runs(
    finished: tuple, disturbed: tuple
) -> None:
    assert learned(disturbed[0]) == learned(finished[0])


def test_the_last_parameters_and_moments_are_too(finished: tuple, disturbed: tuple) -> None:
    for part in ("params", "optimizer"):
        found, expected = (
            leaves(run[0] / "checkpoints" / str(STEPS) / part) for run in (disturbed, finished)
        )
        for path, leaf in expected.items():
            np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_every_step_is_in_the_metrics_once(finished: tuple, disturbed: tuple) -> None:
    for workdir in (finished[0], disturbed[0]):
        assert [row["step"] for row in rows(workdir)] == list(range(1, STEPS + 1))


def test_sigterm_saves_exits_with_status_0_and_says_how_to_go_on(disturbed: tuple) -> None:
    said = disturbed[1]
    assert said["status"] == "0"
    step = said["stopped at"]
    assert said["out"] == f"stopped by SIGTERM after step {step}; the same command goes on from there\n"
    assert int(step) < STEPS


def test_a_damaged_newest_checkpoint_is_told_and_set_aside(disturbed: tuple) -> None:
    workdir, said = disturbed
    (warning,) = [line for line in said["fallen back"].splitlines() if line.startswith("warning: ")]
    assert f"{workdir / 'checkpoints' / said['stopped at']} is damaged: " in warning
    assert (workdir / "checkpoints" / f"{said['stopped at']}.damaged").is_dir()


def test_the_newest_checkpoints_stay_and_nothing_incomplete_does(finished: tuple, disturbed: tuple) -> None:
    for workdir in (finished[0], disturbed[0]):
        names = {path.name for path in (workdir / "checkpoints").iterdir() if "damaged" not in path.name}
        assert names == {"40", "45", "50"}
