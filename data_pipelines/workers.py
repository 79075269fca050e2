"""Manners of worker processes."""

import ctypes
import multiprocessing
import os
import signal
import threading

_KEPT, _LARGEST_BEFORE_2_35 = 256 << 20, 32 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's `malloc.h`."""


def end_with_parent() -> None:
    """Makes a worker process end with its parent, leave Ctrl-C to it, and keep the memory of an image.

    A killed parent can't end its workers, which would wait for it for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in worker processes"
    _keep_memory()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _keep_memory() -> None:
    """Lets glibc use freed memory again; it would give every image's back and have new pages cleared."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # another C library
    mallopt(_M_TRIM_THRESHOLD, _KEPT)
    # To have set one alone would fix the other at its small default.
    _ = mallopt(_M_MMAP_THRESHOLD, _KEPT) or mallopt(_M_MMAP_THRESHOLD, _LARGEST_BEFORE_2_35)
