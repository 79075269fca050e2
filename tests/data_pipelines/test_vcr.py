"""VCR's lines as records, and its rasteriser against matplotlib's."""

import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib.path
import numpy as np
import pytest

from data_pipelines.records import Turn
from data_pipelines.sources.vcr import Vcr, rasterize
from osprey_jax.masks import decode_rles
from tests.data_pipelines.data_files import vcr_line, vcr_metadata, write_lines

REGIONS = "region1 <mask><pos>,region2 <mask><pos>,region3 <mask><pos>"


def opened(tmp_path: Path, *lines: dict[str, Any]) -> Vcr:
    for number in range(2):
        vcr_metadata(tmp_path / "images", number)
    return Vcr(write_lines(tmp_path / "train.jsonl", list(lines)), tmp_path / "images")


def reference_mask(box: list, polygons: list, height: int, width: int) -> np.ndarray:
    """Matplotlib's test for every point of a grid in the box, which has to lie within the image."""
    left, top, right, bottom = (round(side) for side in box[:4])
    xs, ys = (
        np.linspace(low + (high - low) / (2 * count), high - (high - low) / (2 * count), num=count)
        for low, high, count in ((box[0], box[2], right - left), (box[1], box[3], bottom - top))
    )
    points = np.array(list(itertools.product(ys, xs)))[:, ::-1]
    inside = np.zeros(len(points), bool)
    for polygon in polygons:
        inside |= matplotlib.path.Path(polygon).contains_points(points)
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = inside.reshape(bottom - top, right - left)
    return mask


def test_objects_are_listed_named_and_asked_about(tmp_path: Path) -> None:
    source = opened(tmp_path, vcr_line(0), vcr_line(1, rationale_orig="I have no idea, 22nd of May."))
    record = source[0]
    assert record.opening == "<image>\n.\nThis provides an overview of the picture.\n"
    assert record.opening_regions == ()
    assert record.turns == (
        Turn(
            " Why is person at region1 near chair at region3?",
            "person at region1 wants to sit down.",
            (0, 1, 2),
            phrases="lead_in",
            slot=REGIONS,
        ),
        Turn(
            "",
            "chair at region3 is empty, and person at region2 is still standing.",
            (),
            phrases="why",
            slot="",
        ),
    )
    assert record.image == (tmp_path / "images/lsmdc/scene@0.jpg").read_bytes()
    assert source[1].turns[1].answer == "I have no idea, 22nd of May."
    assert (record.at_most, record.sample_id) == (0, "vcr/0")


@pytest.mark.parametrize("number", [0, 1])
def test_masks_are_those_of_matplotlib_at_the_images_size(tmp_path: Path, number: int) -> None:
    metadata = vcr_metadata(tmp_path / "images", number)
    height, width = metadata["height"], metadata["width"]
    # What the metadata say of the size doesn't count.
    path = tmp_path / f"images/lsmdc/scene@{number}.json"
    record = opened(tmp_path, vcr_line(number))
    path.write_text(json.dumps({**metadata, "height": 7, "width": 7}))
    expected = [
        reference_mask(box, polygons, height, width)
        for box, polygons in zip(metadata["boxes"], metadata["segms"], strict=True)
    ]
    np.testing.assert_array_equal(decode_rles(record[0].masks), expected)
    assert all(mask.any() for mask in expected)


@pytest.mark.parametrize("grid", [None, 2.0, 1.0])
def test_the_rasteriser_agrees_with_matplotlib_in_every_point(grid: float | None) -> None:
    """On a grid of halves many points lie on edges and corners."""
    rng = np.random.default_rng(5)
    checked = 0
    for _ in range(150):
        height, width = rng.integers(4, 60, 2)
        box = [*rng.uniform(0, (width, height)), *rng.uniform(0, (width, height))]
        box = [*np.minimum(box[:2], box[2:]), *np.maximum(box[:2], box[2:])]
        polygons = [
            rng.uniform((box[0] - 2, box[1] - 2), (box[2] + 2, box[3] + 2), (rng.integers(1, 9), 2))
            for _ in range(rng.integers(1, 4))
        ]
        if grid:
            box = [round(side * grid) / grid for side in box]
            polygons = [np.round(polygon * grid) / grid for polygon in polygons]
        polygons = [polygon.tolist() for polygon in polygons]
        if rng.random() < 0.3:
            polygons[0].append(polygons[0][0])
        if min(round(box[2]) - round(box[0]), round(box[3]) - round(box[1])) > 0:
            expected = reference_mask(box, polygons, height, width)
            found = rasterize([float(side) for side in box], polygons, height=int(height), width=int(width))
            np.testing.assert_array_equal(found, expected)
            checked += int(expected.sum())
    assert checked > 4_000


def test_what_lies_outside_of_the_image_is_cut_off() -> None:
    box, polygon = [-7.3, -4.2, 26.6, 18.8], [[-7, -4], [26, -4], [20, 18], [-7, 15]]
    # The same points in a larger image, into which the box fits.
    shifted = reference_mask([side + 10 for side in box], [[[x + 10, y + 10] for x, y in polygon]], 40, 40)
    found = rasterize(box, [polygon], height=9, width=15)
    np.testing.assert_array_equal(found, shifted[10:19, 10:25])
    assert found.any()
    for away in ([-9, 1, -2, 5], [1, -9, 5, -2], [20, 1, 30, 5], [1, 20, 5, 30]):
        assert not rasterize(away, [[[-99, -99], [99, -99], [99, 99], [-99, 99]]], height=9, width=15).any()


