"""A page to look at: some images of an output with their regions and words, in one file of HTML."""

import base64
import html
import io
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.reasons import message
from osprey_jax.figure import COLOURS
from osprey_jax.image import load_image
from osprey_jax.label.inputs import Input
from osprey_jax.label.outlines import places, shrink, svg_path
from osprey_jax.label.output import LABELS, read_run
from osprey_jax.masks import decode_rles

IMAGES = 36
REGIONS = 100
"""Of an image; the others are only counted."""
READ_WHOLE = 32 << 20
"""Bytes of output up to which all of it is read to choose from."""
SIDE = 640
"""Pixels of an image's longest side."""


def write_gallery(path: Path, output: Path, data: Input) -> None:
    """Writes the page. Raises ValueError where there is nothing to show; OSError."""
    found = list(sample(sorted(output.glob(f"{LABELS}*.jsonl")), IMAGES))
    if not found:
        raise ValueError(f"{output} has no lines to show")
    cards = "\n".join(_card(lines, data) for lines in found)
    of = (read_run(output) or {}).get("of", {})
    first = found[0][0]
    facts = (
        ("question", first["question"]),
        *((name, of[name]) for name in ("labels", "checkpoint") if of.get(name)),
        ("images", f"{len(found):,} of {len(data):,}"),
    )
    told = "".join(
        f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd></div>" for key, value in facts
    )
    page = resources.files(__package__).joinpath("gallery.html").read_text(encoding="utf-8")
    parts = {"facts": told, "cards": cards}
    page = re.sub("{{(facts|cards)}}", lambda match: parts[match[1]], page)  # once, for texts may hold such
    path.write_bytes(page.encode("utf-8", "backslashreplace"))


def check_page(path: Path, output: Path) -> None:
    """Raises ValueError where no page can be written, which changes nothing.

    One in the output needs nothing but the output. In a bucket it shows when the page is written.
    """
    if path.is_dir():
        raise ValueError(f"cannot write the gallery {path}: it is a directory")
    if path.parent == output or "://" in str(path):
        return
    there = path.exists()
    try:
        path.open("ab").close()
        if not there:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write the gallery {path}: {error.strerror}") from error


