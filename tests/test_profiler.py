"""Traces of chosen steps."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from osprey_jax.profiler import Profiler, Steps, parse_steps


def test_one_step_or_the_first_and_the_last_are_named() -> None:
    assert parse_steps("7") == Steps(7, 7)
    assert parse_steps("10:12") == Steps(10, 12)
    for wrong in ("", "0", "5:3", "1:2:3", "a"):
        with pytest.raises(ValueError, match=f"--profile={wrong}: name a step"):
            parse_steps(wrong)


def test_the_trace_lies_where_tensorboard_looks(tmp_path: Path) -> None:
    told: list[str] = []
    profiler = Profiler(Steps(2, 3), tmp_path, told.append)
    for step in range(1, 5):
        profiler.before(step)
        profiler.after(step, jnp.ones(3) * step)
    assert told == [f"traced steps 2 to 3 into {tmp_path}"]
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
