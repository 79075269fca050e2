"""A trace of some steps, for TensorBoard's profile tab or ui.perfetto.dev."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Steps(NamedTuple):
    """The steps to trace, counted from 1, both included."""

    first: int
    last: int


def parse_steps(text: str) -> Steps:
    """Reads `10` or `10:12`. Raises ValueError."""
    match = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", text)
    steps = Steps(int(match[1]), int(match[2] or match[1])) if match else Steps(1, 0)
    if steps.last < steps.first:
        raise ValueError(f"--profile={text}: name a step, or the first and the last, as in --profile=10:12")
    return steps


class Profiler:
    """Begins and ends the trace at the right steps."""

    def __init__(self, steps: Steps | None, directory: Path, say: Callable[[str], None]):
        """Traces `steps` into `directory`, and tells `say` so; None traces nothing."""
        self._steps, self._directory, self._say = steps, directory, say
        self._running = False

    def before(self, step: int) -> None:
        """To be called before each step."""
        if self._steps is not None and self._steps.first <= step <= self._steps.last and not self._running:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """To be called after each step with what it computes, which the trace's end waits for."""
        if self._steps is not None and step >= self._steps.last and self._running:
            jax.block_until_ready(results)
            self.close()
            self._say(f"traced steps {self._steps.first} to {self._steps.last} into {self._directory}")

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
