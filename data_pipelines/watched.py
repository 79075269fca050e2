"""Reading ahead from worker processes, without waiting for ever for one that died."""

import contextlib
import multiprocessing
import queue
import signal
import threading
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

PATIENCE = 5.0
"""Seconds in which what is to end has to."""
ABANDONED: list[Any] = []
"""Iterators whose worker died. Closing or deleting one, or Python's own end, waits for the rest of what that
worker was writing: a program that finds something here ends with `os._exit`."""
POLL = 0.2
"""Seconds between two looks at the processes, where there is nothing to read."""


class WorkerDied(RuntimeError):
    """A process that prepares samples is gone."""


class Watched(Iterator[T], Generic[T]):
    """The elements of an iterator over worker processes, so many of them read ahead by a thread.

    The iterator itself can't be trusted to notice that a worker was killed: half of what that was writing may
    be waited for without end. Raises WorkerDied then.
    """

    def __init__(self, iterator: Any, *, ahead: int):
        """`iterator` starts its workers at the first element; it has a method `close`."""
        self._iterator = iterator
        self._others = {process.pid for process in multiprocessing.active_children()}
        self._workers: dict[int | None, Any] = {}
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(max(ahead, 1))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read, name="data", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        while True:
            try:
                element, error = self._queue.get(timeout=POLL)
            except queue.Empty:
                self._look()
                continue
            if error is None:
                return element  # type: ignore[return-value] # None only beside an error
            self._look()
            raise error

    def close(self) -> None:
        """Ends the thread and the workers."""
        self._closing.set()
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        self._thread.join(timeout=PATIENCE)
        closed = False
        with contextlib.suppress(WorkerDied):
            self._look()
            closing = threading.Thread(target=self._iterator.close, daemon=True)
            closing.start()
            closing.join(timeout=PATIENCE)
            closed = not closing.is_alive()
        if not closed:
            ABANDONED.append(self._iterator)
            for process in self._workers.values():
                process.kill()

    def _read(self) -> None:
        # Workers inherit it: what stops a program is for their parent alone, from their first moment.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            for element in self._iterator:
                if not self._put(element, None):
                    return
        except BaseException as error:
            self._put(None, error)
        else:
            self._put(None, StopIteration())

    def _put(self, element: T | None, error: BaseException | None) -> bool:
        """False once nobody wants it any more."""
        while not self._closing.is_set():
            try:
                self._queue.put((element, error), timeout=POLL)
            except queue.Full:
                continue
            return True
        return False

    def _look(self) -> None:
        for process in multiprocessing.active_children():
            if process.pid not in self._others:
                self._workers[process.pid] = process
        for process in self._workers.values():
            if process.exitcode:
                how = f"was killed by signal {-process.exitcode}" if process.exitcode < 0 else "failed"
                raise WorkerDied(
                    f"a process that prepares samples {how}; if it ran out of memory, its own or that of "
                    "/dev/shm, fewer of them need less"
                )
