"""The picture of described regions: what is tinted, numbered and written."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from osprey_jax.figure import BADGE_HEIGHT, COLOURS, MARGIN, draw_regions

TEXT = "a small brown dog that sits on a tiled floor and looks up at the bowl in front of it"


def boxes(height: int, width: int, *corners: tuple[int, int, int, int]) -> np.ndarray:
    """Masks of boxes given as top, left, bottom, right."""
    masks = np.zeros((len(corners), height, width), bool)
    for mask, (top, left, bottom, right) in zip(masks, corners, strict=True):
        mask[top:bottom, left:right] = True
    return masks


def photograph(height: int, width: int) -> np.ndarray:
    """Dark and colourful, but of no region's colour."""
    ramp = np.linspace(0, 90, width, dtype=np.uint8)
    return np.stack([np.tile(ramp, (height, 1))] * 2 + [np.full((height, width), 40, np.uint8)], -1)


def picture_part(figure: Image.Image, height: int, width: int) -> np.ndarray:
    return np.asarray(figure)[MARGIN : MARGIN + height, MARGIN : MARGIN + width]


def has_colour(pixels: np.ndarray, number: int) -> np.ndarray:
    """Where a region's own colour is pure: its outline and its badge, but not its tint."""
    return (np.abs(pixels.astype(int) - COLOURS[number - 1]) <= 25).all(-1)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[float, float], str, object]]:
    """Place, text and font of all text that is drawn."""
    calls: list[tuple[tuple[float, float], str, object]] = []
    draw = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, xy: tuple, text: str, *args: object, **options: object) -> None:
        calls.append((xy, text, options["font"]))
        draw(self, xy, text, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return calls


def test_regions_are_tinted_and_outlined_and_the_rest_is_as_it_was() -> None:
    image = photograph(700, 1000)
    masks = boxes(700, 1000, (100, 100, 400, 400), (450, 600, 650, 900))
    shown = picture_part(draw_regions(image, masks, [TEXT, TEXT]), 700, 1000)
    near = boxes(700, 1000, (80, 80, 420, 420), (430, 580, 670, 920)).any(0)
    np.testing.assert_array_equal(shown[~near], image[~near])
    for number, (y, x) in enumerate([(120, 130), (470, 640)], 1):
        moved = shown[y, x].astype(int) - image[y, x]
        assert np.dot(moved, np.array(COLOURS[number - 1]) - image[y, x]) > 1000
        assert not has_colour(shown, number)[y, x]
    assert has_colour(shown, 1)[250, 101]
    assert has_colour(shown, 2)[451, 750]


def test_a_badge_lies_inside_its_region_and_outside_of_regions_drawn_over_it() -> None:
    masks = boxes(700, 1000, (50, 50, 650, 950), (250, 400, 450, 600))
    shown = picture_part(draw_regions(photograph(700, 1000), masks, [TEXT, TEXT]), 700, 1000)
    within = [boxes(700, 1000, corners)[0] for corners in ((60, 60, 640, 940), (260, 410, 440, 590))]
    large, small = (has_colour(shown, number) & inside for number, inside in enumerate(within, 1))
    assert small.sum() > 200
    assert large.sum() > 200
    assert not (large & boxes(700, 1000, (240, 390, 460, 610))[0]).any()


def test_badges_of_crowded_small_regions_hide_neither_each_other_nor_a_region() -> None:
    corners = [
        (200 + 30 * row, 300 + 30 * column, 212 + 30 * row, 312 + 30 * column)
        for row in range(4)
        for column in range(5)
    ]
    masks = boxes(700, 1000, *corners)
    shown = picture_part(draw_regions(photograph(700, 1000), masks, [TEXT] * 20), 700, 1000)
    for number, mask in enumerate(masks, 1):
        assert has_colour(shown, number)[mask].sum() > 20, f"region {number} is hidden"
        badge = (
            has_colour(shown, number)
            & ~boxes(700, 1000, tuple(np.add(corners[number - 1], (-4, -4, 4, 4))))[0]
        )
        assert badge.sum() > 0.35 * BADGE_HEIGHT**2, f"badge {number} is hidden"


def test_an_empty_mask_is_in_the_legend_alone(written: list) -> None:
    image = photograph(700, 1000)
    figure = draw_regions(image, np.zeros((1, 700, 1000), bool), ["nothing"])
    np.testing.assert_array_equal(picture_part(figure, 700, 1000), image)
    assert [text for _, text, _ in written][-1] == "nothing (empty mask)"


@pytest.mark.parametrize(("height", "width"), [(700, 1000), (1000, 90), (60, 1000), (8, 8), (1500, 2000)])
def test_all_words_are_written_inside_the_page_in_order(height: int, width: int, written: list) -> None:
    masks = boxes(height, width, *[(0, 0, 1 + number % height, 1 + number % width) for number in range(20)])
    texts = [f"{number}th {TEXT}" for number in range(1, 21)]
    figure = draw_regions(photograph(height, width), masks, texts)
    lines = [(place, text, font) for place, text, font in written if not text.isdigit()]
    assert " ".join(text for _, text, _ in lines) == " ".join(texts)
    for (x, y), text, font in lines:
        assert x > MARGIN
        assert x + font.getlength(text) <= figure.width - MARGIN
        assert MARGIN + 5 < y < figure.height - MARGIN - 5
    assert {int(text) for _, text, _ in written if text.isdigit()} == set(range(1, 21))
    assert 600 < max(figure.size) < 2400


def test_lines_of_a_legend_do_not_overlap(written: list) -> None:
    draw_regions(photograph(700, 1000), boxes(700, 1000, *[(9, 9, 400, 400)] * 7), [TEXT * 2] * 7)
    spans = [(x, y, x + font.getlength(text)) for (x, y), text, font in written if not text.isdigit()]
    for (left, y, right), (other_left, other_y, other_right) in itertools.combinations(spans, 2):
        assert abs(y - other_y) >= 20 or right <= other_left or other_right <= left


def test_endless_words_are_broken_and_endless_answers_cut(written: list) -> None:
    figure = draw_regions(photograph(70, 100), boxes(70, 100, (9, 9, 40, 40)), ["n" * 30_000])
    lines = [text for _, text, _ in written if not text.isdigit()]
    assert set("".join(lines[:-1])) == {"n"}
    assert lines[-1].endswith("n …")
    assert figure.height < 1500


def test_no_script_or_control_character_fails() -> None:
    texts = [
        "一条狗在地板上",
        "собака",
        "كلب على الأرض",
        "🐶‍🦺",
        "\ud800",
        "\x00\x1b[31m\r\n\u2028",
        "",
        "\u0301\u200f",
    ]
    draw_regions(photograph(70, 100), boxes(70, 100, *[(9, 9, 40, 40)] * len(texts)), texts)


def test_what_is_thinner_than_a_pixel_of_the_figure_is_seen() -> None:
    masks = boxes(1200, 3000, (600, 100, 601, 2900), (300, 1500, 301, 1501))
    shown = picture_part(draw_regions(photograph(1200, 3000), masks, [TEXT, TEXT]), 480, 1200)
    assert has_colour(shown[238:243, 60:500], 1).any(0).mean() > 0.95
    assert (np.abs(shown[120, 600].astype(int) - COLOURS[1]) < 60).all()


def test_colours_of_twenty_regions_are_far_apart() -> None:
    assert len(set(COLOURS)) == len(COLOURS) >= 20
    assert min(np.linalg.norm(np.subtract(a, b)) for a, b in itertools.combinations(COLOURS, 2)) > 45


def test_masks_and_texts_of_other_numbers_or_sizes_are_refused() -> None:
    image, masks = photograph(30, 40), boxes(30, 40, (1, 1, 9, 9))
    with pytest.raises(ValueError, match="1 masks, but 2 texts"):
        draw_regions(image, masks, ["a", "b"])
    with pytest.raises(ValueError, match=r"\(20, 40\).*\(30, 40\)"):
        draw_regions(image, masks[:, :20], ["a"])
