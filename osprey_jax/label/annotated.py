"""Masks in JSON: COCO's instances and panoptic files, lines of regions, a file for each image."""

import hashlib
import itertools
import os
import posixpath
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.sources.files import BOM, OtherFormError, field, json_lists, parse
from osprey_jax.image import load_image
from osprey_jax.label.folders import Folder, digest, open_folder
from osprey_jax.label.inputs import Fault, Picture, Region, parse_document, read_region
from osprey_jax.label.pngs import read_ids, segment
from osprey_jax.masks import segmentation_rle


class _Span(NamedTuple):
    """Where a value about an image is, and how many regions it has."""

    image: int
    file: int
    start: int
    stop: int
    regions: int


class _Spans:
    """Which bytes of which files are about which image: little memory for files of gigabytes."""

    def __init__(self, paths: Sequence[Path], numbers: Mapping[str, int], spans: Iterable[_Span]):
        """`numbers` of the images by their names, in order, are complete when `spans` are all read."""
        table = np.frombuffer(array("q", itertools.chain.from_iterable(spans)), np.int64).reshape(-1, 5)
        self._paths = tuple(paths)
        self._table = table[np.argsort(table[:, 0], kind="stable")]
        found, starts = np.unique(self._table[:, 0], return_index=True)
        self._ends = np.append(starts, len(table))
        names = list(numbers)
        self.names = [names[image] for image in found.tolist()]
        totals = np.append(0, np.cumsum(self._table[:, 4]))
        self.counts = np.diff(totals[self._ends])

    def values(self, index: int) -> list[Any]:
        """What is said about an image; raises ValueError or OSError."""
        values = []
        rows = self._table[self._ends[index] : self._ends[index + 1]]
        for number, group in itertools.groupby(rows.tolist(), key=lambda row: row[1]):
            with self._paths[number].open("rb") as file:
                for _, _, start, stop, _ in group:
                    file.seek(start)
                    values.append(parse(file.read(stop - start)))
        return values


class _Listed:
    """Images by their names, each with annotations that lie in files."""

    def __init__(self, images: Folder, spans: _Spans, categories: Mapping[Any, str], fingerprint: str):
        self._images, self._spans, self._categories = images, spans, categories
        self.left_out: list[str] = []
        self.counts, self.fingerprint = spans.counts, fingerprint

    def __len__(self) -> int:
        return len(self._spans.names)

    def source(self, index: int) -> Mapping[str, Any]:
        """See `Input`."""
        return {"image": self._spans.names[index]}

    def image(self, source: Mapping[str, Any]) -> bytes:
        """See `Input`."""
        return self._images.read(source["image"])

    def read(self, index: int) -> Picture:
        """See `Input`."""
        source = self.source(index)
        values = self._spans.values(index)
        image = load_image(self.image(source))
        return Picture(source, image, *self._regions(values, (image.shape[0], image.shape[1])))

    def _regions(
        self, values: Sequence[Any], size: tuple[int, int]
    ) -> tuple[tuple[Region, ...], tuple[Fault, ...]]:
        return regions(values, size, self._categories)


def regions(
    annotations: Iterable[Any], size: tuple[int, int], categories: Mapping[Any, str]
) -> tuple[tuple[Region, ...], tuple[Fault, ...]]:
    """The regions of annotations, and what is wrong with the others."""
    found, faults = [], []
    names = set[int | str]()
    for number, annotation in enumerate(annotations, 1):
        name = read_region(annotation, number)
        try:
            _once(name, names)
            rle = segmentation_rle(field(annotation, "segmentation", object), *size)
        except ValueError as error:
            faults.append(Fault(name, str(error)))
            continue
        label = annotation.get("label")
        label = label if isinstance(label, str) else categories.get(_key(annotation.get("category_id")))
        found.append(Region(name, label, rle))
    return tuple(found), tuple(faults)


def _once(name: int | str, names: set[int | str]) -> None:
    """Adds a region's name to those of its image; ValueError for one that is there already."""
    if name in names:
        raise ValueError(f"a region before it in the image is called {name!r}, too")
    names.add(name)


def _key(identity: Any) -> Any:
    return identity if isinstance(identity, int | float | str) else None


