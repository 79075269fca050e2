"""Workers that die are told of, and those that live end with their loader."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipelines.shapes import train_tokenizer
from data_pipelines.watched import Watched


class Numbers:
    """An iterator like those over processes; the fourth element is an error."""

    def __init__(self) -> None:
        self.given, self.closed = 0, False

    def __iter__(self) -> "Numbers":
        return self

    def __next__(self) -> int:
        self.given += 1
        if self.given == 4:
            raise OSError("no fourth")
        return self.given

    def close(self) -> None:
        self.closed = True


def test_elements_come_in_order_and_then_the_error() -> None:
    watched = Watched(Numbers(), ahead=2)
    assert list(itertools.islice(watched, 3)) == [1, 2, 3]
    with pytest.raises(OSError, match="no fourth"):
        next(watched)


def test_no_more_is_read_ahead_than_was_asked_for_and_closing_ends_it() -> None:
    numbers = Numbers()
    watched = Watched(numbers, ahead=1)
    time.sleep(0.3)
    assert numbers.given == 2  # one waits, one is held by the thread
    watched.close()
    assert numbers.closed


KILLED = """
import itertools, multiprocessing, os, signal, sys
from data_pipelines.pipeline import make_loader
from data_pipelines.shapes import Shapes
from data_pipelines.watched import WorkerDied
from osprey_jax.config import tiny
from osprey_jax.prompt import Tokenizer

if __name__ == "__main__":
    tokenizer = Tokenizer.load(sys.argv[1])
    loader = make_loader([Shapes()], tokenizer, tiny(), batch_size=4, buckets=((224, 7),), seed=0, workers=2)
    next(loader)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    try:
        list(itertools.islice(loader, 1000))
    except WorkerDied as error:
        print(error, flush=True)
    loader.close()
    os._exit(0)
"""


def test_a_killed_worker_is_an_error_and_no_endless_wait(tmp_path: Path) -> None:
    train_tokenizer(tmp_path)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    line = [sys.executable, str(script), str(tmp_path)]
    out = subprocess.run(
        line, env=environment, capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert out.startswith("a process that prepares samples was killed by signal 9; ")
