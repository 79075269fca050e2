"""Finds out in which form images and masks are given, and opens them."""

import json
import os
from collections.abc import Sequence
from typing import Any

from osprey_jax.directories import as_path
from osprey_jax.label import annotated, pngs
from osprey_jax.label.folders import open_folder
from osprey_jax.label.inputs import Input
from osprey_jax.label.prepared import Prepared


def open_input(
    *,
    images: str | os.PathLike | None = None,
    masks: Sequence[str | os.PathLike] = (),
    data: str | os.PathLike | None = None,
) -> Input:
    """Opens images with masks (see `python -m osprey_jax.label --help`), or a prepared directory.

    Raises ValueError or OSError, which name the file and what is wrong with it.
    """
    if data is not None:
        return Prepared(data)
    if images is None or not masks:
        raise ValueError("which images? give --images with --masks, or --data")
    folder = open_folder(images)
    paths = [as_path(path) for path in masks]
    if missing := [path for path in paths if not path.exists()]:
        raise FileNotFoundError(f"no masks at {missing[0]}")
    suffixes = {path.suffix.lower() for path in paths}
    if suffixes == {".jsonl"}:
        return annotated.Lines(folder, paths)
    first = paths[0]
    if first.suffix.lower() == ".json":
        if len(paths) > 2 or (len(paths) == 2 and not paths[1].is_dir()):
            raise ValueError(f"give {first} alone, or, if it is panoptic, with the directory of its PNGs")
        if _is_panoptic(first):
            return annotated.Panoptic(folder, first, paths[1] if len(paths) == 2 else first.with_suffix(""))
        if len(paths) == 2:
            raise ValueError(f"{first} is not panoptic: give it without {paths[1]}")
        return annotated.Coco(folder, first)
    if len(paths) > 1 or not (first.is_dir() or first.suffix == ".tar"):
        raise ValueError(f"masks are .json or .jsonl files or a directory, not {first}")
    if first.is_dir() and (lines := _lines(first)):
        return annotated.Lines(folder, lines)
    inside = open_folder(first)
    documents, found = inside.names(".json"), inside.names(".png")
    if not documents and not found:
        raise ValueError(f"{first} holds no masks: no .jsonl, .json or .png")
    if len(documents) >= len(found):  # whose images may be PNGs
        return annotated.Documents(folder, inside, documents)
    return pngs.Pngs(folder, inside, found, same=os.fspath(first) == os.fspath(as_path(images)))


def _lines(directory: Any) -> list[Any]:
    """Its `.jsonl` files, but for those in which a run of this command says what it skipped."""
    found = sorted(directory.glob("*.jsonl"))
    return [path for path in found if not path.name.startswith("skipped-")]


def _is_panoptic(path: Any) -> bool:
    """Whether annotations have segments; they come early or late in files of gigabytes."""
    key = json.dumps("segments_info").encode()
    with path.open("rb") as file:
        tail = b""
        while block := file.read(1 << 24):
            if key in tail + block:
                return True
            tail = block[-len(key) :]
    return False
