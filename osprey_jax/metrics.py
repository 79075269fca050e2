"""Where a training's numbers go: a line of JSON for each step, TensorBoard's event files, a progress line."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter


class Metrics:
    """Writes `metrics.jsonl` and `tensorboard/` of a run, and its progress to stderr.

    What an earlier start wrote about later steps than the one that this one goes on from is dropped, so each
    step is there once.
    """

    def __init__(self, workdir: Path, *, step: int, steps: int, every: int, peak: float | None = None):
        """The run goes on from `step` to `steps`; progress and TensorBoard get every `every`-th one.

        `peak` is what all devices can do together, in operations per second, where that is known.
        """
        self._peak = peak
        self._path, self._steps, self._every = workdir / "metrics.jsonl", steps, every
        self._lines = _kept_lines(self._path, step)
        # A bucket's objects can't be appended to, so there the whole file is written again at each flush.
        self._appends = "://" not in str(workdir)
        _replace(self._path, self._lines)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        self._last = self._shown = time.monotonic()
        self._window = [0.0] * 4  # steps, tokens, samples and operations since progress was last shown
        self._evaluated: dict[int, Mapping[str, float]] = {}  # by steps that are still to be written

    def evaluated(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None:
        """Adds what was found of the state after a step, before the step itself is written.

        TensorBoard gets all of it, whatever the step; the numbers come into the step's line as well.
        """
        self._evaluated[step] = numbers
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        for name, picture in pictures.items():
            self._board.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def write(self, step: int, values: Mapping[str, float], *, samples: int, operations: int = 0) -> None:
        """Adds a step: its numbers, `loss` and `tokens` among them, how many samples it took, and operations.

        The share of the peak that these are, MFU, is left out where either isn't known.
        """
        now = time.monotonic()
        seconds, self._last = max(now - self._last, 1e-9), now
        tokens = values["tokens"]
        evaluated = self._evaluated.pop(step, {})
        row = {"step": step, **values, **evaluated, "tokens_per_second": tokens / seconds}
        row["samples_per_second"] = samples / seconds
        if self._peak and operations:
            row["mfu"] = operations / seconds / self._peak
        line = json.dumps(row) + "\n"
        if self._appends:
            with self._path.open("a") as file:
                file.write(line)
        else:
            self._lines.append(line)
        self._window = [a + b for a, b in zip(self._window, (1, tokens, samples, operations), strict=True)]
        if step % self._every == 0 or step == self._steps:
            self._show(step, values, now)

    def flush(self) -> None:
        """Puts all that was written where a reader, or the next start, finds it."""
        self._board.flush()
        if not self._appends:
            _replace(self._path, self._lines)
        elif self._path.exists():
            # A checkpoint that outlives a loss of power must not be ahead of what is told of its steps.
            with self._path.open("a") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Flushes, and ends the progress line."""
        self.flush()
        self._board.close()
        if sys.stderr.isatty():
            print(file=sys.stderr)

    def _show(self, step: int, values: Mapping[str, float], now: float) -> None:
        seconds, self._shown = max(now - self._shown, 1e-9), now
        steps, tokens, samples, operations = (count / seconds for count in self._window)
        self._window = [0.0] * 4
        rates = {"tokens_per_second": tokens, "samples_per_second": samples}
        share = ""
        if self._peak and operations:
            rates["mfu"] = operations / self._peak
            share = f"{rates['mfu']:.1%} MFU · "
        for name, value in {**values, **rates}.items():
            self._board.add_scalar(name, value, step)
        line = (
            f"step {step}/{self._steps} · loss {values['loss']:.4f} · {tokens:,.0f} tokens/s · "
            f"{samples:.1f} samples/s · {share}{duration((self._steps - step) / steps)} left"
        )
        # One line that is overwritten, or, in a file, lines to read.
        start, end = ("\r", "\x1b[K") if sys.stderr.isatty() else ("", "\n")
        print(f"{start}{line}", end=end, file=sys.stderr, flush=True)


class Unheard(Metrics):
    """Those of a process beside the first, whose numbers are the first's: nothing is written."""

    def __init__(self, workdir: Path, *, step: int, steps: int, every: int, peak: float | None = None):
        pass

    def evaluated(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, Image.Image]) -> None:
        """Does nothing."""

    def write(self, step: int, values: Mapping[str, float], *, samples: int, operations: int = 0) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def _kept_lines(path: Path, step: int) -> list[str]:
    """The lines of steps up to `step`; what was cut off or damaged is not one of them."""
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n") and 0 < _step(line) <= step]


def _step(line: str) -> int:
    """The step of a line, 0 where it can't be read."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return 0


def _replace(path: Path, lines: list[str]) -> None:
    partial = path.with_name(f".{path.name}.incomplete")
    partial.write_text("".join(lines))
    partial.replace(path)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
