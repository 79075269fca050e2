"""What a model says of samples whose truth is known: answers, the share that is right, and pictures."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipelines.conversation import Conversation, converse, draws
from data_pipelines.records import Record, Source
from data_pipelines.shapes import Scene, Shapes, short_description
from data_pipelines.transforms import encode_image
from osprey_jax.config import OspreyConfig
from osprey_jax.engine import Prepared
from osprey_jax.figure import draw_regions, draw_words
from osprey_jax.generate import Greedy
from osprey_jax.image import load_image
from osprey_jax.masks import decode_rles
from osprey_jax.predictor import Osprey
from osprey_jax.prompt import REGION, SYSTEM_INFERENCE, conversation
from osprey_jax.request import Decoding

COLUMNS = 3
"""Pictures in a row of a sheet, at most."""
LONGEST = 48
"""Tokens of an answer to a sample's question."""
LOOKED_THROUGH = 100
"""Samples of a source among which some to be asked about are searched."""


class Described(NamedTuple):
    """A scene and, for each of its regions, the truth and the model's words."""

    scene: Scene
    truths: list[str]
    answers: list[str]


class Asked(NamedTuple):
    """The first question of a sample's conversation, as the network takes it."""

    record: Record
    said: Conversation
    prepared: Prepared
    """The regions that the opening and the question name, in their order."""

    @property
    def question(self) -> str:
        """In words, without the opening; regions go by their numbers."""
        first, *others = self.said.said[0].question.split(REGION)
        start = len(self.said.opening_regions) + 1
        numbered = (f"region{number}{text}" for number, text in enumerate(others, start))
        return first + "".join(numbered)

    @property
    def truth(self) -> str:
        """The answer that the data have."""
        return self.said.turns[0][1]


def describe_scenes(osprey: Osprey, source: Shapes, *, regions: int) -> Iterator[Described]:
    """Short descriptions of scenes, until at least so many regions are described."""
    scenes = map(source.scene, range(len(source)))
    while regions > 0 and (scene := next(scenes, None)) is not None:
        truths = [f"{short_description(scene, region)}." for region in range(len(scene.masks))]
        yield Described(scene, truths, osprey.describe(scene.image, scene.masks))
        regions -= len(truths)


def share_equal(truths: Sequence[str], answers: Sequence[str]) -> float:
    """How many of the answers are the truth, as a share."""
    return sum(truth == words for truth, words in zip(truths, answers, strict=True)) / len(truths)


def exact_match(described: Sequence[Described]) -> float:
    """The share of regions whose words are the truth."""
    pairs = [pair for item in described for pair in zip(item.truths, item.answers, strict=True)]
    return share_equal(*zip(*pairs, strict=True))


def first_question(config: OspreyConfig, record: Record, rng: np.random.Generator) -> Asked:
    """Draws a record's conversation and takes what its first question needs.

    Raises ValueError where that can't be: an image that can't be read, no image, or an image's caption, which
    is no answer.
    """
    if record.image is None or record.plain:
        raise ValueError(f"{record.sample_id}: nothing is asked about an image")
    said = converse(record, rng)
    named = [record.masks[region] for region in said.regions[0]]
    pixels, masks = encode_image(record.image, named, config)
    assert pixels is not None, "there is an image"
    return Asked(record, said, Prepared(pixels, masks))


def some_questions(config: OspreyConfig, source: Source, *, count: int) -> list[Asked]:
    """The first questions of up to `count` samples from all over a source, the same ones each time."""
    found: list[Asked] = []
    for index in range(0, len(source), max(1, len(source) // LOOKED_THROUGH)):
        if len(found) == count:
            break
        try:
            found.append(first_question(config, source[index], draws(0, source.name, 0, index)))
        except (ValueError, OSError):
            continue  # the loader tells what of the data is broken
    return found


def answer(osprey: Osprey, asked: Asked) -> str:
    """The model's answer to a sample's first question."""
    prompt = conversation([(asked.said.turns[0][0], None)], system=SYSTEM_INFERENCE)
    return osprey.complete(asked.prepared, prompt, Decoding(Greedy(), LONGEST, seed=0, stop=()))


def draw_scenes(described: Sequence[Described]) -> Image.Image:
    """A sheet of scenes with their regions and the model's words; a wrong answer has its truth along."""
    pictures = []
    for scene, truths, answers in described:
        words = [a if a == t else f"{a} [truth: {t}]" for t, a in zip(truths, answers, strict=True)]
        times = max(1, round(480 / len(scene.image)))
        image, masks = (
            x.repeat(times, axis=-2).repeat(times, axis=-1)
            for x in (scene.image.transpose(2, 0, 1), scene.masks)
        )
        pictures.append(draw_regions(image.transpose(1, 2, 0), masks, words, tint=0))
    return sheet(pictures)


def draw_answers(answered: Sequence[tuple[Asked, str]]) -> Image.Image:
    """A sheet of images with the regions that a question names, the question, the answer and the truth."""
    pictures = []
    for asked, words in answered:
        assert asked.record.image is not None, "there is an image"
        image = load_image(asked.record.image)
        masks = decode_rles([asked.record.masks[region] for region in asked.said.regions[0]])
        if len(masks) and masks.shape[1:] != image.shape[:2]:  # images may be smaller than their masks
            size = masks.shape[2], masks.shape[1]
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
        told = [f"asked: {asked.question}", f"answer: {words}", f"truth: {asked.truth}"]
        pictures.append(draw_words(image, masks, told))
    return sheet(pictures)


def sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in rows, at half their size."""
    columns = min(COLUMNS, math.ceil(math.sqrt(len(pictures))))
    width = max(picture.width for picture in pictures)
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (width * columns, sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            sheet.paste(picture, (column * width, sum(heights[:number])))
    return sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)
