"""A picture of described regions: each mask tinted and numbered, its words in a legend (NumPy and Pillow)."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from osprey_jax.masks import as_masks

Colour = tuple[int, ...]

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
"""Pillow's names of the formats in which a figure is sensibly written, by a file's suffix."""

# Far apart in OKLab and neither dark nor pale; the first ones are far apart from each other, too.
_CODES = (
    "206fef fead19 f52c1a 24c513 fe60e0 1bedf6 a908aa 3c732f b173fd 94ef15 964c0b 22a2c5 "
    "fe9b91 b60156 40f4a8 6f3ae2 a98a15 f5b8fe 68b975 c16f97 cadc7e fc3788 97a8fb 6c539c"
)
COLOURS: tuple[Colour, ...] = tuple(tuple(bytes.fromhex(code)) for code in _CODES.split())
TINT = 0.3
OUTLINE = 3
MARGIN = 20
TEXT_SIZE, LINE_HEIGHT = 18, 24
BADGE_HEIGHT, BADGE_TEXT = 24, 16
CHIP_GAP, ENTRY_GAP = 10, 10
MAX_COLUMNS = 4
MAX_LINES = 12
CELL = 4
"""Badges are placed on a grid of cells of this many pixels."""
INK, FAINT, PAPER = (28, 28, 32), (105, 105, 112), (255, 255, 255)


def draw_regions(
    image: np.ndarray, masks: np.ndarray, texts: Sequence[str], *, tint: float = TINT
) -> Image.Image:
    """Draws an image with its regions numbered from 1 and, beside or below it, what was said of each.

    Regions of few pixels are drawn over larger ones. Empty masks are in the legend alone. Words are cut after
    `MAX_LINES` lines; glyphs that Pillow's own font lacks are boxes.

    Args:
      image: `(h, w, 3)` uint8. It is enlarged or shrunk so that its longest side is about 1000 pixels.
      masks: `(R, h, w)` bool.
      texts: R of them.
      tint: how much of a region's colour lies over the picture's; with 0 only its outline shows it.

    Returns: an RGB picture.
    """
    regions = as_masks(masks, (image.shape[0], image.shape[1]))
    if len(regions) != len(texts):
        raise ValueError(f"{len(regions)} masks, but {len(texts)} texts")
    picture, seen = _painted(image, regions, tint)
    return _compose(picture, [_Entry(n, text, empty=n not in seen) for n, text in enumerate(texts, 1)])


def draw_words(image: np.ndarray, masks: np.ndarray, paragraphs: Sequence[str]) -> Image.Image:
    """Draws an image with its regions numbered from 1, as `draw_regions` does, and words about all below it.

    Args:
      image: `(h, w, 3)` uint8.
      masks: `(R, h, w)` bool, which may be none.
      paragraphs: the words; each begins a line, and is cut after `MAX_LINES` of them.

    Returns: an RGB picture.
    """
    picture, _ = _painted(image, masks, TINT)
    width = max(picture.width, 560)
    lines = [line for text in paragraphs for line in _wrap(_printable(text), width)]
    top = 2 * MARGIN + picture.height
    sheet = Image.new("RGB", (width + 2 * MARGIN, top + len(lines) * LINE_HEIGHT + MARGIN), PAPER)
    sheet.paste(picture, (MARGIN, MARGIN))
    draw = ImageDraw.Draw(sheet)
    for row, line in enumerate(lines):
        draw.text((MARGIN, top + row * LINE_HEIGHT), line, fill=INK, font=_font(TEXT_SIZE))
    return sheet


def _painted(image: np.ndarray, regions: np.ndarray, tint: float) -> tuple[Image.Image, set[int]]:
    """The image at the figure's size with its regions and badges, and the numbers of those to be seen."""
    size = _canvas_size(image.shape[0], image.shape[1])
    area = regions.sum((1, 2))
    # By number, in the order of drawing.
    coverage = {
        int(index) + 1: _coverage(regions[index], size)
        for index in np.argsort(-area, kind="stable")
        if area[index]
    }
    picture = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    for number, covered in coverage.items():
        _paint(picture, covered, _colour(number), tint)
    if coverage:
        _paste_badges(picture, coverage)
    return picture, set(coverage)