class Coco(_Listed):
    """COCO's instances: `images`, `annotations` and, if there are any, `categories`."""

    def __init__(self, images: Folder, path: Path):
        data = path.read_bytes()
        fingerprint = hashlib.blake2b(data, digest_size=16).hexdigest()
        numbers: dict[str, int] = {}  # images of one file are one image
        image_of: dict[Any, int] = {}
        spans = array("q")
        categories: dict[Any, str] = {}
        begin = len(BOM) if data.startswith(BOM) else 0
        waiting = array("q")
        owners = []
        try:
            for key, element in _lists(data[begin:]):
                value = element.value
                if not isinstance(value, dict):
                    continue
                if key == "images" and isinstance(value.get("file_name"), str):
                    identity = _key(value.get("id"))
                    image_of[identity] = numbers.setdefault(value["file_name"], len(numbers))
                elif key == "annotations":
                    owners.append(_key(value.get("image_id")))
                    waiting.extend((begin + element.start, begin + element.stop, self._count(value)))
                elif key == "categories" and isinstance(value.get("name"), str):
                    categories[_key(value.get("id"))] = value["name"]
        except OtherFormError as error:
            raise ValueError(f"{path} {error}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        for row, owner in enumerate(owners):
            if owner is not None and (image := image_of.get(owner)) is not None:
                spans.extend((image, 0, *waiting[3 * row : 3 * row + 3]))
        if not spans:
            raise ValueError(f"{path} has no annotations of its images")
        rows = (_Span(*spans[start : start + 5]) for start in range(0, len(spans), 5))
        super().__init__(images, _Spans([path], numbers, rows), categories, fingerprint)
        if strange := len(owners) - len(spans) // 5:
            self.left_out.append(
                f"{path}: {strange:,} of {len(owners):,} annotations belong to none of its images"
            )

    def _count(self, annotation: dict[str, Any]) -> int:
        return 1


def _lists(data: bytes) -> Iterator[tuple[str, Any]]:
    """Images and annotations, and categories where there are any."""
    try:
        yield from json_lists(data, ("images", "annotations", "categories"))
    except OtherFormError as error:
        if str(error) != "should have a list of categories":
            raise


class Panoptic(Coco):
    """COCO's panoptic annotations: for each image a PNG of ids and what is known of its segments."""

    def __init__(self, images: Folder, path: Path, pngs: Path):
        if not pngs.is_dir():
            raise FileNotFoundError(
                f"{path} is panoptic, but there is no directory {pngs} of its PNGs: name it"
            )
        self._pngs = open_folder(pngs)
        self._png_names: list[Any] = []
        super().__init__(images, path)
        sizes = ([name, self._pngs.size(name)] for name in self._png_names if isinstance(name, str))
        self.fingerprint = digest([self.fingerprint, *sizes])
        del self._png_names

    def _count(self, annotation: dict[str, Any]) -> int:
        self._png_names.append(annotation.get("file_name"))
        segments = annotation.get("segments_info")
        return len(segments) if isinstance(segments, list) else 0

    def _regions(
        self, values: Sequence[Any], size: tuple[int, int]
    ) -> tuple[tuple[Region, ...], tuple[Fault, ...]]:
        found, faults = [], []
        names = set[int | str]()
        for value in values:
            name = field(value, "file_name", str)
            ids = read_ids(self._pngs.read(name), name, size)
            for number, info in enumerate(field(value, "segments_info", list), 1):
                region = read_region(info, number)
                try:
                    _once(region, names)
                    label = self._categories.get(_key(info.get("category_id")))
                    found.append(Region(region, label, segment(ids, field(info, "id", int))))
                except ValueError as error:
                    faults.append(Fault(region, str(error)))
        return tuple(found), tuple(faults)


class Lines(_Listed):
    """JSON lines, of one region each or of one image: what `describe` and `label` write, too."""

    def __init__(self, images: Folder, paths: Sequence[Path]):
        numbers: dict[str, int] = {}
        digest = hashlib.blake2b(digest_size=16)
        spans = _Spans(paths, numbers, self._scan(paths, numbers, digest))
        if not spans.names:
            raise ValueError(f"{paths[0]} has no lines")
        super().__init__(images, spans, {}, digest.hexdigest())

    @staticmethod
    def _scan(paths: Sequence[Path], numbers: dict[str, int], digest: Any) -> Iterator[_Span]:
        for number, path in enumerate(paths):
            with path.open("rb") as file:
                start = 0
                for row, line in enumerate(file, 1):
                    stop = start + len(line)
                    digest.update(line)
                    if line.strip():
                        try:
                            value = parse(line)
                            image = image_name(value)
                            annotations = value.get("annotations")
                        except ValueError as error:
                            raise ValueError(f"{path}, line {row}: {error}") from error
                        count = len(annotations) if isinstance(annotations, list) else 1
                        yield _Span(numbers.setdefault(image, len(numbers)), number, start, stop, count)
                    start = stop

    def _regions(
        self, values: Sequence[Any], size: tuple[int, int]
    ) -> tuple[tuple[Region, ...], tuple[Fault, ...]]:
        return regions(itertools.chain.from_iterable(map(_annotations, values)), size, {})


def image_name(value: Any) -> str:
    """The image that a line or a document is about: `image`, a name or an object with a `file_name`."""
    image = field(value, "image", object)
    return field(image, "file_name", str) if isinstance(image, dict) else field(value, "image", str)


def _annotations(value: Any) -> list[Any]:
    return field(value, "annotations", list) if "annotations" in value else [value]


class Documents:
    """A JSON file for each image, as SA-1B has them, beside the image or elsewhere."""

    counts = None
    left_out = ()

    def __init__(self, images: Folder, documents: Folder, names: Sequence[str]):
        self._images, self._documents, self._names = images, documents, names
        self.fingerprint = digest([name, documents.size(name)] for name in names)

    def __len__(self) -> int:
        return len(self._names)

    def source(self, index: int) -> Mapping[str, Any]:
        """See `Input`; the document's name."""
        return {"image": self._names[index]}

    def image(self, source: Mapping[str, Any]) -> bytes:
        """See `Input`."""
        return self._images.read(source["image"])

    def read(self, index: int) -> Picture:
        """See `Input`."""
        name = self._names[index]
        value = parse_document(self._documents.read(name), name)
        source = {"image": posixpath.join(os.path.dirname(name), image_name(value))}
        image = load_image(self.image(source))
        found = regions(_annotations(value), (image.shape[0], image.shape[1]), {})
        return Picture(source, image, *found)
