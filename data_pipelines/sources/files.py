"""What all sources share that read annotation files: finding samples in them, checks, images."""

import abc
import collections
import contextlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from data_pipelines.images import open_images
from data_pipelines.records import Record, Rle
from osprey_jax.masks import segmentation_rle

T = TypeVar("T")

BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")
_AFTER_ELEMENT = re.compile(r"[ \t\n\r]*([,\]])[ \t\n\r]*")


class Element(NamedTuple):
    """A value in a file and where its bytes are."""

    value: Any
    """None where it is no JSON or no UTF-8 and only its place is known."""
    start: int
    stop: int


class FileSource(abc.ABC):
    """Records out of one annotation file and a place of images.

    Keeps where in the file samples are, and reads them there again: of a file of gigabytes, little lies in
    the memory of each worker. A bad sample is its own affair: it raises when it is asked for.

    Raises:
      OSError: a file that can't be read.
      ValueError: a file that is no JSON or of another form.
    """

    name: ClassVar[str]

    def __init__(self, annotations: str | os.PathLike[str], images: str | os.PathLike[str]):
        self._path = Path(annotations)
        self._images = open_images(images)
        data = self._path.read_bytes()
        self._stamp = _stamp(self._path.stat())
        self._begin = len(BOM) if data.startswith(BOM) else 0
        self._dropped: collections.Counter[str] = collections.Counter()
        spans, ends, names, name_ends = array("q"), array("q", [0]), bytearray(), array("q", [0])
        for name, elements in self._found(data[self._begin :]):
            for element in elements:
                spans.extend(element[1:])
            ends.append(len(spans) // 2)
            names += name.encode("utf-8", "surrogatepass")
            name_ends.append(len(names))
        self._spans = np.array(spans, np.int64).reshape(-1, 2)
        self._ends = np.array(ends, np.int64)
        self._names, self._name_ends = bytes(names), np.array(name_ends, np.int64)

    def _found(self, data: bytes) -> Iterator[tuple[str, Sequence[Element]]]:
        try:
            yield from self._find(data)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self._path} is no JSON: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{self._path} is nested too deeply") from error
        except OtherFormError as error:
            raise ValueError(f"{self._path} {error}") from error

    @property
    def dropped(self) -> Mapping[str, int]:
        """Samples of the file that aren't counted and have no index, by the reason."""
        return self._dropped

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Record:
        return self._record(f"{self.name}/{index}", *map(parse, self._read(index)))

    def image_key(self, index: int) -> str:
        """The resolved path of the record's image; without an image a name that no other record has."""
        self._check(index)
        name = self._names[self._name_ends[index] : self._name_ends[index + 1]].decode(
            "utf-8", "surrogatepass"
        )
        # A name that can't be used is refused with its record.
        with contextlib.suppress(ValueError):
            return self._images.key(name)
        return f"{self.name}/{index}"

    def _read(self, index: int) -> list[bytes]:
        """The bytes of the values that belong to a sample."""
        self._check(index)
        found = []
        with self._path.open("rb") as file:
            if _stamp(os.fstat(file.fileno())) != self._stamp:
                raise OSError(f"{self._path} has changed since it was opened")
            for start, stop in self._spans[self._ends[index] : self._ends[index + 1]].tolist():
                file.seek(self._begin + start)
                found.append(file.read(stop - start))
        return found

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"no sample {index} among {len(self)} of {self._path}")

    @abc.abstractmethod
    def _find(self, data: bytes) -> Iterator[tuple[str, Sequence[Element]]]:
        """For each sample that is kept its image's name, or "", and what belongs to it; counts the others."""

    @abc.abstractmethod
    def _record(self, sample_id: str, *values: Any) -> Record:
        """Makes a record of the parsed values; raises ValueError or OSError where they can't be used."""


def _stamp(status: os.stat_result) -> tuple[int, int]:
    """What changes with a file."""
    return status.st_size, status.st_mtime_ns


class SampleSource(FileSource):
    """A source whose samples are values of their own: elements of a list, or lines of a JSONL."""

    lines: ClassVar[bool] = False

    def _find(self, data: bytes) -> Iterator[tuple[str, Sequence[Element]]]:
        for element in json_lines(data, self._dropped) if self.lines else json_list(data):
            if (reason := self._why_dropped(element.value)) is not None:
                self._dropped[reason] += 1
            else:
                yield told_name(self._image_name, element.value), (element,)

    def _why_dropped(self, sample: Any) -> str | None:
        """Why a sample of whatever form has no index, if it hasn't."""
        return None

    @abc.abstractmethod
    def _image_name(self, sample: Any) -> str:
        """The image's name, "" for a sample without one; ValueError where it doesn't tell."""


def told_name(image_name: Callable[[Any], str], sample: Any) -> str:
    """The name, or "" where there is an error: what is wrong with a sample is said when it is asked for."""
    try:
        return image_name(sample)
    except ValueError:
        return ""


class OtherFormError(ValueError):
    """A file that is JSON, but not what its source expects; the message goes on after the file's name."""


def json_lines(data: bytes, dropped: collections.Counter[str]) -> Iterator[Element]:
    """The values of a JSONL, empty lines left out; lines that are no JSON are counted."""
    start = 0
    while start < len(data):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        if line := data[start:stop].strip():
            try:
                yield Element(parse(line), start, stop)
            except ValueError:
                dropped["a line that is no JSON"] += 1
        start = stop + 1


