"""SAM's masks in Osprey's words: methods, the command, and what both refuse."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from osprey_jax import describe
from osprey_jax.masks import decode_rles
from osprey_jax.request import Request
from osprey_jax.sam.predictor import Sam
from osprey_jax.segments import Segment, Segments

FEW_POINTS = ["--points-per-side", "4", "--pred-iou-thresh", "0", "--stability-score-thresh", "0"]
FEW_POINTS += ["--box-nms-thresh", "1"]
"""Random weights scatter masks over the whole image, so all have one box."""


class StandIn:
    """An Osprey that says how large segments are."""

    loads: list[Path]

    def load(self, directory: Path, **options: object) -> "StandIn":
        self.loads.append(directory)
        return self

    def describe_segments(self, found: Segments, asked: Request) -> Iterator[Segment]:
        masks = np.asarray(found.masks(0, len(found.segments)))
        for segment, mask in zip(found.segments, masks, strict=True):
            yield segment._replace(text=f"{mask.sum()} pixels")


@pytest.fixture
def osprey(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    stand_in.loads = []
    monkeypatch.setattr(describe, "Osprey", stand_in)
    return stand_in


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, sam: Sam) -> None:
    """SAM's checkpoint needn't be read for each test."""
    monkeypatch.setattr(Sam, "load", lambda directory: sam)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: np.ndarray) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo).save("photo.png")
    (tmp_path / "osprey").mkdir()
    return tmp_path


def run(checkpoint: Path | str, *options: str, image: str = "photo.png") -> int:
    return describe.main(["--checkpoint", "osprey", "--image", image, "--sam", str(checkpoint), *options])


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_points_and_boxes_are_regions_in_their_order(osprey: StandIn, checkpoint: Path, sam: Sam) -> None:
    assert run(checkpoint, "--point", "30,20", "--point", "71.5,44", "--output", "a.jsonl") == 0
    first, second = lines("a.jsonl")
    keys = ["image", "region", "box", "area", "segmentation", "question", "text", "prompt", "predicted_iou"]
    assert list(first) == keys
    assert (first["region"], first["prompt"]) == (1, {"point": [30, 20]})
    assert (second["region"], second["prompt"]) == (2, {"point": [71.5, 44]})
    assert run(checkpoint, "--box", "5,5,50,40", "--output", "b.jsonl", "--figure", "b.png") == 0
    (line,) = lines("b.jsonl")
    assert line["prompt"] == {"box": [5, 5, 50, 40]}
    embedding = sam.encode("photo.png")
    at_box = sam.predict(embedding, boxes=[[5, 5, 50, 40]], multimask=False)
    at_points = sam.predict(embedding, points=[[[30, 20]], [[71.5, 44]]], multimask=False)
    for said, mask in (
        (line, at_box.masks[0, 0]),
        (first, at_points.masks[0, 0]),
        (second, at_points.masks[1, 0]),
    ):
        np.testing.assert_array_equal(coco_mask.decode(said["segmentation"]), mask)
        assert said["text"] == f"{np.asarray(mask).sum()} pixels"
        assert said["area"] == np.asarray(mask).sum()
    with Image.open("b.png") as drawn:
        assert drawn.width > 500


def test_everything_is_told_with_what_it_is_part_of(
    osprey: StandIn, loaded: None, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(checkpoint, "--everything", *FEW_POINTS, "--output", "a.jsonl", "--figure", "a.png") == 0
    said = lines("a.jsonl")
    assert len(said) > 1
    assert [line["region"] for line in said] == list(range(1, len(said) + 1))
    masks = decode_rles([line["segmentation"] for line in said])
    assert masks.shape[1:] == (60, 100)
    parts = [line for line in said if line["part_of"] is not None]
    assert parts, "these weights and this photo have nested masks"
    for line in parts:
        part, whole = masks[line["region"] - 1], masks[line["part_of"] - 1]
        assert (part & whole).sum() >= 0.9 * part.sum()
        assert whole.sum() > part.sum()
    capsys.readouterr()
    assert run(checkpoint, "--everything", *FEW_POINTS) == 0
    assert "part of" in capsys.readouterr().out


def test_nothing_found_is_a_warning_and_empty_files(
    osprey: StandIn, loaded: None, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--everything", "--points-per-side", "2", "--stability-score-thresh", "1"]
    assert run(checkpoint, *options, "--output", "a.jsonl", "--figure", "a.png") == 0
    assert "warning: nothing was found; lower --pred-iou-thresh" in capsys.readouterr().err
    assert Path("a.jsonl").read_text() == ""
    with Image.open("a.png") as drawn, Image.open("photo.png") as given:
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(given))
    assert osprey.loads == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--point", "30,60.5"], "point 0: x, y = 30, 60.5 lies outside of the image, which is 100 wide"),
        (["--point", "1,2", "--point=-1,2"], "point 1: x, y = -1, 2 lies outside"),
        (["--box", "5,5,5,9"], "box 0 is empty"),
        (["--box", "5,5,500,9"], "box 0: x0, y0, x1, y1 = 5, 5, 500, 9 goes beyond the image"),
        (["--point", "1,2", "--points-per-side", "3"], "--points-per-side goes with --everything only"),
        (["--everything", "--points-per-side", "0"], "points_per_side"),
        (["--point", "1,2", "--output", "photo.png"], "cannot write photo.png"),
    ],
)
def test_wrong_prompts_are_one_error_line(
    osprey: StandIn,
    loaded: None,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    named: str,
) -> None:
    assert run(checkpoint, *options) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert named in said[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--sam", "sam", "--masks", "a.png"], "--masks doesn't go with it"),
        (["--point", "1,2"], "need --sam"),
        (["--sam", "sam"], "--everything is required"),
        (["--sam", "sam", "--point", "1,2", "--everything"], "not allowed with"),
        (["--sam", "sam", "--point", "1"], "must be X,Y, got '1'"),
        (["--sam", "sam", "--box", "1,2,3,b"], "must be X0,Y0,X1,Y1, got '1,2,3,b'"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused_by_the_parser(
    capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        describe.main(["--checkpoint", "osprey", "--image", "photo.png", *arguments])
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


def test_a_directory_that_is_no_checkpoint_of_sam_is_named(
    osprey: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("osprey", "--point", "1,2") == 2
    assert "osprey" in capsys.readouterr().err
    assert run("missing", "--point", "1,2") == 2
    assert "missing" in capsys.readouterr().err
