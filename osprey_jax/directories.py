"""Directories that are complete or not there, on disks and in buckets, made by one host or by several."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import jax
from etils import epath
from jax.experimental import multihost_utils


@contextlib.contextmanager
def new_directory(directory: Path | str) -> Iterator[Path]:
    """Gives an empty directory that becomes `directory` when the block ends, and vanishes when it raises.

    Raises ValueError where `directory` exists. On several hosts every process enters the block together, and
    the directory has to be on a file system that they share.
    """
    directory = as_path(directory)
    if directory.exists():
        raise ValueError(f"{directory} exists already")
    partial = directory.with_name(f".{directory.name}.incomplete")
    synchronise(f"before {directory}")
    if jax.process_index() == 0:
        remove(partial)
        partial.mkdir(parents=True)
    synchronise(f"made {directory}")
    try:
        yield partial
        synchronise(f"written {directory}")
        if jax.process_index() == 0:
            partial.rename(directory)
        synchronise(f"renamed {directory}")
    except BaseException:
        with contextlib.suppress(OSError):
            remove(partial)
        raise


def as_path(path: os.PathLike | str) -> Path:
    """An absolute path, or what acts as one for a bucket's address such as `gs://bucket/run`."""
    return cast(Path, epath.Path(path)) if "://" in str(path) else Path(path).absolute()


def remove(path: Path) -> None:
    """Deletes a directory with all that is in it, or does nothing where there is none."""
    epath.Path(path).rmtree(missing_ok=True)


def persist(directory: Path, *, deep: bool = True) -> None:
    """Makes a directory, by default with all that is in it, or a file outlive a loss of power."""
    if "://" in str(directory):
        return
    for path in [*(directory.rglob("*") if deep else ()), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def synchronise(name: str) -> None:
    """Waits until every process has come here; `name` tells the places apart."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