def json_list(data: bytes) -> Iterator[Element]:
    """The elements of a file that is a list."""
    scanner = _Scanner(data)
    if not scanner.take("["):
        raise OtherFormError("should hold a list")
    yield from scanner.elements()
    scanner.end()


def json_lists(data: bytes, names: Sequence[str]) -> Iterator[tuple[str, Element]]:
    """The elements of lists that a file's object holds under these names, with the name."""
    scanner = _Scanner(data)
    if not scanner.take("{"):
        raise OtherFormError("should hold an object")
    missing = set(names)
    for key in scanner.object_keys():
        if key in names:
            if not scanner.take("["):
                raise OtherFormError(f"should have a list of {key}")
            missing.discard(key)
            yield from ((key, element) for element in scanner.elements())
        else:
            scanner.value()
    scanner.end()
    if missing:
        raise OtherFormError(f"should have a list of {' and '.join(sorted(missing))}")


class _Scanner:
    """Goes through JSON value by value, as fast as the decoder, without keeping what it has seen."""

    def __init__(self, data: bytes):
        self._data = data
        # One character a byte: places in the text are those in the file. JSON's own signs are ASCII.
        self._text = data.decode("latin-1")
        self._ascii = data.isascii()
        self._decode = json.JSONDecoder().raw_decode
        self._at = 0

    def take(self, sign: str) -> bool:
        """Goes past white space, and past the sign if that comes next."""
        self._at = self._space()
        found = self._text.startswith(sign, self._at)
        self._at += len(sign) if found else 0
        return found

    def value(self) -> Any:
        """The value that comes next; texts that aren't ASCII are wrong in it."""
        value, self._at = self._decode(self._text, self._space())
        return value

    def elements(self) -> Iterator[Element]:
        """What a list holds whose bracket was taken."""
        if self.take("]"):
            return
        self._at = self._space()
        while True:
            start = self._at
            value, stop = self._decode(self._text, start)
            if not self._ascii and not (sample := self._data[start:stop]).isascii():
                try:
                    value = parse(sample)
                except ValueError:
                    value = None
            yield Element(value, start, stop)
            after = _AFTER_ELEMENT.match(self._text, stop)
            if after is None:
                raise json.JSONDecodeError("Expecting ',' or ']'", self._text, stop)
            self._at = after.end()
            if after[1] == "]":
                return

    def object_keys(self) -> Iterator[str]:
        """The keys of an object whose brace was taken; after each, its value has to be taken."""
        if self.take("}"):
            return
        while True:
            key = self.value()
            if not isinstance(key, str) or not self.take(":"):
                raise json.JSONDecodeError("Expecting a key and ':'", self._text, self._at)
            yield key
            if self.take("}"):
                return
            if not self.take(","):
                raise json.JSONDecodeError("Expecting ',' or '}'", self._text, self._at)

    def end(self) -> None:
        """Nothing may follow."""
        if self._space() != len(self._text):
            raise json.JSONDecodeError("Extra data", self._text, self._at)

    def _space(self) -> int:
        match = _SPACE.match(self._text, self._at)
        assert match is not None
        return match.end()


def parse(data: bytes) -> Any:
    """Parses JSON; raises ValueError."""
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"the sample is no UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"the sample is no JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("the sample is nested too deeply") from error


def field(fields: Any, key: str, kind: type[T]) -> T:
    """What an object of a file has under a key; ValueError where it hasn't, or something of another type."""
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object with {key!r}, got {type(fields).__name__}")
    if key not in fields:
        raise ValueError(f"no key {key!r} among {sorted(fields)}")
    if not isinstance(value := fields[key], kind):
        raise ValueError(f"{key!r} should be {kind.__name__}, got {type(value).__name__}")
    return value


def strings(fields: Any, key: str) -> list[str]:
    """A list of strings under a key."""
    values = field(fields, key, list)
    if strange := [value for value in values if not isinstance(value, str)]:
        raise ValueError(f"{key!r} should hold str only, got {type(strange[0]).__name__}")
    return values


def sides(fields: Any) -> tuple[int, int]:
    """Height and width of a sample's image as it states them, which is in numbers or their digits."""
    found = []
    for key in ("height", "width"):
        value: Any = field(fields, key, object)
        try:
            side = int(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{key!r} should be a whole number, got {value!r}") from None
        if side <= 0:
            raise ValueError(f"{key!r} should be positive, got {side}")
        found.append(side)
    return found[0], found[1]


def region_rles(annotations: Sequence[Any], height: int, width: int) -> tuple[Rle, ...]:
    """The masks of annotations, as `region_rle` reads them."""
    rles = []
    for number, annotation in enumerate(annotations, 1):
        try:
            rles.append(region_rle(annotation, height, width))
        except ValueError as error:
            raise ValueError(f"region {number} of {len(annotations)}: {error}") from error
    return tuple(rles)


def region_rle(annotation: Any, height: int, width: int) -> Rle:
    """The mask of an annotation with a `segmentation` in any of COCO's three forms."""
    return segmentation_rle(field(annotation, "segmentation", object), height, width)


def after_underscore(file_name: str) -> str:
    """The image's own name in names such as `COCO_train2014_000000000009.jpg`."""
    return file_name.rpartition("_")[2]
