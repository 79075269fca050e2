"""Histograms in a terminal and as a picture (NumPy and Pillow)."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MAX_BINS = 16
PAPER, INK, FAINT, GRID, BAR, MARK = (
    (255, 255, 255),
    (40, 40, 46),
    (110, 110, 118),
    (228, 228, 233),
    (62, 118, 196),
    (205, 66, 40),
)
PANEL, LEFT, RIGHT, TOP, BOTTOM = (520, 420), 76, 24, 64, 74
TEXT_SIZE, TITLE_SIZE = 15, 19


class Histogram(NamedTuple):
    """What is counted, in bins from `edges[k]` to before `edges[k + 1]`."""

    title: str
    axis: str
    """What the values are, with the unit."""
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    names: tuple[str, ...]
    """Of the bins."""
    ticks: tuple[str, ...]
    """Of the edges, or of the bins where each holds a single number."""

    @property
    def single(self) -> bool:
        """Whether each bin holds a single number."""
        return len(self.ticks) == len(self.counts)


def of_integers(values: Sequence[int], *, title: str, axis: str) -> Histogram:
    """Counts whole numbers in at most `MAX_BINS` bins of a round width."""
    low, high = (min(values), max(values)) if values else (0, 0)
    step = next(s for s in _round_numbers() if high // s - low // s < MAX_BINS)
    edges = range(low // step * step, (high // step + 1) * step + 1, step)
    counts = np.histogram(values, np.array(edges))[0] if values else np.zeros(1, int)
    # NumPy's last bin includes its end, which is beyond the greatest value.
    names = [f"{edge:,}" if step == 1 else f"{edge:,}–{edge + step - 1:,}" for edge in edges[:-1]]
    ticks = names if step == 1 else [f"{edge:,}" for edge in edges]
    return Histogram(
        title, axis, tuple(map(float, edges)), tuple(map(int, counts)), tuple(names), tuple(ticks)
    )


def _round_numbers() -> "list[int]":
    return [first * 10**power for power in range(12) for first in (1, 2, 5)]


_SHARES = tuple(first / 10**power for power in range(8, 2, -1) for first in (1, 2, 5))
_SHARES += (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""About evenly apart on a log scale."""


def of_shares(values: Sequence[float], *, title: str, axis: str) -> Histogram:
    """Counts shares, 0 < share ≤ 1, on a log scale; what is below the first bin is counted in it."""
    edges = np.array(_SHARES)
    if values:
        bins = np.clip(
            np.searchsorted(edges, [min(values), max(values)], side="right") - 1, 0, len(edges) - 2
        )
        edges = edges[bins[0] : bins[1] + 2]
    else:
        edges = edges[-2:]
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    ticks = [f"{edge:.6%}".rstrip("%0").rstrip(".") or "0" for edge in edges]
    names = [f"{low}–{high} %" for low, high in itertools.pairwise(ticks)]
    return Histogram(
        title, axis, tuple(map(float, edges)), tuple(map(int, counts)), tuple(names), tuple(ticks)
    )


def to_text(histogram: Histogram, *, width: int, blocks: bool = True) -> str:
    """A bar per bin; `blocks` draws them with characters that not every terminal has."""
    total = max(sum(histogram.counts), 1)
    names = max(map(len, histogram.names))
    numbers = [f"{count:,}" for count in histogram.counts]
    digits = max(map(len, numbers))
    room = max(width - names - digits - 15, 10)
    lines = [f"{histogram.title} ({histogram.axis})"]
    for name, count, number in zip(histogram.names, histogram.counts, numbers, strict=True):
        eighths = round(8 * room * count / max(max(histogram.counts), 1)) or int(count > 0)
        bar = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8] if blocks else "#" * -(-eighths // 8)
        lines.append(f"  {name:>{names}}  {number:>{digits}} {count / total:6.1%}  {bar}".rstrip())
    return "\n".join(lines)


def draw(
    histograms: Sequence[Histogram], *, marks: Sequence[Sequence[tuple[float, str]]], heading: str
) -> Image.Image:
    """Draws histograms beside each other.

    Args:
      histograms: what to draw.
      marks: for each, values to mark by a line, and their names.
      heading: above all of them.
    """
    head = 44
    sheet = Image.new("RGB", (PANEL[0] * len(histograms), PANEL[1] + head), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((LEFT, 18), heading, fill=FAINT, font=_font(TEXT_SIZE))
    for number, (histogram, lines) in enumerate(zip(histograms, marks, strict=True)):
        _draw_one(pen, histogram, lines, (PANEL[0] * number, head))
    return sheet


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _draw_one(
    pen: ImageDraw.ImageDraw,
    histogram: Histogram,
    marks: Sequence[tuple[float, str]],
    corner: tuple[int, int],
) -> None:
    left, top = corner[0] + LEFT, corner[1] + TOP
    right, bottom = corner[0] + PANEL[0] - RIGHT, corner[1] + PANEL[1] - BOTTOM
    pen.text((left, corner[1] + 4), histogram.title, fill=INK, font=_font(TITLE_SIZE))
    total, most = max(sum(histogram.counts), 1), max(max(histogram.counts), 1)
    step = next(s / 1000 for s in _round_numbers() if s / 1000 * 5 >= most / total)
    ceiling = step * -(-(most / total) // step)
    for line in range(round(ceiling / step) + 1):
        y = bottom - (bottom - top) * line * step / ceiling
        pen.line((left, y, right, y), fill=GRID)
        pen.text(
            (left - 8, y),
            f"{line * step:.3%}".rstrip("%0").rstrip(".") + " %",
            fill=FAINT,
            font=_font(TEXT_SIZE),
            anchor="rm",
        )
    width = (right - left) / len(histogram.counts)
    for number, count in enumerate(histogram.counts):
        y = bottom - (bottom - top) * count / total / ceiling
        if count:
            box = (left + width * number + 1, min(y, bottom - 1), left + width * (number + 1) - 1, bottom)
            pen.rectangle(box, fill=BAR)
    pen.line((left, bottom, right, bottom), fill=INK)
    _draw_ticks(pen, histogram, (left, right, bottom))
    pen.text(((left + right) / 2, bottom + 52), histogram.axis, fill=INK, font=_font(TEXT_SIZE), anchor="mm")
    for value, name in marks:
        if histogram.edges[0] <= value < histogram.edges[-1]:
            # A mark is an upper limit: where bins are numbers, it lies behind its own.
            x = left + width * float(
                np.interp(value + histogram.single, histogram.edges, range(len(histogram.edges)))
            )
            pen.line((x, top - 16, x, bottom), fill=MARK, width=2)
            anchor = "lm" if x < (left + right) / 2 else "rm"
            pen.text(
                (x + (6 if anchor == "lm" else -6), top - 10),
                name,
                fill=MARK,
                font=_font(TEXT_SIZE),
                anchor=anchor,
            )


def _draw_ticks(pen: ImageDraw.ImageDraw, histogram: Histogram, place: tuple[int, int, int]) -> None:
    """As many ticks as there is room for."""
    left, right, bottom = place
    width = (right - left) / len(histogram.counts)
    font = _font(TEXT_SIZE)
    widest = max(font.getlength(tick) for tick in histogram.ticks) + 14
    every = max(1, int(-(-widest // width)))
    for number in range(0, len(histogram.ticks), every):
        x = left + width * (number + histogram.single / 2)
        pen.line((x, bottom, x, bottom + 5), fill=INK)
        pen.text((x, bottom + 18), histogram.ticks[number], fill=FAINT, font=font, anchor="mm")