def sample(paths: Sequence[Path], count: int) -> Iterator[list[dict[str, Any]]]:
    """The lines of up to `count` images, spread over the files; all lines of an image stand together."""
    ends = np.cumsum([path.stat().st_size for path in paths])
    if not len(ends) or ends[-1] <= READ_WHOLE:
        lines = (json.loads(line) for path in paths for line in path.read_bytes().splitlines())
        images = [list(group) for _, group in itertools.groupby(lines, _identity)]
        chosen = min(count, len(images))
        yield from (images[number * len(images) // chosen] for number in range(chosen))
        return
    seen = set()
    for number in range(count):
        place = number * int(ends[-1]) // count
        file = int(np.searchsorted(ends, place, side="right"))
        begin = int(ends[file - 1]) if file else 0
        # Behind a place within a file's last image there is none.
        start, lines_ = _next_image(paths[file], place - begin) or _next_image(paths[file], 0) or (0, [])
        if lines_ and (file, start) not in seen:
            seen.add((file, start))
            yield lines_


def _next_image(path: Path, place: int) -> tuple[int, list[dict[str, Any]]] | None:
    """Where the first image begins that has no line before a place of a file, and its lines."""
    passed, start = None, 0
    lines: list[dict[str, Any]] = []
    with path.open("rb") as file:
        if place:
            file.seek(place)
            file.readline()
            line = file.readline()
            passed, start = _identity(json.loads(line)) if line else None, file.tell()
        for line in file:
            value = json.loads(line)
            if _identity(value) == passed:
                start += len(line)
            elif not lines or _identity(value) == _identity(lines[0]):
                lines.append(value)
            else:
                break
    return (start, lines) if lines else None


def _identity(line: Mapping[str, Any]) -> tuple[Any, Any]:
    return line["image"], line.get("record")


def _card(lines: Sequence[Mapping[str, Any]], data: Input) -> str:
    title = html.escape(str(lines[0]["image"]))
    try:
        picture = load_image(data.image(lines[0]))
    except (ValueError, OSError) as error:
        return f'<article><h2>{title}</h2><p class="gone">{html.escape(message(error))}</p></article>'
    height, width = picture.shape[:2]
    scale = SIDE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    shown = lines[:REGIONS]
    masks = [shrink(mask, size) for mask in decode_rles([line["segmentation"] for line in shown])]
    entries = "".join(_entry(number, line) for number, line in enumerate(shown, 1))
    if len(lines) > len(shown):
        entries += f'<li class="more">and {len(lines) - len(shown):,} more</li>'
    return (
        f"<article><h2>{title}<small>{len(lines):,} region{'s' if len(lines) > 1 else ''}</small></h2>"
        f'<div class="card"><figure><img loading="lazy" alt="" src="{_source(picture, size)}">'
        f"{_overlay(masks, size)}</figure><ol>{entries}</ol></div></article>"
    )


def _source(picture: np.ndarray, size: tuple[int, int]) -> str:
    """The image as a data URL; a small one isn't enlarged, which the page does."""
    image = Image.fromarray(picture)
    if image.height > size[0]:
        image = image.resize(size[::-1], Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(image.size) < SIDE // 2:
        image.save(buffer, "PNG")
        kind = "png"
    else:
        image.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _overlay(masks: Sequence[np.ndarray], size: tuple[int, int]) -> str:
    """The regions, small ones above large ones, and above them their numbers."""
    radius = 16 if len(masks) <= 12 else 12 if len(masks) <= 40 else 9
    order = sorted(range(len(masks)), key=lambda index: -int(masks[index].sum()))
    shapes = "".join(
        f'<path data-n="{index + 1}" style="--c:{_colour(index)}" d="{svg_path(masks[index])}"/>'
        for index in order
        if masks[index].any()
    )
    points = _places(masks, apart=2 * radius + 2)
    badges = "".join(
        f'<g data-n="{index + 1}" style="--c:{_colour(index)};--i:{_ink(index)}">'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{radius * 1.15:.0f}">{index + 1}</text></g>'
        for index, point in enumerate(points)
        if point is not None
        for x, y in [_within(point, size, radius + 2)]
    )
    return f'<svg viewBox="0 0 {size[1]} {size[0]}">{shapes}{badges}</svg>'


def _places(masks: Sequence[np.ndarray], *, apart: float) -> list[tuple[float, float] | None]:
    """Of a quarter of the masks' size, which is as good for numbers."""
    small = [mask[::4, ::4] if mask[::4, ::4].any() else shrink(mask, _quarter(mask)) for mask in masks]
    points = places(small, apart=apart / 4)
    return [None if point is None else (4 * point[0], 4 * point[1]) for point in points]


def _quarter(mask: np.ndarray) -> tuple[int, int]:
    return math.ceil(mask.shape[0] / 4), math.ceil(mask.shape[1] / 4)


def _within(point: tuple[float, float], size: tuple[int, int], margin: float) -> tuple[float, float]:
    x, y = (
        min(max(value, margin), max(side - margin, margin))
        for value, side in zip(point, size[::-1], strict=True)
    )
    return x, y


def _entry(number: int, line: Mapping[str, Any]) -> str:
    label = f'<span class="label">{html.escape(str(line["label"]))}</span>' if "label" in line else ""
    empty = "" if line["area"] else '<span class="label">empty mask</span>'
    share, of_what = line.get("probability"), "probability among the labels"
    if line.get("logprobs"):
        share = math.exp(sum(line["logprobs"]) / len(line["logprobs"]))
        of_what = "mean probability of its tokens"
    sure = "" if share is None else f'<span class="sure" title="{of_what}">{share:.0%}</span>'
    text = "<i>no label</i>" if line["text"] is None else html.escape(line["text"]) or "<i>nothing</i>"
    return (
        f'<li data-n="{number}"><b style="--c:{_colour(number - 1)};--i:{_ink(number - 1)}">{number}</b>'
        f"<span>{text}{label}{empty}</span>{sure}</li>"
    )


def _colour(index: int) -> str:
    return "#" + "".join(f"{value:02x}" for value in COLOURS[index % len(COLOURS)])


def _ink(index: int) -> str:
    red, green, blue = COLOURS[index % len(COLOURS)]
    return "#1c1c20" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#fff"
