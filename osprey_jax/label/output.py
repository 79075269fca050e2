"""Shards of JSON lines to which units are added whole, once each, wherever the program is killed.

In the directory: `labels-00003-of-00016.jsonl` and beside it `skipped-00003-of-00016.jsonl`; `run.json`, the
setting; and `.label/`, which has a note for each shard of how far it is, and a lock. A unit's lines are
appended, then the note is replaced; what a file has behind its note's bytes is cut off when it is opened
again.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from osprey_jax.directories import as_path
from osprey_jax.label.setting import differences
from osprey_jax.label.storage import open_storage

RUN = "run.json"
NOTES = ".label"
LABELS, SKIPPED = "labels-", "skipped-"
_COUNTED = ("images", "described", "regions", "skipped", "skipped_images")


@dataclasses.dataclass(frozen=True)
class Note:
    """How far a shard is."""

    units: int = 0
    """So many of the shard's units are written, the first ones."""
    bytes: int = 0
    skipped_bytes: int = 0
    images: int = 0
    """Of these units, all of them."""
    described: int = 0
    """Images of which there are lines."""
    regions: int = 0
    """Lines."""
    skipped: int = 0
    """Lines of the other file: images and regions that can't be used."""
    skipped_images: int = 0
    """Those of them that are about a whole image."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What a unit adds to its shard."""

    lines: bytes
    skipped_lines: bytes
    images: int
    described: int
    regions: int
    skipped: int
    skipped_images: int


class Output:
    """A directory and those of its shards that this process writes.

    Raises ValueError where the directory holds a run of another setting, or other things, or is damaged, and
    where another process writes the same shards; OSError where it can't be written.
    """

    def __init__(
        self, directory: str | os.PathLike, setting: Mapping[str, Any], shards: Mapping[int, int], total: int
    ):
        """Opens it, without changing what a user sees.

        Args:
          directory: in which at most a run of the same `setting["setting"]` is.
          setting: for `run.json`.
          shards: those that are written, each with how many units it will have.
          total: how many shards there are in all.
        """
        check_run(as_path(directory), setting)
        self._setting, self._shards, self._total = setting, shards, total
        self._declared = False
        self._storage = open_storage(directory, hidden=NOTES)
        try:
            for shard in shards:
                if not self._storage.claim(shard):
                    raise ValueError(
                        f"another process is writing {directory}/{self._names(shard)[0]}; "
                        "each of several hosts needs its own --host"
                    )
            self.notes = {shard: self._read_note(shard) for shard in shards}
        except BaseException:
            self._storage.close()
            raise

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        self._storage.close()

    def add(self, shard: int, unit: int, part: Part) -> None:
        """Appends a unit, which has to be its shard's next one by number. Returns when it is safe."""
        self.declare()
        note = self.notes[shard]
        assert unit == note.units, f"unit {unit} of shard {shard} comes after {note.units}"
        lines, skipped = self._names(shard)
        for name, data, size in (
            (lines, part.lines, note.bytes),
            (skipped, part.skipped_lines, note.skipped_bytes),
        ):
            if data:
                self._storage.append(name, data, at=size)
        note = Note(
            units=note.units + 1,
            bytes=note.bytes + len(part.lines),
            skipped_bytes=note.skipped_bytes + len(part.skipped_lines),
            **{name: getattr(note, name) + getattr(part, name) for name in _COUNTED},
        )
        self._storage.replace(_note_name(shard), json.dumps(dataclasses.asdict(note)).encode())
        self.notes[shard] = note
        self._finish(shard)

    def declare(self) -> None:
        """Writes the setting and makes all files, cut to what their notes say, once.

        A run that has written no unit thereby leaves nothing that would hinder another one.
        """
        if self._declared:
            return
        text = json.dumps(self._setting, indent=2, ensure_ascii=False) + "\n"
        self._storage.create(RUN, text.encode("utf-8", "backslashreplace"))
        check_run(self._storage.path, self._setting)  # another host may have been first
        for shard, note in self.notes.items():
            for name, size in zip(self._names(shard), (note.bytes, note.skipped_bytes), strict=True):
                self._storage.cut(name, size)
            self._finish(shard)
        self._declared = True

    def _finish(self, shard: int) -> None:
        if self.notes[shard].units == self._shards[shard]:
            for name in self._names(shard):
                self._storage.finish(name)

    def _read_note(self, shard: int) -> Note:
        note = read_note(self._storage.path, shard)
        for name, size in zip(self._names(shard), (note.bytes, note.skipped_bytes), strict=True):
            if (found := self._storage.size(name)) < size:
                raise ValueError(
                    f"{self._storage.path / name} is damaged: it has {found} of the {size} bytes written"
                )
        return note

    def _names(self, shard: int) -> tuple[str, str]:
        suffix = f"{shard:05d}-of-{self._total:05d}.jsonl"
        return f"{LABELS}{suffix}", f"{SKIPPED}{suffix}"


def _note_name(shard: int) -> str:
    return f"{NOTES}/{shard:05d}.json"


def read_note(directory: Path, shard: int) -> Note:
    """How far a shard of an output is."""
    path = directory / _note_name(shard)
    try:
        return Note(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return Note()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_run(directory: Path) -> dict[str, Any] | None:
    """What `run.json` holds, or None where there is none. Raises ValueError for what is no directory."""
    try:
        return json.loads((directory / RUN).read_bytes())
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise ValueError(f"{directory} is not a directory") from None
    except ValueError as error:
        raise ValueError(f"{directory / RUN} is damaged: {error}") from error


def check_run(directory: Path, setting: Mapping[str, Any]) -> None:
    """Raises ValueError where the directory has a run of another setting, or other things than a run."""
    if (then := read_run(directory)) is None:
        if directory.is_dir() and (other := [path for path in directory.iterdir() if path.name != NOTES]):
            raise ValueError(f"{directory} holds other things, such as {other[0].name}, and no {RUN}")
    elif told := differences(then.get("setting", {}), setting["setting"]):
        raise ValueError(
            f"{directory} was begun with another setting; give another --output, or what it was begun with:\n"
            + "\n".join(told)
        )
