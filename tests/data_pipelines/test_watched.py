"""Workers that die are told of, and those that live end with their loader."""

import itertools
import multiprocessing
import os
import signal
import time

import pytest

from data_pipelines.pipeline import make_loader
from data_pipelines.watched import Watched, WorkerDied
from osprey_jax.config import OspreyConfig
from osprey_jax.prompt import Tokenizer
from tests.data_pipelines.test_packed_stream import Album


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


def test_a_killed_worker_is_an_error_and_no_endless_wait(tokenizer: Tokenizer, config: OspreyConfig) -> None:
    before = set(multiprocessing.active_children())
    loader = make_loader(
        [Album("a", 600)], tokenizer, config, batch_size=4, buckets=((64, 4),), seed=0, workers=2
    )
    next(loader)
    (worker, _) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="a process that prepares samples was killed by signal 9"):
        list(itertools.islice(loader, 1000))
    loader.close()
