"""Files by name, out of a directory, a tar, a directory of tars or a bucket."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from data_pipelines.images import open_images
from osprey_jax.directories import as_path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


class Folder(Protocol):
    """Files by their names; threads may read at the same time."""

    def names(self, *suffixes: str) -> list[str]:
        """All names that end so, whatever their case, relative to the folder and sorted."""
        ...

    def read(self, name: str) -> bytes:
        """A file. Raises ValueError or OSError, which name it."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none or, in a bucket, to ask would take long."""
        ...


def digest(values: Iterable[Any]) -> str:
    """Differs for different values of JSON."""
    found = hashlib.blake2b(digest_size=16)
    for value in values:
        found.update(json.dumps(value).encode() + b"\n")
    return found.hexdigest()


def open_folder(path: str | os.PathLike) -> Folder:
    """Opens a directory, a `.tar`, a directory of `.tar` shards or a bucket's directory.

    Raises ValueError or OSError as `data_pipelines.images.open_images` does.
    """
    if "://" in str(path):
        return _Bucket(path)
    return _Local(Path(path))


class _Local:
    """A directory with the archives in it, or one archive."""

    def __init__(self, path: Path):
        self._path, self._images = path, open_images(path)

    def names(self, *suffixes: str) -> list[str]:
        found = {
            name
            for name in self._images.members()
            if name.lower().endswith(suffixes) and not os.path.basename(name).startswith(".")
        }
        if self._path.is_dir():
            for folder, folders, files in os.walk(self._path):
                folders[:] = [name for name in folders if not name.startswith(".")]
                below = os.path.relpath(folder, self._path)
                for name in files:
                    if name.lower().endswith(suffixes) and not name.startswith("."):
                        found.add(name if below == "." else f"{below}/{name}")
        return sorted(found)

    def read(self, name: str) -> bytes:
        return self._images.read(name)

    def size(self, name: str) -> int | None:
        try:
            key = self._images.key(name)
            try:
                return os.stat(key).st_size
            except (FileNotFoundError, NotADirectoryError):
                archive, _, start = key.rpartition(":")
                return _member_size(archive, int(start))
        except (OSError, ValueError, tarfile.TarError):
            return None


def _member_size(archive: str, start: int) -> int:
    """Of the member of a tar whose content starts there: its header is the block before."""
    with open(archive, "rb") as file:
        file.seek(start - tarfile.BLOCKSIZE)
        header = file.read(tarfile.BLOCKSIZE)
    return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size


class _Bucket:
    """A directory of files in a bucket."""

    def __init__(self, path: str | os.PathLike):
        self._path = as_path(path)
        if not self._path.is_dir():
            raise FileNotFoundError(f"no directory {path}")

    def names(self, *suffixes: str) -> list[str]:
        paths = (path for path in self._path.rglob("*") if path.name.lower().endswith(suffixes))
        return sorted(os.fspath(path.relative_to(self._path)) for path in paths)

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def size(self, name: str) -> int | None:
        return None
