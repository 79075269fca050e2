"""COCO's format as records, and what all sources share: bad files, bad samples, keys, pickling."""

import contextlib
import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from data_pipelines.records import Record, Turn
from data_pipelines.sources.coco import Coco, PartImageNet, PascalPart, RefCoco, RefCocoPlus, VisualGenome
from data_pipelines.sources.files import FileSource
from data_pipelines.sources.osprey_724k import OspreyConversation, OspreyLvis
from osprey_jax.masks import decode_rles
from tests.data_pipelines.data_files import (
    POLYGON,
    box_mask,
    coco_file,
    compressed,
    image,
    osprey_sample,
    segmentations,
    uncompressed,
    write_json,
    write_osprey_724k,
)

OVERVIEW = "<image>\nThis provides an overview of the picture.\n"
COCO_KINDS = (Coco, PascalPart, PartImageNet, RefCoco, RefCocoPlus, VisualGenome)
AT_MOST = (20, 15, 15, 15, 15, 3)


def coco(tmp_path: Path, kind: type[FileSource] = Coco) -> dict[str, Any]:
    """Three images' file, and the images in `images`."""
    names = [f"COCO_{number}.jpg" for number in range(3)]
    captions = ["left cup", "right cup", "last cup"] if issubclass(kind, RefCoco) else None
    return coco_file(names, tmp_path / "images", captions, cup=3, dog=7)


def opened(kind: type[FileSource], tmp_path: Path, content: Any) -> FileSource:
    return kind(write_json(tmp_path / "annotations.json", content), tmp_path / "images")


def masks(record: Record) -> np.ndarray:
    return decode_rles(record.masks)


@pytest.mark.parametrize(("kind", "at_most"), list(zip(COCO_KINDS, AT_MOST, strict=True)))
def test_annotations_of_an_image_are_turns_with_the_masks_that_pycocotools_makes(
    tmp_path: Path, kind: type[FileSource], at_most: int
) -> None:
    content = coco(tmp_path, kind)
    np.random.default_rng(0).shuffle(content["annotations"])
    content["images"].reverse()
    content = {key: content[key] for key in ("annotations", "categories", "info", "images")}
    source = opened(kind, tmp_path, content)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(tmp_path / "annotations.json")

    assert len(source) == len(reference.getImgIds()) == 3
    for index, number in enumerate(reference.getImgIds()):
        record, entry = source[index], reference.loadImgs([number])[0]
        found = reference.loadAnns(reference.getAnnIds(imgIds=[number]))
        np.testing.assert_array_equal(masks(record), [reference.annToMask(each) for each in found])
        assert [turn.regions for turn in record.turns] == [(0,), (1,), (2,), (3,), (4,)]
        if issubclass(kind, VisualGenome):
            expected = [each["caption"] for each in found]
        elif issubclass(kind, RefCoco):
            expected = [entry["caption"]] * 5
        else:
            expected = [reference.loadCats(each["category_id"])[0]["name"] for each in found]
        assert [turn.answer for turn in record.turns] == expected
        file = entry["file_name"].split("_")[-1] if issubclass(kind, RefCoco) else entry["file_name"]
        assert record.image == (tmp_path / "images" / file).read_bytes()
        assert record.at_most == at_most
        assert record.sample_id == f"{source.name}/{index}"


@pytest.mark.parametrize("kind", COCO_KINDS[:-1])
def test_stage_2_asks_with_the_region_alone(tmp_path: Path, kind: type[FileSource]) -> None:
    record = opened(kind, tmp_path, coco(tmp_path, kind))[0]
    assert record.opening.startswith("<image>\n")
    assert record.opening[8].isalpha()
    assert {(turn.question, turn.phrases, turn.slot) for turn in record.turns} == {("<mask><pos>", "", "")}


