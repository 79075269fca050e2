"""Images with masks in every form, and what is wrong with some of them."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data_pipelines.__main__ import main as data_pipelines
from tests.label import data_files
from tests.label.conftest import Run, lines
from tests.label.data_files import COUNT, FORMS, HEIGHT, NAMES, WIDTH, rle
from tests.label.stand_in import StandIn


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_masks_gives_the_same_regions(
    form: str, folder: Path, run: Run, stand_in: StandIn
) -> None:
    shutil.rmtree(folder / "images")
    (folder / form).mkdir()
    images, masks = FORMS[form](folder / form)
    assert run("--images", images, "--masks", *masks, masks=None) == 0
    found = {(Path(line["image"]).as_posix(), line["region"]): line for line in lines("out")}
    numbered = form in ("mask_folders", "mask_files")
    expected = {
        (name, place if numbered else number): mask
        for index, name in enumerate(NAMES)
        for place, (number, mask) in enumerate(data_files.masks(index).items(), 1)
    }
    assert found.keys() == expected.keys()
    for (image, region), mask in expected.items():
        line = found[image, region]
        np.testing.assert_array_equal(coco_mask.decode(line["segmentation"]), mask)
        ys, xs = np.nonzero(mask)
        assert line["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert line["area"] == mask.sum()
        brightness = data_files.picture(NAMES.index(image)).astype(int).sum()
        assert line["text"].startswith(f"Région of {mask.sum()} <pixels>, {brightness}, ")
        number = data_files.masks(NAMES.index(image))
        label = f"part_{list(number)[region - 1]}" if numbered else "thing"
        assert line.get("label") == (label if form in ("coco", "panoptic") or numbered else None)
    assert lines("out", "skipped") == []


def test_what_was_written_can_be_asked_about_again(run: Run) -> None:
    assert run("--shards", 2) == 0
    assert run("--question", "What colour is <region>?", masks="out", output="again") == 0
    first, again = lines("out"), lines("again")
    assert {line["question"] for line in again} == {"What colour is <region>?"}
    for key in ("image", "region", "label", "box", "area", "segmentation", "text", "model"):
        assert [line[key] for line in again] == [line[key] for line in first]
    assert {line["prompt"] for line in first}.isdisjoint(line["prompt"] for line in again)


def test_records_that_prepare_wrote_are_described_by_their_numbers(folder: Path, run: Run) -> None:
    rows = [
        {
            "image": NAMES[index],
            "regions": [{"rle": rle(mask)} for mask in data_files.masks(index).values()],
            "conversations": [{"from": "human", "value": "<region1>?"}, {"from": "gpt", "value": "Yes."}],
        }
        for index in (2, 0, 5)
    ]
    said = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "Noise."}]
    rows.insert(1, {"image": NAMES[1], "regions": [], "conversations": said})
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare = ["prepare", "--source", "custom:mine.jsonl", "--images", "images", "--output", "prepared"]
    assert data_pipelines(prepare) == 0
    assert run("--data", "prepared", masks=None) == 0
    expected = [
        (record, number, int(mask.sum()))
        for record, index in ((0, 2), (2, 0), (3, 5))
        for number, mask in enumerate(data_files.masks(index).values(), 1)
    ]
    assert [(line["record"], line["region"], line["area"]) for line in lines("out")] == expected
    assert {line["image"] for line in lines("out")} == {"mine.jsonl:1", "mine.jsonl:3", "mine.jsonl:4"}
    assert lines("out", "skipped") == []


def test_broken_images_and_regions_are_named_and_the_others_described(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(Path("coco.json").read_text())
    by_image = {
        index: [entry for entry in data["annotations"] if entry["image_id"] == 40 - index]
        for index in range(COUNT)
    }
    by_image[2][1]["segmentation"] = rle(np.ones((HEIGHT, WIDTH + 1), bool))
    by_image[5][0].pop("segmentation")
    by_image[0][0]["segmentation"]["counts"] = "4"
    data["annotations"].append({"id": 5, "image_id": 1234, "segmentation": []})
    Path("coco.json").write_text(json.dumps(data))
    (folder / "images" / NAMES[3]).unlink()
    (folder / "images" / NAMES[4]).write_bytes(data_files.png(data_files.picture(4))[:200])
    assert run() == 0
    skipped = {(line["image"], line.get("region")): line["reason"] for line in lines("out", "skipped")}
    assert skipped.keys() == {
        (NAMES[0], 1),
        (NAMES[2], by_image[2][1]["id"]),
        (NAMES[3], None),
        (NAMES[4], None),
        (NAMES[5], by_image[5][0]["id"]),
    }
    assert "24, 33" in skipped[NAMES[2], by_image[2][1]["id"]]
    assert f"no image {NAMES[3]}" in skipped[NAMES[3], None]
    assert "truncated" in skipped[NAMES[4], None]
    assert "segmentation" in skipped[NAMES[5], by_image[5][0]["id"]]
    total = sum(len(data_files.masks(index)) for index in (1, 2, 5, 6)) - 2
    assert len(lines("out")) == total
    told = capsys.readouterr().err
    assert "1 of 14 annotations belong to none of its images" in told
    described = len({line["image"] for line in lines("out")})
    assert f"{total} regions of {described} images described in out; 2 images and 3 regions skipped" in told


@pytest.mark.parametrize("form", ["coco", "lines_of_regions", "panoptic"])
def test_the_second_region_of_a_name_in_an_image_is_skipped(form: str, folder: Path, run: Run) -> None:
    (folder / form).mkdir()
    images, masks = FORMS[form](folder / form)
    assert run("--images", images, "--masks", *masks, masks=None, output="whole") == 0
    _repeat_a_region(masks[0])
    assert run("--images", images, "--masks", *masks, masks=None) == 0
    [skipped] = lines("out", "skipped")
    first = next(iter(data_files.masks(1)))
    assert (skipped["image"], skipped["region"]) == (NAMES[1], first)
    assert skipped["reason"] == f"a region before it in the image is called {first}, too"
    kept = [[(line["image"], line["region"]) for line in lines(name)] for name in ("out", "whole")]
    assert kept[0] == kept[1]


def _repeat_a_region(path: Path) -> None:
    """The first one of the second image."""
    first = next(iter(data_files.masks(1)))
    if path.is_dir():
        found = [
            text for text in (path / "a.jsonl").read_text().splitlines() if f'"region": {first},' in text
        ]
        with (path / "b.jsonl").open("a") as file:
            file.write(found[0] + "\n")
        return
    data = json.loads(path.read_text())
    if "segments_info" in data["annotations"][0]:
        segments = data["annotations"][1]["segments_info"]
        segments.append(segments[0])
    else:
        data["annotations"].append(next(entry for entry in data["annotations"] if entry["id"] == first))
    path.write_text(json.dumps(data))


def _rewrite(path: Path, size: int) -> None:
    """Of a tar, a document."""
    if path.suffix == ".tar":
        with tarfile.open(path) as archive:
            members = {
                member.name: archive.extractfile(member).read() for member in archive if member.isreg()
            }
        members[next(name for name in members if name.endswith("photo_2.json"))] += b" " * size
        with tarfile.open(path, "w") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    else:
        path.write_bytes(path.read_bytes() + b" " * size)


@pytest.mark.parametrize(
    ("form", "changed"),
    [
        ("sa1b", "images/photo_2.json"),
        ("sa1b_tar", "sa.tar"),
        ("label_maps", "masks/photo_2.png"),
        ("mask_folders", "masks/photo_0/part_1.png"),
        ("panoptic", "panoptic/3.png"),
    ],
)
def test_masks_of_another_size_are_noticed_and_a_copy_is_not(
    form: str, changed: str, folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / form).mkdir()
    images, masks = FORMS[form](folder / form)
    assert run("--images", images, "--masks", *masks, masks=None) == 0
    shutil.move(folder / form, folder / "elsewhere")
    path = folder / "elsewhere" / changed
    moved = [folder / "elsewhere" / path.relative_to(folder / form) for path in (images, *masks)]
    for size, status in ((0, 0), (1, 2)):
        _rewrite(path, size)
        os.utime(path, (1, 1))
        assert run("--images", moved[0], "--masks", *moved[1:], masks=None) == status
    assert "  regions: " in capsys.readouterr().err


def test_masks_that_belong_to_no_image_are_told(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "set").mkdir()
    images, masks = data_files.label_maps(folder / "set")
    Image.fromarray(np.ones((HEIGHT, WIDTH), np.uint8)).save(masks[0] / "other.png")
    assert run("--images", images, "--masks", *masks, masks=None) == 0
    assert "1 of 8 mask PNGs belong to none of the images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda: Path("coco.json").write_text("{"), "coco.json is no JSON"),
        (lambda: Path("coco.json").write_text("[1]"), "coco.json should hold an object"),
        (lambda: Path("coco.json").write_text('{"images": [], "annotations": []}'), "no annotations"),
        (lambda: Path("coco.json").unlink(), "no masks at"),
        (lambda: shutil.rmtree("images"), "no images at images"),
    ],
)
def test_an_input_that_is_none_is_refused(
    write: Callable[[], None], told: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write()
    assert run() == 2
    assert told in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_line_that_is_none_is_refused_by_its_number(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.jsonl").write_text(json.dumps({"image": NAMES[0], "segmentation": []}) + '\n{"image": 3}\n')
    assert run(masks="r.jsonl") == 2
    assert "r.jsonl, line 2: 'image' should be str" in capsys.readouterr().err