def _canvas_size(height: int, width: int) -> tuple[int, int]:
    """Width and height in the figure; strips may be longer than other images, so as not to be too thin."""
    longest, shortest = max(height, width), min(height, width)
    scale = min(max(longest, 1000), 1200) / longest
    scale = max(scale, min(280 / shortest, 1600 / longest))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _colour(number: int) -> Colour:
    return COLOURS[(number - 1) % len(COLOURS)]


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


@functools.lru_cache(maxsize=10_000)
def _text_width(text: str) -> float:
    return _font(TEXT_SIZE).getlength(text)


def _coverage(mask: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """How much a non-empty mask covers of each pixel of the figure, mode L; edges are one pixel soft.

    What is nowhere thicker than two pixels is made so, to be seen.
    """
    scale = size[0] / mask.shape[1]
    resized = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    share = np.asarray(resized).astype(np.float32) / 255
    share = np.clip((share - 0.5) * max(scale, 1.0) + 0.5, 0, 1)
    if share.max() < 0.5:
        share = (share > 0).astype(np.float32)
    coverage = Image.fromarray((share * 255).round().astype(np.uint8))
    core = np.asarray(coverage.filter(ImageFilter.MinFilter(3)))
    return coverage if core.max() == 255 else coverage.filter(ImageFilter.MaxFilter(3))


def _paint(picture: Image.Image, coverage: Image.Image, colour: Colour, tint: float) -> None:
    """Tints and outlines one region in place."""
    bounds = coverage.getbbox()
    assert bounds is not None, "empty masks are not painted"
    x0, y0, x1, y1 = bounds
    pad = 3 * OUTLINE
    box = (max(x0 - pad, 0), max(y0 - pad, 0), min(x1 + pad, picture.width), min(y1 + pad, picture.height))
    part = coverage.crop(box)
    soft = part.filter(ImageFilter.GaussianBlur(OUTLINE / 2))
    inside, blurred = (np.asarray(x).astype(np.float32)[..., None] / 255 for x in (part, soft))
    outline = np.clip((0.98 - blurred) / 0.12, 0, 1) * inside
    shade = np.clip(blurred * 1.6, 0, 1) * (1 - inside) * 0.55
    pixels = np.asarray(picture.crop(box)).astype(np.float32) * (1 - shade)
    weight = inside * tint * (1 - outline) + outline
    pixels = pixels * (1 - weight) + np.asarray(colour, np.float32) * weight
    picture.paste(Image.fromarray(pixels.round().astype(np.uint8)), box[:2])


def _badge(number: int) -> Image.Image:
    """A region's number on its colour, as it stands in the picture and in the legend: mode RGBA."""
    colour, text, fine = _colour(number), str(number), 4
    width = max(BADGE_HEIGHT, math.ceil(_font(BADGE_TEXT).getlength(text)) + 12)
    large = Image.new("RGBA", (width * fine, BADGE_HEIGHT * fine), (*PAPER, 0))
    draw = ImageDraw.Draw(large)
    corners = (0, 0, large.width - 1, large.height - 1)
    draw.rounded_rectangle(corners, 8 * fine, fill=(*colour, 255), outline=(*PAPER, 255), width=2 * fine)
    ink = INK if np.dot(colour, (0.299, 0.587, 0.114)) > 140 else PAPER
    centre, font = (large.width / 2, large.height / 2), _font(BADGE_TEXT * fine)
    draw.text(centre, text, fill=ink, font=font, anchor="mm", stroke_width=1, stroke_fill=ink)
    return large.resize((width, BADGE_HEIGHT), Image.Resampling.LANCZOS)


def _paste_badges(picture: Image.Image, coverage: Mapping[int, Image.Image]) -> None:
    """Puts each region's number on it; a line leads to it where it had to be put beside the region."""
    badges = {number: _badge(number) for number in coverage}
    places = _place(coverage, {number: badge.size for number, badge in badges.items()})
    draw = ImageDraw.Draw(picture)
    for number, place in places.items():
        if place.target is not None:
            draw.line((place.centre, place.target), fill=PAPER, width=7)
            draw.line((place.centre, place.target), fill=_colour(number), width=4)
    for number, place in places.items():
        badge, (x, y) = badges[number], place.centre
        picture.paste(badge, (x - badge.width // 2, y - badge.height // 2), badge)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a badge is centred and, where that is outside its region, a pixel of the region to point to."""

    centre: tuple[int, int]
    target: tuple[int, int] | None


def _place(
    coverage: Mapping[int, Image.Image], badge_sizes: Mapping[int, tuple[int, int]]
) -> dict[int, _Place]:
    """Places badges inside their regions, or beside those that they would hide, apart from each other.

    `coverage` is in the order of drawing: a badge keeps to what later regions leave to be seen of its own.
    """
    grids = {number: _on_grid(covered) for number, covered in coverage.items()}
    pixels = {number: np.asarray(covered, np.float32).sum() / 255 for number, covered in coverage.items()}
    small = {number for number, (w, h) in badge_sizes.items() if pixels[number] < 3 * w * h}
    taken = np.logical_or.reduce([grid & (number in small) for number, grid in grids.items()], axis=0)
    above = np.zeros_like(taken)
    rows, columns = taken.shape
    y, x = np.mgrid[:rows, :columns]
    places = {}
    for number in reversed(list(coverage)):
        region = grids[number]
        visible = region & ~above if (region & ~above).any() else region
        above |= region
        half_x, half_y = (math.ceil(side / 2 / CELL) for side in badge_sizes[number])
        centre_y, centre_x = (axis.mean() for axis in np.nonzero(visible))
        cost = np.hypot(y - centre_y, x - centre_x) + 1e3 * _box_sum(taken, half_y, half_x)
        cost += 1e7 * ((x < half_x) | (y < half_y) | (x >= columns - half_x) | (y >= rows - half_y))
        if number not in small:
            cost += 1e6 * ~visible - 8.0 * np.minimum(_depth(visible), 2 * half_y)
        row, column = np.unravel_index(np.argmin(cost), cost.shape)
        target = None
        if number in small:
            distance = np.where(region, np.hypot(y - row, x - column), np.inf)
            target = _pixel(*np.unravel_index(np.argmin(distance), distance.shape))
        places[number] = _Place(_pixel(row, column), target)
        taken[max(row - half_y, 0) : row + half_y + 1, max(column - half_x, 0) : column + half_x + 1] = True
    return places


def _on_grid(coverage: Image.Image) -> np.ndarray:
    columns, rows = (math.ceil(side / CELL) for side in coverage.size)
    return np.asarray(coverage.resize((columns, rows), Image.Resampling.BOX)) > 0


def _pixel(row: np.intp, column: np.intp) -> tuple[int, int]:
    return int(column) * CELL + CELL // 2, int(row) * CELL + CELL // 2


def _box_sum(grid: np.ndarray, half_y: int, half_x: int) -> np.ndarray:
    """How many cells are True in the box around each cell."""
    padded = np.pad(grid, ((half_y + 1, half_y), (half_x + 1, half_x))).astype(np.int32)
    height, width = 2 * half_y + 1, 2 * half_x + 1
    down = padded.cumsum(0)
    across = (down[height:] - down[:-height]).cumsum(1)
    return across[:, width:] - across[:, :-width]


def _depth(inside: np.ndarray) -> np.ndarray:
    """Steps from each cell to the nearest one outside; what lies beyond the grid is outside."""
    depth = np.zeros(inside.shape, np.int32)
    while inside.any():
        depth += inside
        padded = np.pad(inside, 1)
        inside = inside & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    return depth


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A line of the legend."""

    number: int
    text: str
    empty: bool

    def lines(self, width: float) -> list[str]:
        text = f"{self.text} (empty mask)" if self.empty else self.text
        return _wrap(_printable(text), width)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _wrap(text: str, width: float) -> list[str]:
    """Breaks at spaces, and within a word that is wider than a line; cuts after `MAX_LINES`."""
    lines, used = [""], 0.0
    for word in text.split():
        if len(lines) > MAX_LINES:
            break
        room = width - used - _text_width(" ")
        if lines[-1] and _text_width(word) <= room:
            lines[-1] += f" {word}"
            used += _text_width(" ") + _text_width(word)
            continue
        lines += [""] if lines[-1] else []
        for piece in _pieces(word, width):
            lines[-1:] = [piece] if not lines[-1] else [lines[-1], piece]
            used = _text_width(piece)
    if len(lines) > MAX_LINES:
        kept = next(_pieces(lines[MAX_LINES - 1], width - _text_width(" …")))
        lines[MAX_LINES - 1 :] = [f"{kept} …"]
    return lines


def _pieces(word: str, width: float) -> Iterator[str]:
    """Cuts a word, where it must be, into pieces that fit."""
    while word:
        length = min(len(word), int(width) // 2)
        while length > 1 and _text_width(word[:length]) > width:
            length -= 1
        yield word[:length]
        word = word[length:]


@dataclasses.dataclass(frozen=True)
class _Legend:
    """Entries set in columns."""

    blocks: tuple[tuple[_Entry, list[str], int, int], ...]
    """Each entry with its lines, the left edge of its column and its top."""
    chip_width: int
    width: int
    height: int


def _set_legend(entries: Sequence[_Entry], columns: int, column_width: int) -> _Legend:
    """Flows the entries down columns of as little height as they need."""
    chip_width = _badge(entries[-1].number).width
    lines = [entry.lines(column_width - chip_width - CHIP_GAP) for entry in entries]
    heights = [max(len(block) * LINE_HEIGHT, BADGE_HEIGHT) + ENTRY_GAP for block in lines]
    low, high = max(heights), sum(heights)
    while low < high:
        middle = (low + high) // 2
        if _flow(heights, middle)[-1][0] < columns:
            high = middle
        else:
            low = middle + 1
    lefts_tops = [(column * (column_width + MARGIN), top) for column, top in _flow(heights, low)]
    blocks = tuple((e, block, *place) for e, block, place in zip(entries, lines, lefts_tops, strict=True))
    return _Legend(blocks, chip_width, columns * (column_width + MARGIN) - MARGIN, low - ENTRY_GAP)


def _flow(heights: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Column and top of each block when columns are filled up to `limit`."""
    places, column, top = [], 0, 0
    for height in heights:
        if top + height > limit:
            column, top = column + 1, 0
        places.append((column, top))
        top += height
    return places


def _compose(picture: Image.Image, entries: Sequence[_Entry]) -> Image.Image:
    """Puts the legend beside the picture or below it, in as many columns as make the best page."""
    most = min(len(entries), MAX_COLUMNS)
    pages: list[tuple[float, int, _Legend, bool]] = []
    for columns in range(1, most + 1):
        below = (max(picture.width, 560) + MARGIN) // columns - MARGIN
        for beside, width in ((True, 300), (True, 360), (True, 440), (False, below)):
            if width >= 260:
                legend = _set_legend(entries, columns, width)
                pages.append((_waste(picture, legend, beside=beside), len(pages), legend, beside))
    _, _, legend, beside = min(pages)
    width, height = _page_size(picture, legend, beside=beside)
    sheet = Image.new("RGB", (width, height), PAPER)
    sheet.paste(picture, (MARGIN, MARGIN))
    corner = (2 * MARGIN + picture.width, MARGIN) if beside else (MARGIN, 2 * MARGIN + picture.height)
    _draw_legend(sheet, legend, corner)
    return sheet


def _page_size(picture: Image.Image, legend: _Legend, *, beside: bool) -> tuple[int, int]:
    if beside:
        width, height = picture.width + MARGIN + legend.width, max(picture.height, legend.height)
    else:
        width, height = max(picture.width, legend.width), picture.height + MARGIN + legend.height
    return width + 2 * MARGIN, height + 2 * MARGIN


def _waste(picture: Image.Image, legend: _Legend, *, beside: bool) -> float:
    """How bad a page is: large, wider than a screen shows, or of another shape than a page or the picture."""
    width, height = _page_size(picture, legend, beside=beside)
    ratio, own = width / height, picture.width / picture.height
    return width * height * max(1.0, width / 1300) * max(1.0, ratio / max(1.9, own), min(0.6, own) / ratio)


def _draw_legend(sheet: Image.Image, legend: _Legend, corner: tuple[int, int]) -> None:
    draw = ImageDraw.Draw(sheet)
    for entry, lines, left, top in legend.blocks:
        x, y, badge = corner[0] + left, corner[1] + top, _badge(entry.number)
        sheet.paste(badge, (x + legend.chip_width - badge.width, y), badge)
        for row, line in enumerate(lines):
            place = (x + legend.chip_width + CHIP_GAP, y + row * LINE_HEIGHT + BADGE_HEIGHT // 2)
            draw.text(place, line, fill=FAINT if entry.empty else INK, font=_font(TEXT_SIZE), anchor="lm")
