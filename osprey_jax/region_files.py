"""Files of region masks: COCO json, lists of RLEs, label maps and mask images (NumPy and Pillow)."""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from osprey_jax.masks import decode_segmentation


@dataclasses.dataclass(frozen=True)
class Regions:
    """The regions of one image, in their file's order."""

    masks: np.ndarray
    """`(R, h, w)` bool, at the image's size."""
    ids: tuple[int | str, ...]
    """An annotation's id or a label map's value; where there is none, the number from 1."""
    labels: tuple[str | None, ...]
    """An annotation's category name, a mask image's name without its suffix, or None."""
    skipped: tuple[str, ...] = ()
    """What could not be read, one sentence for each annotation that is left out."""


def read_regions(
    paths: Sequence[str | os.PathLike], image_size: tuple[int, int], *, image_name: str = ""
) -> Regions:
    """Reads the masks of an image of `(h, w)` pixels.

    Args:
      paths: one `.json` file, or `.png` files and directories of them, read in natural order. The json is
        COCO's (polygons or RLEs, of any number of images) or a list of RLEs or of annotations. One PNG is a
        label map, a region for each value but 0, or a mask; several are a mask each.
      image_size: every mask must have it.
      image_name: finds the image in a COCO file, by `file_name` without its folders; a lone one needs none.

    Raises:
      ValueError: names the file, and the annotation: a path that can't be read or has another suffix, a mask
        of another size, no image of that name, no region. A bad annotation among good ones is only `skipped`.
    """
    files = _files(paths)
    if files[0].suffix.lower() == ".json":
        return _from_json(files[0], image_size, image_name)
    if len(files) == 1:
        return _from_label_map(files[0], image_size)
    masks = np.stack([single_mask(_one_channel(path, image_size), os.fspath(path)) for path in files])
    return Regions(masks, tuple(range(1, len(files) + 1)), tuple(path.stem for path in files))


