"""What `python -m data_pipelines prepare` wrote, as a source: any record at once, in little memory."""

import collections
import io
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from data_pipelines.records import Record
from data_pipelines.stored_format import KEYS, PREPARED, PROGRESS, VERSION, Shard, decode


class Stored:
    """The records that `prepare` kept, in the order of the source that it read.

    Reads from several threads at once. Pickled it is the directory's name: a worker process opens the files
    itself. Files are opened at the first record that is read from them and stay open.

    Raises ValueError where the directory isn't a prepared one, or not a complete one.
    """

    def __init__(self, directory: str | os.PathLike):
        self._directory = os.fspath(directory)
        self._prepared = _read_prepared(self._directory)
        self._counts = collections.Counter(self._prepared["dropped"])
        self._counts.update(self._prepared["left_out"])
        # Those without a record can't be read from, so a name is enough for the others.
        files = [shard for shard in _shards(self._directory, self._prepared) if shard.take]
        self._files = ArrayRecordDataSource(files)
        self._keys = _read_keys(epath.Path(self._directory) / KEYS)
        if not len(self._keys) == len(self._files) == self._prepared["records"]:
            raise ValueError(
                f"{self._directory} is damaged: {self._prepared['records']} records, {len(self._keys)} keys, "
                f"{len(self._files)} records in its files"
            )

    @property
    def name(self) -> str:
        """The name of the source that was prepared."""
        return self._prepared["name"]

    @property
    def dropped(self) -> Mapping[str, int]:
        """Samples that the source dropped and those that `prepare` left out, by the reason."""
        return self._counts

    def __len__(self) -> int:
        return self._prepared["records"]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"no record {index} among the {len(self)} of {self._directory}")
        try:
            data = self._files[index]
        except RuntimeError as error:
            raise OSError(f"can't read record {index} of {self._directory}: {error}") from error
        return decode(data)

    def image_key(self, index: int) -> str:
        """The hash of the record's image; the same file has the same one in all prepared directories."""
        if not 0 <= index < len(self):
            raise IndexError(f"no record {index} among the {len(self)} of {self._directory}")
        return f"{self._keys[index]:016x}"

    def __reduce__(self) -> tuple[type["Stored"], tuple[str]]:
        return Stored, (self._directory,)


def _read_prepared(directory: str) -> dict[str, Any]:
    path = epath.Path(directory)
    if not path.is_dir():
        raise ValueError(f"no directory {directory}")
    try:
        prepared = json.loads((path / PREPARED).read_text())
    except FileNotFoundError as error:
        if (path / PROGRESS).exists():
            raise ValueError(f"{directory} is incomplete: run the command that began it again") from error
        raise ValueError(f"{directory} was not written by `prepare`: it has no {PREPARED}") from error
    except ValueError as error:
        raise ValueError(f"{directory} is damaged: {PREPARED} is not valid json") from error
    if prepared.get("version") != VERSION:
        raise ValueError(f"{directory} has format {prepared.get('version')}, this program reads {VERSION}")
    return prepared


def _shards(directory: str, prepared: dict[str, Any]) -> list[Shard]:
    shards = []
    for name, records, num_bytes in prepared["shards"]:
        path = epath.Path(directory) / name
        try:
            size = path.stat().length
        except FileNotFoundError as error:
            raise ValueError(f"{directory} is incomplete: it has no {name}") from error
        if size != num_bytes:
            raise ValueError(f"{directory} is damaged: {name} has {size} bytes instead of {num_bytes}")
        shards.append(Shard(os.fspath(path), records, num_bytes))
    return shards


def _read_keys(path: epath.Path) -> np.ndarray:
    """Mapped where that is possible, so that all processes of a machine share them."""
    try:
        if "://" in os.fspath(path):
            return np.load(io.BytesIO(path.read_bytes()))
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.parent} is damaged: can't read {path.name}: {error}") from error