def test_openings_tell_what_to_answer() -> None:
    assert Coco.opening.endswith("\n")
    assert "category" in Coco.opening
    for kind, form, names in (
        (
            PascalPart,
            "category:part",
            "potted plant, aeroplane, cow, cat, bus, horse, car, dog, bicycle, person, bird",
        ),
        (PascalPart, "category:part", "bottle, sheep, motorbike"),
        (
            PascalPart,
            "category:part",
            "eye, window, cap, headlight, hand, mirror, arm, plant, wheel, ear, pot, foot",
        ),
        (
            PascalPart,
            "category:part",
            "leg, nose, body, horn, handlebar, neck, license plate, paw, saddle, head",
        ),
        (PascalPart, "category:part", "muzzle, tail, wing, beak, hair, torso, door, mouth"),
        (
            PartImageNet,
            "category part",
            "Bottle, Biped, Quadruped, Fish, Reptile, Bicycle, Bird, Car, Boat, Snake",
        ),
        (PartImageNet, "category part", "Aeroplane"),
        (
            PartImageNet,
            "category part",
            "Tier, Hand, Wing, Mouth, Tail, Side, Fin, Engine, Foot, Head, Body, Sail",
        ),
        (PartImageNet, "category part", "Seat"),
    ):
        assert form in kind.opening
        assert names in kind.opening
        assert kind.opening.endswith(".\n")
    # The first region follows directly.
    assert all(kind.opening.endswith(".") for kind in (RefCoco, RefCocoPlus))
    assert RefCoco.opening != RefCocoPlus.opening


def test_visual_genome_asks_for_a_short_phrase_and_leaves_ignored_annotations_out(tmp_path: Path) -> None:
    content = coco(tmp_path)
    for place in (1, 2, *range(5, 10)):
        content["annotations"][place]["ignore"] = 1
    content["annotations"][0]["ignore"] = 0
    source = opened(VisualGenome, tmp_path, content)
    assert len(source) == 2
    assert source.dropped == {"an image without annotations, or with ignored ones only": 1}
    record = source[0]
    assert record.opening == OVERVIEW
    limit = " Answer the question using a short phrase."
    assert record.turns == tuple(
        Turn(limit, f"thing {place} of picture 0", (region,), phrases="short", slot="<mask><pos>")
        for region, place in enumerate((0, 3, 4))
    )
    assert len(record.masks) == 3
    assert source[1].turns[0].answer == "thing 0 of picture 2"


def test_images_without_annotations_are_dropped_and_counted(tmp_path: Path) -> None:
    content = coco(tmp_path)
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 101]
    content["annotations"].append({"id": 99, "image_id": 5, "segmentation": [POLYGON]})  # of no image
    # Without ids nothing belongs together.
    content["annotations"].append({"segmentation": [POLYGON], "category_id": 3})
    content["images"].append({"file_name": "COCO_0.jpg", "height": 48, "width": 64})
    source = opened(Coco, tmp_path, content)
    assert len(source) == 2
    assert source.dropped == {"an image without annotations": 2}
    assert source[1].image == (tmp_path / "images/COCO_2.jpg").read_bytes()


def set_at(content: Any, path: tuple, value: Any) -> None:
    *parents, last = path
    for key in parents:
        content = content[key]
    if value is None:
        del content[last]
    else:
        content[last] = value


