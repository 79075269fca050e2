"""Manners of worker processes."""

import multiprocessing
import os
import signal
import threading


def end_with_parent() -> None:
    """Makes a worker process end with its parent, and leave Ctrl-C to it.

    A killed parent can't end its workers, which would wait for it for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in worker processes"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
