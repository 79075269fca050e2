"""What a line of a user's own data may hold, as `sources.custom` describes it, and the record that it is."""

import contextlib
import difflib
import functools
import io
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from data_pipelines.images import Images
from data_pipelines.records import Record, Rle, Turn
from osprey_jax.masks import encode_rle, segmentation_rle
from osprey_jax.prompt import IMAGE_TOKEN, MASK_TOKEN, OVERVIEW, POSITION_TOKEN, REGION, region_list

OPENING = f"{IMAGE_TOKEN}\n{OVERVIEW}"
SPECIAL = (IMAGE_TOKEN, MASK_TOKEN, POSITION_TOKEN, "<s>", "</s>", "<unk>")
SPEAKERS = ("human", "gpt")

_PLACEHOLDER = re.compile(r"<region([1-9][0-9]{0,5})>")
_NEARLY = re.compile(r"<\s{0,3}region[\s_#-]{0,3}[0-9]{0,20}\s{0,3}>", re.IGNORECASE)


class Problem(NamedTuple):
    """One thing that is wrong with a sample."""

    kind: str
    """What part of the sample it is about, in a word or two."""
    text: str


class BadSample(ValueError):
    """A sample that can't be used; `problems` are all that were found."""

    def __init__(self, problems: tuple[Problem, ...]):
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "; ".join(problem.text for problem in self.problems)


class Line(NamedTuple):
    """A line of a file, and where it is."""

    number: int
    """From 1, blank ones counted."""
    start: int
    """In bytes."""
    text: bytes
    """Without white space at its ends."""


def read_lines(file: BinaryIO, *, start: int = 0, number: int = 1) -> Iterator[Line]:
    """The lines of a file that aren't blank, from the byte `start` on, where line `number` begins."""
    file.seek(start)
    for data in file:
        if text := data.strip():
            yield Line(number, start + len(data) - len(data.lstrip()), text)
        number, start = number + 1, start + len(data)


def why_no_jsonl(path: Path, first: bytes) -> str | None:
    """What is said, behind the name of a file, of one whose first line tells that it is JSON as a whole."""
    if not (is_list := first.startswith(b"[")) and first != b"{":
        return None
    name, values = shlex.quote(str(path)), "'.[]'" if is_list else "."
    target = shlex.quote(f"{path}.jsonl")
    return f"is JSON and not JSONL, which has one object a line; convert it: jq -c {values} {name} > {target}"


