"""A picture of one sample: the image with its numbered masks, below it the words, with loss in colour."""

import functools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.looking import Sample, Span, areas, counts, pixels, spans
from osprey_jax.figure import COLOURS, draw_regions
from osprey_jax.masks import decode_rles
from osprey_jax.prompt import REGION, Tokenizer

PAPER, PANEL, RULE = (255, 255, 255), (247, 247, 249), (222, 222, 228)
INK, FAINT = (60, 60, 68), (120, 120, 128)
LOSS_INK, LOSS_PAPER = (0, 78, 44), (193, 236, 209)
TEXT_SIZE, LINE_HEIGHT, MARGIN = 18, 27, 20
MIN_WIDTH, MAX_SIDE = 900, 1000
MAX_LINES = 400
"""Of the words; what comes after them is left out."""


class _Word(NamedTuple):
    text: str
    has_loss: bool
    region: int = 0
    """The number of the region that it stands for, from 1."""


def draw_sample(sample: Sample, tokenizer: Tokenizer) -> Image.Image:
    """Draws a sample as `to_text` tells it; glyphs that Pillow's own font lacks are boxes."""
    scene = _scene(sample)
    width = max(MIN_WIDTH, scene.width if scene else 0)
    inner = width - 4 * MARGIN
    lines = _wrap(_words(spans(sample.dialogue, tokenizer)), inner)
    top = scene.height if scene else MARGIN
    height = top + 2 * LINE_HEIGHT + (len(lines) + 1) * LINE_HEIGHT
    sheet = Image.new("RGB", (width, height), PAPER)
    if scene:
        sheet.paste(scene, ((width - scene.width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    head = f"{sample.record.sample_id}: {counts(sample.dialogue)}"
    _head(draw, head, (MARGIN, top + LINE_HEIGHT // 2), width - 2 * MARGIN)
    top += 2 * LINE_HEIGHT - MARGIN // 2
    draw.rounded_rectangle((MARGIN, top, width - MARGIN, height - MARGIN), 8, fill=PANEL, outline=RULE)
    for row, line in enumerate(lines):
        _draw_line(draw, line, (2 * MARGIN, top + LINE_HEIGHT // 2 + row * LINE_HEIGHT))
    return sheet


def _scene(sample: Sample) -> Image.Image | None:
    image = pixels(sample.record)
    if image is None:
        return None
    if sample.regions:
        masks = decode_rles([sample.record.masks[region.mask] for region in sample.regions])
        texts = [
            f"{region.answer} ({area})" if region.answer else area
            for region, area in zip(sample.regions, areas(sample), strict=True)
        ]
        if masks.shape[1:] != image.shape[:2]:  # the masks' scale counts
            size = masks.shape[2], masks.shape[1]
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
        return draw_regions(image, masks, texts)
    picture = Image.fromarray(image)
    scale = MAX_SIDE / max(picture.size)
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (picture.width + 2 * MARGIN, picture.height + 2 * MARGIN), PAPER)
    sheet.paste(picture, (MARGIN, MARGIN))
    return sheet


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


@functools.lru_cache(maxsize=10_000)
def _length(text: str) -> float:
    return _font(TEXT_SIZE).getlength(text)


def _words(written: Iterable[Span]) -> Iterator[_Word]:
    """Words, blanks and newlines, one after the other; a turn's end is followed by a newline."""
    region = 0
    for span in written:
        for piece in re.findall(rf"{REGION}|\n|[^\S\n]+|(?:(?!{REGION})\S)+", span.text):
            region += piece == REGION
            yield _Word(piece, span.has_loss, region * (piece == REGION))
        if span.has_loss and span.text.endswith("</s>"):
            yield _Word("\n", False)


def _wrap(words: Iterable[_Word], width: float) -> list[list[_Word]]:
    """Lines that are no wider than `width`, without blanks at their ends; words that are wider get cut."""
    lines: list[list[_Word]] = [[]]
    used = 0.0
    for word in words:
        if len(lines) > MAX_LINES:
            break
        if word.text == "\n":
            lines.append([])
            used = 0.0
            continue
        for piece in _pieces(word.text, width):
            if used + _length(piece) > width:
                lines.append([])
                used = 0.0
            if piece.isspace() and not lines[-1]:
                continue
            lines[-1].append(word._replace(text=piece))
            used += _length(piece)
    for line in lines:
        while line and line[-1].text.isspace():
            line.pop()
    if len(lines) > MAX_LINES:
        return [*lines[:MAX_LINES], [_Word("…", False)]]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _pieces(word: str, width: float) -> Iterator[str]:
    while word:
        length = len(word)
        while length > 1 and _length(word[:length]) > width:
            length = max(1, min(length - 1, int(length * width / _length(word[:length]))))
        yield word[:length]
        word = word[length:]


def _head(draw: ImageDraw.ImageDraw, text: str, corner: tuple[int, int], width: float) -> None:
    """What the sample is, and a key to the colour at the right."""
    key, (x, y) = "carries loss", corner
    right = x + width - _length(key)
    _draw_line(draw, [_Word(key, True)], (right, y))
    while _length(text) > right - x - MARGIN:
        text = f"{text[: int(len(text) * 0.9) - 1]}…"
    draw.text((x, y), text, fill=FAINT, font=_font(TEXT_SIZE))


def _draw_line(draw: ImageDraw.ImageDraw, line: Iterable[_Word], corner: tuple[float, float]) -> None:
    x, y = corner
    for word in line:
        length = _length(word.text)
        if word.has_loss:
            draw.rectangle((x, y - 2, x + length, y + LINE_HEIGHT - 7), fill=LOSS_PAPER)
        if word.region:
            colour = COLOURS[(word.region - 1) % len(COLOURS)]
            draw.line((x, y + LINE_HEIGHT - 5, x + length, y + LINE_HEIGHT - 5), fill=colour, width=3)
        draw.text((x, y), word.text, fill=LOSS_INK if word.has_loss else INK, font=_font(TEXT_SIZE))
        x += length
