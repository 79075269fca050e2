"""Data sets in COCO's format: one conversation for each image, a turn for each of its annotations."""

import abc
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from data_pipelines.records import Record, Rle, Turn
from data_pipelines.sources.files import (
    Element,
    FileSource,
    after_underscore,
    field,
    json_lists,
    region_rle,
    sides,
    told_name,
)
from osprey_jax.prompt import IMAGE_TOKEN, OVERVIEW, REGION

PASCAL_CATEGORIES = (
    "potted plant, aeroplane, cow, cat, bus, horse, car, dog, bicycle, person, bird, bottle, sheep, motorbike"
)
PASCAL_PARTS = (
    "eye, window, cap, headlight, hand, mirror, arm, plant, wheel, ear, pot, foot, leg, nose, body, horn, "
    "handlebar, neck, license plate, paw, saddle, head, muzzle, tail, wing, beak, hair, torso, door, mouth"
)
PART_IMAGENET_CATEGORIES = (
    "Bottle, Biped, Quadruped, Fish, Reptile, Bicycle, Bird, Car, Boat, Snake, Aeroplane"
)
PART_IMAGENET_PARTS = "Tier, Hand, Wing, Mouth, Tail, Side, Fin, Engine, Foot, Head, Body, Sail, Seat"


class _CocoFile(FileSource):
    """Turns that don't depend on each other, in the order of the file's annotations."""

    opening: ClassVar[str]
    at_most: ClassVar[int]
    lists: ClassVar[tuple[str, ...]] = ("images", "annotations")
    bare: ClassVar[str] = "an image without annotations"
    """Why an image has no index."""

    def _find(self, data: bytes) -> Iterator[tuple[str, Sequence[Element]]]:
        images: dict[Any, tuple[str, Element]] = {}
        annotations: dict[Any, list[Element]] = {}
        for key, element in json_lists(data, self.lists):
            value, place = element.value, element._replace(value=None)  # all values are too much to keep
            if key == "images":
                # Of entries with one id the last counts, in the first one's place.
                images[_identity(value, "id")] = told_name(self._image_name, value), place
            elif key == "annotations":
                if self._counts(value):
                    annotations.setdefault(_identity(value, "image_id"), []).append(place)
            else:
                self._note(value)
        annotations.pop(None, None)
        for identity, (name, image) in images.items():
            if found := annotations.get(identity):
                yield name, (image, *found)
            else:
                self._dropped[self.bare] += 1

    def _counts(self, annotation: Any) -> bool:
        return True

    def _note(self, value: Any) -> None:
        """Takes an element of a list other than images and annotations."""

    def _image_name(self, sample: Any) -> str:
        return field(sample, "file_name", str)

    def _record(self, sample_id: str, *values: Any) -> Record:
        image, *annotations = values
        height, width = sides(image)
        masks: list[Rle] = []
        turns: list[Turn] = []
        broken: list[str] = []
        for number, annotation in enumerate(annotations, 1):
            try:
                answer = self._answer(image, annotation)
                masks.append(region_rle(annotation, height, width))
            except ValueError as error:
                broken.append(f"region {number} of {len(annotations)}: {error}")
            else:
                turns.append(self._turn(answer, len(turns)))
        if not turns:
            raise ValueError(broken[0])
        return Record(
            sample_id=sample_id,
            image=self._images.read(self._image_name(image)),
            masks=tuple(masks),
            turns=tuple(turns),
            opening=self.opening,
            broken_regions=tuple(broken),
            at_most=self.at_most,
        )

    def _turn(self, answer: str, region: int) -> Turn:
        return Turn(REGION, answer, (region,))

    @abc.abstractmethod
    def _answer(self, image: Any, annotation: Any) -> str:
        """What is said about an annotation."""


def _identity(value: Any, key: str) -> Any:
    """An id; None, which no two things share, where there is none."""
    identity = value.get(key) if isinstance(value, dict) else None
    return identity if isinstance(identity, int | float | str) else None


class Coco(_CocoFile):
    """COCO's instances: the category of each."""

    name = "coco"
    opening = (
        f"{IMAGE_TOKEN}\nEach question of this conversation gives you one region of the picture. Look at "
        "what is there and reply with the name of its category, nothing else.\n"
    )
    at_most = 20
    lists = ("images", "annotations", "categories")

    def _find(self, data: bytes) -> Iterator[tuple[str, Sequence[Element]]]:
        self._categories: dict[Any, Any] = {}
        return super()._find(data)

    def _note(self, value: Any) -> None:
        self._categories[_identity(value, "id")] = value

    def _answer(self, image: Any, annotation: Any) -> str:
        category = field(annotation, "category_id", object)
        if _identity(annotation, "category_id") not in self._categories:
            raise ValueError(f"no category {category} in the file")
        return field(self._categories[category], "name", str)


def _parts_opening(answer_format: str, categories: str, parts: str) -> str:
    return (
        f"{IMAGE_TOKEN}\nEach question of this conversation gives you one region of the picture, which may "
        "hold a part of an object. Reply with the object's category and the name of the part, written as "
        f"{answer_format}. Categories are {categories}. Parts are {parts}.\n"
    )


class PascalPart(Coco):
    """Parts of Pascal VOC's objects, named as in `dog:ear`."""

    name = "pascal_part"
    opening = _parts_opening("category:part", PASCAL_CATEGORIES, PASCAL_PARTS)
    at_most = 15


class PartImageNet(Coco):
    """Parts of ImageNet's objects, named as in `Quadruped Head`."""

    name = "part_imagenet"
    opening = _parts_opening("category part", PART_IMAGENET_CATEGORIES, PART_IMAGENET_PARTS)
    at_most = 15


_ONE_OBJECT = (
    f"{IMAGE_TOKEN}\nYou are given one region with one object in it; the picture may hold more of them. "
    "Describe that object by its relation to the other objects, "
)


class RefCoco(_CocoFile):
    """RefCOCO: expressions that tell an object from the others of its image, which has one caption."""

    name = "refcoco"
    opening = f"{_ONE_OBJECT}by its position in the picture and by its basic attributes."
    at_most = 15

    def _image_name(self, sample: Any) -> str:
        return after_underscore(super()._image_name(sample))

    def _answer(self, image: Any, annotation: Any) -> str:
        return field(image, "caption", str)


class RefCocoPlus(RefCoco):
    """RefCOCO+: the same without positions."""

    name = "refcoco_plus"
    opening = f"{_ONE_OBJECT}and by its basic attributes, but not by its position in the picture."


class VisualGenome(_CocoFile):
    """Visual Genome: a short description of each region."""

    name = "vg"
    opening = f"{IMAGE_TOKEN}\n{OVERVIEW}"
    at_most = 3
    bare = "an image without annotations, or with ignored ones only"

    def _counts(self, annotation: Any) -> bool:
        return not (isinstance(annotation, dict) and annotation.get("ignore"))

    def _answer(self, image: Any, annotation: Any) -> str:
        return field(annotation, "caption", str)

    def _turn(self, answer: str, region: int) -> Turn:
        limit = " Answer the question using a short phrase."
        return Turn(limit, answer, (region,), phrases="short", slot=REGION)