def parse_line(data: bytes) -> dict[str, Any]:
    """The object of a line.

    Raises BadSample for what is no UTF-8, no JSON, no object, or not the same to every reader of JSON: NaN,
    Infinity and keys that are there twice.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entry = dict(pairs)
        if len(entry) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"the key {_quote(twice)} is there twice; keep one")
        return entry

    try:
        entry = json.loads(data.decode("utf-8"), parse_constant=refuse, object_pairs_hook=unique)
        if b"\\ud" in data.lower():
            # Such an escape can name half of a surrogate pair, which no file's name and no text can hold.
            json.dumps(entry, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise _bad("text", "holds half of a surrogate pair, which is no character; leave it out") from error
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} of the line"
        raise _bad("text", f"not UTF-8 at {where}; save the file as UTF-8") from error
    except RecursionError as error:
        raise _bad("JSON", "nested too deeply; a sample needs five levels") from error
    except json.JSONDecodeError as error:
        where = f"character {error.colno}"
        raise _bad("JSON", f"not JSON at {where}: {error.msg}; write one object a line") from error
    except ValueError as error:
        raise _bad("JSON", str(error)) from error
    if not isinstance(entry, dict):
        raise _bad("JSON", f"{_told(entry)} where an object is expected; write one object a line")
    return entry


def image_name(entry: dict[str, Any]) -> str:
    """Raises BadSample where a line names no image."""
    name = entry.get("image")
    if not isinstance(name, str) or not name:
        raise _bad("image", f"`image` is {_told_key(entry, 'image')}; give the name of its file")
    return name


def make_record(entry: dict[str, Any], images: Images, sample_id: str) -> Record:
    """Checks an object as `parse_line` gives it and reads its files.

    Raises BadSample with everything that is wrong and independent of the rest.
    """
    found = _Problems()
    given = entry.get("id", "")
    if isinstance(given, bool) or not isinstance(given, str | int):
        found.add("key", f"`id` is {_told(given)}; give a text or a whole number, or leave it out")
    if not isinstance(listed := entry.get("list_regions", False), bool):
        found.add("key", f"`list_regions` is {_told(listed)}; give true or false, or leave it out")
    image = size = None
    with found.noting("image"):
        name = image_name(entry)
        image = images.read(name)
        with open_image(image, name) as opened:
            size = opened.height, opened.width
    regions = entry.get("regions")
    if not isinstance(regions, list):
        told = _told_key(entry, "regions")
        found.add("key", f"`regions` is {told}; give a list, empty if there are none")
        regions = None
    masks: list[Rle] = []
    for number, region in enumerate(regions or (), 1):
        with found.noting("region", f"region {number}: "):
            make_mask = _mask_of(region)
            if size is not None:
                masks.append(make_mask(*size, images))
    turns = _turns(entry, None if regions is None else len(regions), found, listed=listed is True)
    if found.problems:
        raise BadSample(tuple(found.problems))
    named = f"{sample_id} ({given})" if given != "" else sample_id
    if listed and masks:
        opening, shown = OPENING + region_list(len(masks)), tuple(range(len(masks)))
    else:
        opening, shown = OPENING, ()
    return Record(named, image, tuple(masks), turns, opening=opening, opening_regions=shown)


def open_image(data: bytes, name: str, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Reads the header of a file's bytes; raises ValueError for what is no image or has too many pixels."""
    try:
        opened = Image.open(io.BytesIO(data), formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(_too_large(name)) from error
    except Exception as error:  # Pillow's readers raise all kinds of exceptions on broken files
        what = " or ".join(formats) if formats else "image that Pillow knows"
        raise ValueError(f"{name} is no {what}, or a damaged one ({len(data)} bytes)") from error
    if Image.MAX_IMAGE_PIXELS is not None and opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(_too_large(name))
    return opened


def _too_large(name: str) -> str:
    return f"{name} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller"


class _Problems:
    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def add(self, kind: str, text: str) -> None:
        self.problems.append(Problem(kind, text))

    @contextlib.contextmanager
    def noting(self, kind: str, where: str = "") -> Iterator[None]:
        """Notes what is raised inside instead of passing it on."""
        try:
            yield
        except BadSample as error:
            self.problems += [Problem(kind, where + text) for kind, text in error.problems]
        except FileNotFoundError as error:
            self.add("missing file", f"{where}{error}")
        except (ValueError, OSError) as error:
            self.add(kind, f"{where}{error}")


def _mask_of(region: Any) -> Callable[[int, int, Images], Rle]:
    """Makes the mask of a region for a height, a width and a place of files."""
    if not isinstance(region, dict):
        raise ValueError(f"{_told(region)} where an object with one of {', '.join(_MASKS)} is expected")
    keys = [key for key in _MASKS if key in region]
    if len(keys) != 1:
        told = " and ".join(keys) or f"no mask ({_told_keys(region, _MASKS)})"
        raise ValueError(f"it has {told}; give exactly one of {', '.join(_MASKS)}")
    return functools.partial(_MASKS[keys[0]], region[keys[0]])


def _polygon(value: Any, height: int, width: int, _: Images) -> Rle:
    if not isinstance(value, list):
        raise ValueError(f"`polygon` is {_told(value)}; give a list of [x0, y0, x1, y1, …] lists")
    polygons = value if value and isinstance(value[0], list) else [value]
    lists = [polygon for polygon in value if isinstance(polygon, list)]
    pairs = len(lists) == len(value) and all(len(polygon) == 2 for polygon in lists)
    if lists and (pairs or any(isinstance(item, list) for polygon in lists for item in polygon)):
        raise ValueError("`polygon` holds pairs; give flat lists of coordinates, no pairs: [[x0, y0, x1, …]]")
    return segmentation_rle(polygons, height, width)


def _rle(value: Any, height: int, width: int, _: Images) -> Rle:
    if not isinstance(value, dict):
        raise ValueError(f"`rle` is {_told(value)}; give an object with size and counts")
    return segmentation_rle(value, height, width)


def _png(value: Any, height: int, width: int, images: Images) -> Rle:
    if not isinstance(value, str) or not value:
        raise ValueError(f"`png` is {_told(value)}; give the name of its file")
    with open_image(images.read(value), value, formats=("PNG",)) as opened:
        if (opened.height, opened.width) != (height, width):
            found = opened.height, opened.width
            raise ValueError(f"{value} is {found} (height, width), the image is {(height, width)}")
        try:
            values = np.asarray(opened)
        except Exception as error:  # as above
            raise ValueError(f"cannot read {value}: {error}") from error
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise ValueError(f"{value} is a colour image ({opened.mode}); save the mask with one channel")
        values = values[..., 0]
    return encode_rle(values != 0)


def _box(value: Any, height: int, width: int, _: Images) -> Rle:
    if not (isinstance(value, list) and len(value) == 4 and all(map(_is_finite, value))):
        raise ValueError(f"`box` is {_shown(value)}, not four finite numbers; give [x0, y0, x1, y1]")
    x0, y0, x1, y1 = value
    if x0 >= x1 or y0 >= y1:
        raise ValueError("`box` must have x0 < x1 and y0 < y1: two corners, no width and height")

    def pixels(low: float, high: float, side: int) -> slice:
        return slice(*(math.ceil(min(max(v, 0), side) - 0.5) for v in (low, high)))

    mask = np.zeros((height, width), bool)
    mask[pixels(y0, y1, height), pixels(x0, x1, width)] = True
    return encode_rle(mask)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def seems_normalized(region: Any) -> bool:
    """Whether a region's coordinates look like shares of the image's sides instead of pixels."""
    if not isinstance(region, dict):
        return False
    if "box" in region:
        # The first pixel's box is one in pixels.
        coordinates = region["box"]
        return all(abs(v) <= 1 for v in coordinates) and any(v != int(v) for v in coordinates)
    if "polygon" in region:
        value = region["polygon"]
        polygons = value if isinstance(value[0], list) else [value]
        return all(abs(v) <= 1 for polygon in polygons for v in polygon)
    return False


_MASKS: dict[str, Callable[[Any, int, int, Images], Rle]] = {
    "polygon": _polygon,
    "rle": _rle,
    "png": _png,
    "box": _box,
}


def _turns(entry: dict[str, Any], regions: int | None, found: _Problems, *, listed: bool) -> tuple[Turn, ...]:
    said = entry.get("conversations")
    if not isinstance(said, list) or not said:
        told = _told_key(entry, "conversations")
        found.add("key", f"`conversations` is {told}; give a list of questions and answers")
        return ()
    texts = []
    for number, (message, speaker) in enumerate(zip(said, SPEAKERS * len(said), strict=False), 1):
        with found.noting("conversation", f"message {number}: "):
            texts.append(_text(message, speaker, regions))
    if len(said) % 2:
        found.add("conversation", f"message {len(said)} has no answer; a conversation ends with gpt's")
    if len(texts) < len(said) or len(said) % 2:
        return ()
    questions, answers = texts[::2], [_as_words(text) for text in texts[1::2]]
    if listed:
        return tuple(Turn(_as_words(q), a) for q, a in zip(questions, answers, strict=True))
    return tuple(
        Turn(
            _PLACEHOLDER.sub(REGION, question),
            answer,
            tuple(int(number) - 1 for number in _PLACEHOLDER.findall(question)),
        )
        for question, answer in zip(questions, answers, strict=True)
    )


def _as_words(text: str) -> str:
    """`<region1>` becomes `region1`."""
    return _PLACEHOLDER.sub(lambda match: match[0][1:-1], text)


def _text(message: Any, speaker: str, regions: int | None) -> str:
    """The text of a message, with its placeholders as they are."""
    if not isinstance(message, dict):
        raise ValueError(f"{_told(message)} where an object with from and value is expected")
    found = _Problems()
    if message.get("from") != speaker:
        told = _told(message.get("from"), "from" in message)
        found.add("conversation", f"`from` is {told}, not {speaker}: human and gpt take turns, human first")
    text = message.get("value")
    if not isinstance(text, str) or not text.strip():
        found.add("conversation", f"`value` is {_told(text, 'value' in message)}; give a text")
        raise BadSample(tuple(found.problems))
    for token in SPECIAL:
        if token in text:
            found.add("special token", f"{token} is in the text; it can't be written, leave it out")
    for near in _NEARLY.findall(text):
        if not _PLACEHOLDER.fullmatch(near):
            found.add("placeholder", f"{_quote(near)} names no region; write <region1>, <region2>, …")
    for number in dict.fromkeys(map(int, _PLACEHOLDER.findall(text))):
        if regions is not None and number > regions:
            there = "there is 1 region" if regions == 1 else f"there are {regions} regions"
            found.add("placeholder", f"<region{number}> is named, {there}")
    if found.problems:
        raise BadSample(tuple(found.problems))
    return text


def _bad(kind: str, text: str) -> BadSample:
    return BadSample((Problem(kind, text),))


def _told(value: Any, there: bool = True) -> str:
    """A value of JSON for a message, not at length."""
    if not there:
        return "missing"
    kinds = {list: "a list", dict: "an object", type(None): "null", bool: "true or false", str: "a text"}
    if isinstance(value, str | list | dict) and not value:
        return f"{kinds[type(value)]} that is empty"
    return _quote(value) if isinstance(value, str) else kinds.get(type(value), "a number")


def _told_key(entry: dict[str, Any], key: str) -> str:
    """The value of a key for a message; where there is none, the keys that there are."""
    told = _told(entry.get(key), key in entry)
    return told if key in entry else f"{told} ({_told_keys(entry, [key])})"


def _told_keys(entry: dict[str, Any], wanted: Iterable[str]) -> str:
    """The keys of an object, and which of them is nearest to a wanted one."""
    keys = ", ".join(map(_quote, list(entry)[:8])) + (", …" if len(entry) > 8 else "")
    short = [key for key in list(entry)[:100] if len(key) <= 40]
    near = [(key, want) for want in wanted for key in difflib.get_close_matches(want, short, 1)]
    meant = f"; is {_quote(near[0][0])} meant to be {near[0][1]}?" if near else ""
    return f"its keys are {keys}{meant}" if entry else "it has no keys"


def _shown(value: Any) -> str:
    """A value of JSON as it stands where that is short."""
    if not isinstance(value, list) or not value:
        return _told(value)
    inside: dict[type, str] = {list: "[…]", dict: "{…}"}
    text = ", ".join(inside.get(type(item)) or json.dumps(item)[:20] for item in value[:8])
    return f"[{text}{', …' if len(value) > 8 else ''}]"


def _quote(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:40] + "…")
