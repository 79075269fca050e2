"""Image files by name, out of a directory, a tar archive or shards of one."""

import os
import posixpath
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np


class Images:
    """Encoded images by the names that annotations have for them; made by `open_images`.

    Holds no open file: threads may read at the same time, and a pickled one reads in another process.
    """

    def __init__(self, root: Path, shards: tuple[Path, ...]):
        """Reads where in the shards each member is."""
        self._root = root
        self._absolute = tuple(dict.fromkeys((os.path.abspath(root), os.path.realpath(root))))
        self._shards = shards
        self._folders: dict[str, str] = {}
        members: dict[bytes, tuple[int, int, int]] = {}
        wrappings = {""}
        for number, shard in enumerate(shards):
            found = dict(_members(shard))
            tops = {name.partition(b"/")[0] for name in found}
            if len(tops) == 1:  # as tar makes them of a folder
                wrappings.add(f"{os.fsdecode(tops.pop())}/")
            members.update((name, (number, *place)) for name, place in found.items())
        self._wrappings = sorted(wrappings)
        names = sorted(members)
        # Arrays instead of a dict of objects: every worker holds them.
        self._names = np.array(names, np.bytes_)
        self._places = np.array([members[name] for name in names], np.int64).reshape(-1, 3)

    def read(self, name: str) -> bytes:
        """The file of that name, which is relative to the directory or inside of the archive.

        Raises:
          FileNotFoundError: no such image.
          ValueError: a name that leads out of the directory, or to what is no regular file.
        """
        relative = self._inside(name)
        if (place := self._place(relative)) is not None:
            shard, offset, size = place
            with self._shards[shard].open("rb") as file:
                file.seek(offset)
                data = file.read(size)
            if len(data) < size:
                raise OSError(f"{self._shards[shard]} ends inside of {name}")
            return data
        path = self._root / relative
        try:
            # To open a FIFO would wait for ever.
            if not stat.S_ISREG(path.stat().st_mode):
                raise ValueError(f"the image {name} in {self._root} is a directory or no regular file")
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"no image {name} in {self._root}") from None
        except OSError as error:
            told = name if len(name) <= 200 else f"{name[:200]}…"
            raise type(error)(f"cannot read the image {told} in {self._root}: {error.strerror}") from None

    def members(self) -> Iterator[str]:
        """Names of what is in the archives; of an archive of one folder, without that folder's name."""
        wrappings = [wrapping for wrapping in self._wrappings if wrapping]
        for name in map(os.fsdecode, self._names):
            yield name.removeprefix(next(filter(name.startswith, wrappings), ""))

    def key(self, name: str) -> str:
        """A name of the file that is the same for all that lead to it; whether there is one isn't looked at.

        Raises ValueError for a name that leads out of the directory.
        """
        relative = self._inside(name)
        if (place := self._place(relative)) is not None:
            shard, offset, _ = place
            return f"{self._resolved(os.fspath(self._shards[shard]))}:{offset}"
        return self._resolved(os.path.join(self._root, relative))

    def _inside(self, name: str) -> str:
        """The name in its shortest form, relative to the root."""
        if not name or "\0" in name:
            raise ValueError(f"no name of an image: {name!r}")
        shortest = posixpath.normpath(name)
        if os.path.isabs(shortest):
            for root in self._absolute:
                if (relative := os.path.relpath(shortest, root)) != ".." and not relative.startswith("../"):
                    return relative
        elif shortest != ".." and not shortest.startswith("../"):
            return shortest
        raise ValueError(
            f"the image {name} lies outside of the images' directory {self._root}; give names relative to it"
        )

    def _resolved(self, path: str) -> str:
        folder, name = os.path.split(path)
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        path = os.path.join(self._folders[folder], name)
        return os.path.realpath(path) if os.path.islink(path) else path

    def _place(self, name: str) -> tuple[int, int, int] | None:
        for wrapping in self._wrappings if len(self._names) else ():
            wanted = os.fsencode(wrapping + name)
            if len(wanted) <= self._names.itemsize:
                row = int(np.searchsorted(self._names, np.array(wanted, self._names.dtype)))
                if row < len(self._names) and self._names[row] == wanted:
                    shard, offset, size = map(int, self._places[row])
                    return shard, offset, size
        return None


def open_images(path: str | os.PathLike[str]) -> Images:
    """Opens a directory of images, a tar archive of them, or a directory that holds such archives.

    Archives are read once from front to back of each, headers only. What a directory has beside them is found
    too. An archive of one folder offers what is in it with and without that folder's name.

    Raises:
      FileNotFoundError: no such path.
      ValueError: a file that is no plain (not compressed) tar archive.
    """
    root = Path(path)
    if root.is_dir():
        return Images(root, tuple(sorted(root.glob("*.tar"))))
    if not root.exists():
        raise FileNotFoundError(f"no images at {root}: neither a directory nor a .tar")
    return Images(root, (root,))


def _members(shard: Path) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Names, offsets and sizes of the regular files in a tar."""
    try:
        with tarfile.open(shard, "r:") as archive:
            while (member := archive.next()) is not None:
                if member.isreg():
                    name = posixpath.normpath(member.name)
                    yield os.fsencode(name), (member.offset_data, member.size)
                archive.members.clear()  # type: ignore[attr-defined] # it would keep all of them
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is no plain tar archive: {error}") from error
