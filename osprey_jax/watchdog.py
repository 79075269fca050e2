"""Tells what a process is at when that takes suspiciously long."""

import faulthandler
import sys
import threading
import time
from collections.abc import Callable


class Watchdog:
    """Says where a step hangs: after `seconds` at one thing, and again each time that has doubled.

    It names what was announced last, then come the stacks of all threads, on stderr. It ends nothing: a
    compilation, or a store that doesn't answer, may still get done.
    """

    def __init__(self, seconds: float, say: Callable[[str], None]):
        """Watches at once; `say` gets the warnings. 0 seconds watch nothing."""
        self._patience, self._say = seconds, say
        self._doing, self._since = "starting", time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if seconds:
            self._thread.start()

    def at(self, what: str) -> None:
        """Announces what begins now."""
        self._doing, self._since = what, time.monotonic()

    def close(self) -> None:
        """Watches no more."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        since, patience = self._since, self._patience
        while not self._closed.wait(self._patience / 10):
            if self._since != since:
                since, patience = self._since, self._patience
            elif (seconds := time.monotonic() - since) > patience:
                patience = 2 * seconds
                self._say(
                    f"warning: {self._doing} has taken {seconds:.0f} s so far; what all threads are at:"
                )
                faulthandler.dump_traceback(sys.stderr)
