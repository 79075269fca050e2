"""Dozens of kills in starts, restores, steps and saves, on changing numbers of devices: the losses stay.

A kill is aimed at a phase of the program and counted in the one that its traces show it hit.
"""

import collections
import secrets
import signal
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.train.runs import Command, Start, learned, newest, rows, steps, wait_until

pytestmark = pytest.mark.slow

STEPS = 240
OVERRIDES = {"steps": STEPS, "checkpoint_every": 3, "eval_every": 0, "learning_rate": 2e-4}
MESHES = {8: {"mesh__data": 2, "mesh__fsdp": 4}, 4: {"mesh__data": 2, "mesh__fsdp": 2}, 2: {"mesh__fsdp": 2}}
"""By the number of devices."""
AIMS = ("start", "restore", "step", "step", "save", "save")
ACROSS = 1e-4
"""Relative difference of losses and gradients between numbers of devices. Each step's sums are rounded in
another order, by a few 1e-7, and a hundred-odd steps of Adam at a small rate carry that on. A step that is
lost, made twice or made on other samples, or moments that are forgotten, differ by 1e-2 and more."""


class Chaos(NamedTuple):
    """What became of a run's kills."""

    phases: collections.Counter[str]
    signals: collections.Counter[str]
    devices: collections.Counter[int]


def arguments(command: Command, workdir: Path, devices: int) -> list[str]:
    return command(workdir, **{**OVERRIDES, **MESHES[devices]})


def finish(command: Command, start: Start, workdir: Path, devices: int) -> Path:
    process = start(arguments(command, workdir, devices), devices=devices)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return workdir


def left_incomplete(workdir: Path) -> list[Path]:
    return list((workdir / "checkpoints").glob(".*.incomplete"))


def claimed(workdir: Path) -> int:
    """When a start last took the run's directory, which is the last thing before it restores."""
    path = workdir / "train_config.json"
    return path.stat().st_mtime_ns if path.exists() else 0


def disturb(
    command: Command, start: Start, workdir: Path, *, kills: int, devices: tuple[int, ...], seed: int
) -> Chaos:
    """Kills so many starts of a run, one after another; the run isn't over then."""
    rng = np.random.default_rng(seed)
    aims = [AIMS[number % len(AIMS)] for number in rng.permutation(kills)]
    chaos = Chaos(collections.Counter(), collections.Counter(), collections.Counter())
    for number, aim in enumerate(aims):
        count = devices[number % len(devices)]
        before, taken, cut = steps(workdir), claimed(workdir), {*left_incomplete(workdir)}
        process = start(arguments(command, workdir, count), devices=count)
        if aim == "start":
            time.sleep(rng.uniform(0.0, 3.0))
        else:
            wait_until(lambda taken=taken: claimed(workdir) != taken, process)
        if aim == "restore":
            time.sleep(rng.uniform(0.0, 0.4))
        if aim in ("step", "save"):
            # A start drops the rows behind its checkpoint before it adds some.
            base = min(before, newest(workdir))
            far = base + rng.integers(1, 8)
            wait_until(lambda far=far: steps(workdir) >= far, process)
            time.sleep(rng.uniform(0.0, 0.05))
        if aim == "save":
            wait_until(lambda cut=cut: any(path not in cut for path in left_incomplete(workdir)), process)
            time.sleep(rng.uniform(0.0, 0.03))
        saving = bool(left_incomplete(workdir)) and claimed(workdir) != taken
        number_sent = signal.SIGTERM if rng.uniform() < 0.3 else signal.SIGKILL
        process.send_signal(number_sent)
        _, err = process.communicate(timeout=200)
        assert process.returncode in (0, -number_sent), err
        assert process.returncode or number_sent == signal.SIGTERM, "it ended before it was killed"
        begun = f" of {STEPS}\n" in err
        if not begun:
            phase = "start" if claimed(workdir) == taken else "restore"
        elif saving and (left_incomplete(workdir) or number_sent == signal.SIGTERM):
            phase = "save"
        else:
            phase = "step"
        chaos.phases[phase] += 1
        chaos.signals[number_sent.name] += 1
        chaos.devices[count] += 1
    print(f"seed {seed}: {chaos}, at step {steps(workdir)}")
    return chaos


def assert_whole(workdir: Path) -> None:
    assert [row["step"] for row in rows(workdir)] == list(range(1, STEPS + 1))
    last = {str(STEPS - 6), str(STEPS - 3), str(STEPS)}
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == last
    assert [path for path in workdir.iterdir() if path.name.startswith(".")] == []


@pytest.fixture(scope="module")
def seed() -> int:
    return secrets.randbits(32)


def test_eight_kills_on_the_same_devices_change_no_bit(
    command: Command, start: Start, tmp_path: Path, seed: int
) -> None:
    whole = finish(command, start, tmp_path / "whole", 2)
    disturb(command, start, tmp_path / "killed", kills=8, devices=(2,), seed=seed)
    finish(command, start, tmp_path / "killed", 2)
    assert_whole(tmp_path / "killed")
    assert learned(tmp_path / "killed") == learned(whole)


def test_thirty_kills_on_eight_four_and_two_devices_change_losses_by_rounding_alone(
    command: Command, start: Start, tmp_path: Path, seed: int
) -> None:
    whole = finish(command, start, tmp_path / "whole", 8)
    chaos = disturb(command, start, tmp_path / "killed", kills=30, devices=(8, 4, 2), seed=seed)
    finish(command, start, tmp_path / "killed", 8)
    assert_whole(tmp_path / "killed")
    found, expected = learned(tmp_path / "killed"), learned(whole)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [row[name] for row in found], [row[name] for row in expected], rtol=ACROSS, err_msg=name
        )
    assert [row["tokens"] for row in found] == [row["tokens"] for row in expected]
    assert chaos.phases.total() == 30
    assert min(chaos.phases[phase] for phase in ("start", "restore", "step", "save")) >= 2, chaos
    assert set(chaos.signals) == {"SIGKILL", "SIGTERM"}
    assert set(chaos.devices) == {8, 4, 2}
