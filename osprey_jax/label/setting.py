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
_BESIDE = ("config.json", "tokenizer.model", "tokenizer.json")
"""What answers depend on beside `params/`; a checkpoint of training has more."""
_SHOWN, _BEFORE = 120, 30
"""Characters of a long value, and those of them before the place where two values part."""


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
    for path in sorted([*(root / "params").rglob("*"), *(root / name for name in _BESIDE)]):
        if not path.is_file():
            continue
        name = os.fspath(path.relative_to(root))
        status: Any = path.stat()
        size = status.length if hasattr(status, "length") else status.st_size  # a bucket's, a disk's
        content = hashlib.blake2b(path.read_bytes()).hexdigest() if size <= _SMALL else None
        files.append([name, size, content])
    return version(files)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each value that two settings, mappings of mappings, don't have in common."""
    before, after = dict(_flat(then)), dict(_flat(now))
    return [
        "  {}: {} then, {} now".format(key, *_apart(before.get(key), after.get(key)))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


def _flat(setting: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in setting.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _apart(then: Any, now: Any) -> list[str]:
    """The values as JSON; of long ones what is around the place where they part."""
    texts = [json.dumps(value, ensure_ascii=False) for value in (then, now)]
    same = next((n for n, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, same - _BEFORE) if max(map(len, texts)) > _SHOWN else 0
    return [
        f"{'…' if start else ''}{text[start : start + _SHOWN]}{'…' if len(text) > start + _SHOWN else ''}"
        for text in texts
    ]
