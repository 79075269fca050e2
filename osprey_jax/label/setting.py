"""What lines of the output depend on: in short names of its versions, and whole for a run that goes on."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from osprey_jax.directories import as_path

_SMALL = 1 << 20
"""Files up to so many bytes are hashed whole, of larger ones name and size."""
_TRAINING = ("optimizer", "loader")
"""What a checkpoint of training has beside its parameters."""


def version(value: Any) -> str:
    """A short name that differs for different values of JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def model_version(checkpoint: Path | str) -> str:
    """A short name of a checkpoint's parameters, configuration and tokenizer; a copy has the same.

    Parameters aren't read: it is their files' names, which are made at random, and sizes that count.
    """
    root = as_path(checkpoint)
    files = []
    for path in sorted(root.rglob("*")):
        name = os.fspath(path.relative_to(root))
        if name.split("/")[0] in _TRAINING or not path.is_file():
            continue
        status: Any = path.stat()
        size = status.length if hasattr(status, "length") else status.st_size  # a bucket's, a disk's
        content = hashlib.blake2b(path.read_bytes()).hexdigest() if size <= _SMALL else None
        files.append([name, size, content])
    return version(files)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each value that two settings, mappings of mappings, don't have in common."""
    before, after = dict(_flat(then)), dict(_flat(now))
    return [
        f"  {key}: {_told(before.get(key))} then, {_told(after.get(key))} now"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


def _flat(setting: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in setting.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _told(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:119]}…"