@pytest.mark.parametrize("box", [[3.0, 3.0, 3.2, 9.0], [5, 5, 2, 2], [3, 3, 3, 3]])
def test_a_box_without_a_pixel_gives_an_empty_mask(box: list) -> None:
    assert not rasterize(box, [[[0, 0], [9, 0], [9, 9]]], height=9, width=9).any()


@pytest.mark.parametrize("polygons", [[], [[]], [[[1, 1], [5, 5]]], [[[4, 4]]]])
def test_less_than_three_points_have_no_inside(polygons: list) -> None:
    assert not rasterize([0, 0, 9, 9], polygons, height=9, width=9).any()


@pytest.mark.parametrize(
    ("line", "dropped"),
    [
        (vcr_line(0, question_orig="Why is 4 here?"), True),
        (vcr_line(0, answer_orig="0 is nobody."), True),
        (vcr_line(0, rationale_orig="It is 1995."), True),
        (vcr_line(0, rationale_orig="9" * 5000), True),
        (vcr_line(0, rationale_orig="The 4th is not a number, nor is b52."), False),
    ],
)
def test_a_number_that_names_no_object_drops_its_sample(tmp_path: Path, line: dict, dropped: bool) -> None:
    source = opened(tmp_path, line, vcr_line(1))
    assert len(source) == 2 - dropped
    assert source.dropped == ({"a sample with a number that names no object": 1} if dropped else {})
    assert source.image_key(0).endswith(f"scene@{int(dropped)}.jpg")
    assert source[0].image == (tmp_path / f"images/lsmdc/scene@{int(dropped)}.jpg").read_bytes()


def test_lines_that_are_no_json_are_dropped_and_counted(tmp_path: Path) -> None:
    source = opened(tmp_path)
    path = tmp_path / "train.jsonl"
    good = json.dumps(vcr_line(1)).encode()
    path.write_bytes(
        b"\xef\xbb\xbf" + good + b"\r\n{\n\n" + good.replace(b"near", b"n\xffr") + b"\n  \n" + good
    )
    source = Vcr(path, tmp_path / "images")
    assert len(source) == 2
    assert source.dropped == {"a line that is no JSON": 2}
    assert source[0].turns == source[1].turns


def test_texts_under_their_plain_names_are_read_where_they_are_texts(tmp_path: Path) -> None:
    line = vcr_line(0)
    plain = {key.removesuffix("_orig"): value for key, value in line.items() if key != "question"}
    assert "question_orig" not in plain
    source = opened(tmp_path, plain, line)
    assert source[0].turns == source[1].turns


def test_a_picture_without_objects_has_no_lead_in(tmp_path: Path) -> None:
    texts = {"question_orig": "Why?", "answer_orig": "So.", "rationale_orig": "Because."}
    source = opened(tmp_path, vcr_line(0, objects=[], **texts))
    path = tmp_path / "images/lsmdc/scene@0.json"
    path.write_text(json.dumps({"boxes": [], "segms": []}))
    record = source[0]
    assert record.turns == (Turn("Why?", "So."), Turn("", "Because.", phrases="why"))
    assert record.masks == ()


SQUARE = [[[0, 0], [5, 0], [5, 5], [0, 5]]]


@pytest.mark.parametrize(
    ("line", "metadata", "message"),
    [
        ({"objects": ["person"] * 4}, {}, "4 objects, but polygons of 3"),
        ({"objects": [1, 2, 3]}, {}, "'objects' should hold str only"),
        ({"answer_orig": 5}, {}, "'answer_orig' should be str, got int"),
        ({"metadata_fn": "lsmdc/gone.json"}, {}, "no image lsmdc/gone.json"),
        ({"metadata_fn": "../gone.json"}, {}, "outside"),
        ({"img_fn": "gone.jpg"}, {}, "no image gone.jpg"),
        ({"img_fn": "lsmdc/scene@1.json"}, {}, "cannot read the image"),
        ({}, None, r"scene@0\.json: the sample is no JSON"),
        ({}, [], r"scene@0\.json: expected an object"),
        ({}, {"boxes": [], "segms": SQUARE}, r"scene@0\.json: 0 boxes, but polygons of 1 objects"),
        ({}, {"boxes": [[1, 2, 3]], "segms": [SQUARE]}, "a box is x1, y1, x2, y2, got"),
        ({}, {"boxes": [[1, 2, "3", 4]], "segms": [SQUARE]}, "a box is"),
        ({}, {"boxes": [[1, 2, float("nan"), 4]], "segms": [SQUARE]}, "within"),
        ({}, {"boxes": [[1, 2, 3e9, 4]], "segms": [SQUARE]}, "within"),
        ({}, {"boxes": [[1, 2, -(2**63), 4]], "segms": [SQUARE]}, "within"),
        ({}, {"boxes": [[1, 2, 9, 9]], "segms": [{}]}, "expected a list of polygons, got dict"),
        ({}, {"boxes": [[1, 2, 9, 9]], "segms": [[[1, 2, 3, 4]]]}, r"a polygon is a list of \[x, y\]"),
        ({}, {"boxes": [[1, 2, 9, 9]], "segms": [[[[1, 2], [3]]]]}, r"a polygon is a list of \[x, y\]"),
        ({}, {"boxes": [[1, 2, 9, 9]], "segms": [["abc"]]}, r"a polygon is a list of \[x, y\]"),
    ],
)  # fmt: skip
def test_a_bad_sample_says_what_is_wrong_and_stops_no_other(
    tmp_path: Path, line: dict, metadata: Any, message: str
) -> None:
    source = opened(tmp_path, vcr_line(0, **line), vcr_line(1))
    if metadata != {}:
        text = "{" if metadata is None else json.dumps(metadata)
        (tmp_path / "images/lsmdc/scene@0.json").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        source[0]
    assert len(source[1].masks) == 3