BAD_ANNOTATIONS = [
    ({"segmentation": None}, "region 2 of 5: no key 'segmentation'"),
    ({"segmentation": [[1, 2, 3, 4]]}, "region 2 of 5: a polygon needs at least 3 points"),
    ({"segmentation": []}, "region 2 of 5: a segmentation without polygons"),
    ({"segmentation": uncompressed(box_mask(9, 9, 1, 1, 5, 5))}, r"region 2 of 5: the RLE is \[9, 9\]"),
    ({"segmentation": compressed(box_mask(48, 63, 1, 1, 5, 5))}, r"expected \[48, 64\]"),
    ({"segmentation": {"size": [48, 64], "counts": "??"}}, "region 2 of 5: the RLE's counts do not add up"),
    ({"segmentation": "none"}, "region 2 of 5: a segmentation is a list of polygons or an RLE, got str"),
    ({"category_id": None}, "no key 'category_id'"),
    ({"category_id": 99}, "no category 99"),
    ({"category_id": []}, r"no category \[\]"),
]
BAD_IMAGES = [
    ({"file_name": None}, "no key 'file_name'"),
    ({"file_name": 7}, "'file_name' should be str, got int"),
    ({"file_name": "../1.jpg"}, "outside"),
    ({"height": None}, "no key 'height'"),
    ({"height": "tall"}, "'height' should be a whole number, got 'tall'"),
    ({"width": 0}, "'width' should be positive, got 0"),
    ({"width": float("inf")}, "'width' should be a whole number, got inf"),
    ({"file_name": "gone.jpg"}, "no image gone.jpg in "),
]


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [(("annotations", 1), *bad) for bad in BAD_ANNOTATIONS] + [(("images", 0), *bad) for bad in BAD_IMAGES],
)
def test_a_bad_sample_says_what_is_wrong_and_stops_no_other(
    tmp_path: Path, path: tuple, changes: dict, message: str
) -> None:
    content = coco(tmp_path)
    for key, value in changes.items():
        set_at(content, (*path, key), value)
    if path[0] == "annotations":
        turns = opened(Coco, tmp_path, content)[0].turns
        assert [turn.regions for turn in turns] == [(0,), (1,), (2,), (3,)]
        (told,) = opened(Coco, tmp_path, content)[0].broken_regions
        assert re.search(message, told)
        # Where no region is left, the sample is of no use.
        of_image = content["annotations"][1]["image_id"]
        others = [each for each in content["annotations"] if each["image_id"] == of_image]
        content["annotations"] = [others[1], *(a for a in content["annotations"] if a not in others)]
        message = message.replace("2 of 5", "1 of 1")
    source = opened(Coco, tmp_path, content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        source[0]
    assert [len(source[index].turns) for index in (1, 2)] == [5, 5]
    assert len({source.image_key(index) for index in range(3)}) == 3


def test_a_category_without_a_name_spoils_only_what_is_of_it(tmp_path: Path) -> None:
    content = coco(tmp_path)
    content["categories"][1] = {"id": 7}
    content["annotations"] = [
        each for each in content["annotations"] if each["category_id"] == 3 or each["id"] < 3
    ]
    source = opened(Coco, tmp_path, content)
    for record in (source[0], source[1]):
        assert {turn.answer for turn in record.turns} <= {"cup"}
    assert all("no key 'name'" in told for told in source[0].broken_regions)
    assert source[0].broken_regions


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (Coco, "[]", "should hold an object"),
        (Coco, "{}", "should have a list of annotations and categories and images"),
        (Coco, '{"images": [], "annotations": {}, "categories": []}', "should have a list of annotations"),
        (VisualGenome, '{"images": []}', "should have a list of annotations"),
        (Coco, '{"images": [{]}', "is no JSON"),
        (Coco, '{"images": [] "annotations": []}', "is no JSON.*Expecting ',' or '}'"),
        (Coco, '{"images": [1 2]}', r"is no JSON.*Expecting ',' or '\]'"),
        (Coco, '{images: []}', "is no JSON"),
        (Coco, '{"images": [], "annotations": [], "categories": []} 1', "is no JSON: Extra data"),
        (Coco, '{"info": ' + "[" * 200_000, "is nested too deeply"),
        (OspreyConversation, "{}", "should hold a list"),
        (OspreyConversation, "", "should hold a list"),
        (OspreyConversation, "[", "is no JSON"),
        (OspreyConversation, "[{}, ", "is no JSON"),
        (OspreyConversation, "[{},]", "is no JSON"),
        (OspreyConversation, "[{}] []", "is no JSON: Extra data"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_refused_by_its_name(
    tmp_path: Path, kind: type[FileSource], text: str, message: str
) -> None:
    path = tmp_path / "annotations.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"annotations\.json {message}"):
        kind(path, tmp_path)
    path.write_text("\n\t [ ]\r\n")
    assert len(OspreyConversation(path, tmp_path)) == 0


def test_missing_annotations_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"annotations\.json"):
        Coco(tmp_path / "annotations.json", tmp_path)


def test_text_is_utf_8_and_what_is_not_spoils_its_sample_only(tmp_path: Path) -> None:
    texts = ["Was zeigt <region1>?", "eine Tür, 门, \U0001f6aa"]
    content = [osprey_sample(number, 1, texts, file_name=f"x_Tür{number}.jpg") for number in range(3)]
    for number in range(3):
        image(tmp_path / f"images/Tür{number}.jpg", number)
    path = tmp_path / "annotations.json"
    for escaped in (True, False):
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content, ensure_ascii=escaped, indent=1).encode())
        source = OspreyConversation(path, tmp_path / "images")
        assert source[1].turns[0].answer == texts[1]
        assert source.image_key(1).endswith("/images/Tür1.jpg")

    raw = path.read_bytes()
    place = raw.index("门".encode(), len(raw) // 2)
    path.write_bytes(raw[:place] + b"\xff" + raw[place + 1 :])
    source = OspreyConversation(path, tmp_path / "images")
    with pytest.raises(ValueError, match="the sample is no UTF-8"):
        source[1]
    assert [source[index].turns[0].answer for index in (0, 2)] == [texts[1]] * 2
    assert len({source.image_key(index) for index in range(3)}) == 3


def test_a_source_takes_far_less_than_its_file_and_works_after_pickling(tmp_path: Path) -> None:
    content = coco(tmp_path)
    content["images"] += [{**content["images"][0], "id": number} for number in range(1000, 1400)]
    content["annotations"] += [
        {**content["annotations"][2], "image_id": number, "id": number} for number in range(1000, 1400)
    ]
    source = opened(Coco, tmp_path, content)
    data = pickle.dumps(source)
    assert len(data) < 0.5 * (tmp_path / "annotations.json").stat().st_size
    again = pickle.loads(data)
    assert len(again) == 403
    assert again[400].turns == source[400].turns
    assert again.image_key(400) == source.image_key(0)


def test_a_file_that_changed_since_is_told_and_not_misread(tmp_path: Path) -> None:
    source = opened(Coco, tmp_path, coco(tmp_path))
    with (tmp_path / "annotations.json").open("a") as file:
        file.write(" ")
    with pytest.raises(OSError, match=r"annotations\.json has changed since it was opened"):
        source[0]


def test_an_index_outside_of_the_source_is_refused(tmp_path: Path) -> None:
    source = opened(Coco, tmp_path, coco(tmp_path))
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"no sample {index} among 3"):
            source[index]
        with pytest.raises(IndexError):
            source.image_key(index)


def test_one_image_has_one_key_in_all_sources(tmp_path: Path) -> None:
    write_osprey_724k(tmp_path / "osprey", tmp_path / "images")
    (tmp_path / "more").symlink_to(tmp_path / "images")
    talk = OspreyConversation(tmp_path / "osprey/osprey_conversation.json", tmp_path / "images")
    lvis = OspreyLvis(tmp_path / "osprey/osprey_lvis_positive_negative.json", tmp_path / "more")
    keys = [talk.image_key(index) for index in range(3)]
    assert keys == [lvis.image_key(index) for index in range(3)]
    assert keys == [str((tmp_path / f"images/{number:012}.jpg").resolve()) for number in range(3)]


def test_the_fixtures_write_the_three_forms() -> None:
    kinds = [type(each["counts"]) if isinstance(each, dict) else list for each in segmentations(48, 64)]
    assert kinds == [list, list, str, list, list]
