"""Files that are added to and replaced without ever being half of something: on disks and in buckets."""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from osprey_jax.directories import as_path


class Storage(Protocol):
    """The files of one directory, by name. What a method was given to write is safe when it returns."""

    @property
    def path(self) -> Path:
        """The directory."""
        ...

    def claim(self, number: int) -> bool:
        """Reserves a number for this process until it ends or closes; False where another process has it."""
        ...

    def create(self, name: str, data: bytes) -> None:
        """Writes a file unless there is one, also where several processes do it at the same time."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Writes a file, which has the old content or the new one wherever the machine stops."""
        ...

    def size(self, name: str) -> int:
        """Bytes that were appended to a file, those of an interrupted `append` perhaps among them."""
        ...

    def append(self, name: str, data: bytes, *, at: int) -> None:
        """Adds to a file that has `at` bytes."""
        ...

    def cut(self, name: str, size: int) -> None:
        """Shortens a file, and makes an empty one where there is none."""
        ...

    def finish(self, name: str) -> None:
        """Says that nothing more will be appended to a file."""
        ...

    def close(self) -> None:
        """Gives back what was reserved."""
        ...


def open_storage(directory: str | os.PathLike, *, hidden: str) -> Storage:
    """Makes a directory where there is none; `hidden` is one in it for what isn't for users' eyes."""
    path = as_path(directory)
    return Bucket(path, hidden) if "://" in str(directory) else Disk(path, hidden)


class Disk:
    """A directory of a disk that several processes, perhaps of several machines, share."""

    def __init__(self, path: Path, hidden: str):
        self.path, self._hidden = path, path / hidden
        with _writing(self._hidden):
            self._hidden.mkdir(parents=True, exist_ok=True)
            self._lock = (self._hidden / "lock").open("ab")

    def claim(self, number: int) -> bool:
        """See `Storage`; the system gives it back however a process ends."""
        try:
            # One byte of the file for each number.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise OSError(error.errno, f"cannot lock {self._lock.name}: {error.strerror}") from error
        return True

    def create(self, name: str, data: bytes) -> None:
        """See `Storage`."""
        path = self.path / name
        partial = self._hidden / f"{name}.{socket.gethostname()}.{os.getpid()}"
        with _writing(path):
            try:
                with partial.open("wb") as file:
                    _write(file.fileno(), data)
                with contextlib.suppress(FileExistsError):
                    os.link(partial, path)
                _sync(path.parent)
            finally:
                partial.unlink(missing_ok=True)

    def replace(self, name: str, data: bytes) -> None:
        """See `Storage`."""
        path = self.path / name
        partial = path.with_name(f".{path.name}.incomplete")
        with _writing(path):
            with partial.open("wb") as file:
                _write(file.fileno(), data)
            partial.replace(path)
            _sync(path.parent)

    def size(self, name: str) -> int:
        """See `Storage`."""
        path = self.path / name
        return path.stat().st_size if path.exists() else 0

    def append(self, name: str, data: bytes, *, at: int) -> None:
        """See `Storage`."""
        path = self.path / name
        with _writing(path), path.open("r+b") as file:
            file.seek(at)
            _write(file.fileno(), data)

    def cut(self, name: str, size: int) -> None:
        """See `Storage`."""
        path = self.path / name
        with _writing(path):
            with path.open("ab") as file:
                file.truncate(size)
            _sync(path.parent)

    def finish(self, name: str) -> None:
        """See `Storage`; nothing is left to do."""

    def close(self) -> None:
        """See `Storage`."""
        self._lock.close()


class Bucket:
    """A directory of objects, which can't be added to: each `append` makes one, the last call joins them.

    Nothing can be reserved: that two processes don't write the same is up to who starts them.
    """

    def __init__(self, path: Path, hidden: str):
        self.path, self._parts = path, path / hidden / "parts"
        self._parts.mkdir(parents=True, exist_ok=True)

    def claim(self, number: int) -> bool:
        """See `Storage`; always True."""
        return True

    def create(self, name: str, data: bytes) -> None:
        """See `Storage`; of several at the same time the last one counts."""
        if not (self.path / name).exists():
            self.replace(name, data)

    def replace(self, name: str, data: bytes) -> None:
        """See `Storage`."""
        (self.path / name).write_bytes(data)

    def size(self, name: str) -> int:
        """See `Storage`."""
        if parts := self._parts_of(name):
            return int(parts[-1].name.rpartition("-")[2])
        path = self.path / name
        return len(path.read_bytes()) if path.exists() else 0

    def append(self, name: str, data: bytes, *, at: int) -> None:
        """See `Storage`."""
        (self._parts / f"{name}-{at:015d}-{at + len(data):015d}").write_bytes(data)

    def cut(self, name: str, size: int) -> None:
        """See `Storage`; a file that was finished already is left as it is."""
        for part in self._parts_of(name):
            if int(part.name.rpartition("-")[2]) > size:
                part.unlink()

    def finish(self, name: str) -> None:
        """See `Storage`."""
        parts = self._parts_of(name)
        if not parts and (self.path / name).exists():
            return
        # Without the first part, they were joined before, and a kill kept the others from being removed.
        if not parts or int(parts[0].name.rsplit("-", 2)[1]) == 0:
            with (self.path / name).open("wb") as joined:
                for part in parts:
                    with part.open("rb") as file:
                        shutil.copyfileobj(file, joined)
        for part in parts:
            part.unlink()

    def close(self) -> None:
        """See `Storage`."""

    def _parts_of(self, name: str) -> list[Path]:
        """In order."""
        return sorted(self._parts.glob(f"{name}-*"), key=lambda part: part.name)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def _sync(folder: Path) -> None:
    """Makes new names in a directory safe."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Tells which file could not be written."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write {path}: {error.strerror}; the same command goes on from there"
        ) from error