def _files(paths: Sequence[str | os.PathLike]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [p for p in path.iterdir() if p.suffix.lower() == ".png" and not p.name.startswith(".")]
            if not inside:
                raise ValueError(f"no PNG masks in the directory {path}")
            files += sorted(inside, key=lambda path: natural(path.name))
        elif not path.exists():
            raise ValueError(f"no masks at {path}")
        elif path.suffix.lower() not in (".json", ".png"):
            raise ValueError(f"masks are .json or .png files, {path} is neither")
        else:
            files.append(path)
    if not files:
        raise ValueError("no masks files given")
    if len(files) > 1 and (other := [path for path in files if path.suffix.lower() == ".json"]):
        raise ValueError(f"give one json file or PNG masks, not {other[0]} among {len(files)} files")
    return files


def natural(name: str) -> list[str | int]:
    """A key that sorts `mask2` before `mask10`."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if index % 2 else part.lower() for index, part in enumerate(parts)]


def _from_json(path: Path, image_size: tuple[int, int], image_name: str) -> Regions:
    data = _parse(path)
    if isinstance(data, list):
        annotations, names = data, {}
        of_image = ""
    elif isinstance(data, dict) and all(isinstance(data.get(key), list) for key in ("images", "annotations")):
        image_ids = _image_ids(path, data["images"], image_size, image_name)
        entries = [entry for entry in data["annotations"] if isinstance(entry, dict)]
        annotations = [entry for entry in entries if entry.get("image_id") in image_ids]
        names = _category_names(data.get("categories"))
        of_image = f" of the image with id {', '.join(map(str, image_ids))}"
    else:
        raise ValueError(
            f"{path} is neither COCO json (an object with lists images and annotations) nor a list of RLEs"
        )
    if not annotations:
        raise ValueError(f"{path} has no annotations{of_image}")
    masks, ids, labels, skipped = [], [], [], []
    for number, annotation in enumerate(annotations, 1):
        given = annotation.get("id") if isinstance(annotation, dict) else None
        name = given if isinstance(given, int | str) else number
        try:
            masks.append(_decode(annotation, image_size))
        except ValueError as error:
            skipped.append(f"annotation {name}: {error}")
        else:
            ids.append(name)
            labels.append(names.get(str(annotation.get("category_id"))))
    if not masks:
        count = f"none of the {len(skipped)} annotations can be read; " if len(skipped) > 1 else ""
        raise ValueError(f"{path}: {count}{skipped[0]}")
    return Regions(np.stack(masks), tuple(ids), tuple(labels), tuple(skipped))


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid json: {error}") from error


def _image_ids(path: Path, images: list, image_size: tuple[int, int], image_name: str) -> list[Any]:
    """The ids that a COCO file gives to the image; referring expressions list an image once for each."""
    entries = [entry for entry in images if isinstance(entry, dict) and "id" in entry]
    named = [entry for entry in entries if _base_name(entry) == image_name]
    files = sorted({str(entry.get("file_name")) for entry in named or entries})
    if len(files) != 1:
        several = "several images" if named else "no image"
        listed = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
        raise ValueError(f"{path} has {several} called {image_name}; it has {listed or 'none at all'}")
    for entry in named or entries:
        size = (entry.get("height"), entry.get("width"))
        if all(isinstance(side, int) for side in size) and size != tuple(image_size):
            raise ValueError(
                f"{path} has masks for an image of {size} (height, width), "
                f"{image_name or 'this one'} is {tuple(image_size)}"
            )
    return [entry["id"] for entry in named or entries]


def _base_name(entry: dict[str, Any]) -> str:
    return re.split(r"[/\\]", str(entry.get("file_name")))[-1]


def _category_names(categories: Any) -> dict[str, str]:
    entries = categories if isinstance(categories, list) else []
    named = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
    return {str(entry.get("id")): entry["name"] for entry in named}


def _decode(annotation: Any, image_size: tuple[int, int]) -> np.ndarray:
    """The mask of an RLE, or of an object that has one, or polygons, as its `segmentation`."""
    if not isinstance(annotation, dict):
        raise ValueError(f"expected an RLE or an object with a segmentation, got {type(annotation).__name__}")
    if "segmentation" not in annotation and "counts" not in annotation:
        raise ValueError("it has no segmentation")
    height, width = image_size
    return decode_segmentation(annotation.get("segmentation", annotation), height, width)


def _from_label_map(path: Path, image_size: tuple[int, int]) -> Regions:
    values = _one_channel(path, image_size)
    found = np.unique(values[values != 0])
    if found.size == 0:
        raise ValueError(f"{path} is zero everywhere: it holds no region")
    if found.tolist() in ([1], [255]):
        return Regions(values[None] != 0, (1,), (path.stem,))
    return Regions(values == found[:, None, None], tuple(found.tolist()), (None,) * len(found))


def _one_channel(path: Path, image_size: tuple[int, int]) -> np.ndarray:
    values = read_png(path, os.fspath(path), image_size)
    if values.ndim != 2:
        raise ValueError(
            f"{path} is a colour image of {values.shape[2]} channels; a mask or label map has one channel"
        )
    return values


def read_png(file: Path | BinaryIO, name: str, size: tuple[int, int]) -> np.ndarray:
    """`(h, w)` or, of a colour image, `(h, w, channels)` int32; of a palette its indices, not its colours.

    Threads may read at the same time. Raises ValueError, which gives the file's `name`, for what can't be
    read or is not of `size`.
    """
    try:
        with Image.open(file, formats=("PNG",)) as image:
            found = (image.height, image.width)
            values = np.asarray(image) if found == tuple(size) else None
    except Exception as error:  # Pillow's readers raise all kinds of exceptions on broken files
        raise ValueError(f"cannot read {name}: {error}") from error
    if values is None:
        raise ValueError(f"{name} is {found} (height, width), the image is {tuple(size)}")
    if values.ndim == 3 and values.shape[2] == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    return values.astype(np.int32)


def single_mask(values: np.ndarray, name: str) -> np.ndarray:
    """`(h, w)` bool of a file's `(h, w)` values; ValueError, which gives its `name`, for several beside 0."""
    found = np.unique(values)
    if np.count_nonzero(found) > 1:
        few = ", ".join(map(str, found[:5].tolist())) + (", …" if found.size > 5 else "")
        raise ValueError(f"{name} holds the values {few}; each of several PNGs must be one mask of 0 and 255")
    return values != 0
