"""The five files of Osprey-724K against texts written out as the original's loaders make them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from data_pipelines.records import Record, Turn
from data_pipelines.sources.files import FileSource
from data_pipelines.sources.osprey_724k import (
    OspreyConversation,
    OspreyDetailed,
    OspreyLvis,
    OspreyPartLevel,
    OspreyShortForm,
)
from osprey_jax.masks import decode_rles
from tests.data_pipelines.data_files import image, messages, osprey_sample, write_json

OVERVIEW = "<image>\nThis provides an overview of the picture.\n"
TALK = ["Is <region1> on <region2>? ", "<region1> is < 2 m from it>.", " And<>?", "No"]


def opened(kind: type[FileSource], tmp_path: Path, *samples: Any) -> FileSource:
    for number in range(3):
        image(tmp_path / f"images/{number:012}.jpg", number)
    return kind(write_json(tmp_path / "annotations.json", samples), tmp_path / "images")


def reference_masks(sample: dict[str, Any]) -> list[np.ndarray]:
    height, width = sample["height"], sample["width"]
    masks = []
    for annotation in sample["annotation"]:
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list):
            segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            segmentation = coco_mask.frPyObjects(segmentation, height, width)
        masks.append(coco_mask.decode(segmentation))
    return masks


def check_masks(record: Record, sample: dict[str, Any]) -> None:
    np.testing.assert_array_equal(decode_rles(record.masks), reference_masks(sample))


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        (OspreyConversation, ""),
        (OspreyShortForm, " Answer the question using a single word or phrase."),
        (OspreyPartLevel, " Answer the question using a single word or phrase."),
    ],
)
def test_dialogues_list_their_regions_and_lose_angle_brackets(
    tmp_path: Path, kind: type[FileSource], limit: str
) -> None:
    samples = [osprey_sample(0, 5, TALK), osprey_sample(1, 1, TALK), osprey_sample(2, 0, TALK)]
    source = opened(kind, tmp_path, *samples)
    openings = [
        "Ther are 5 part regions in the picture: region1<mask><pos>,region2<mask><pos>,region3<mask><pos>,"
        "region4<mask><pos>,region5<mask><pos>. ",
        "Ther are 1 part region in the picture: region1<mask><pos>. ",
        "Ther are 0 part regions in the picture: . ",
    ]
    for index, opening in enumerate(openings):
        record = source[index]
        assert record.opening == OVERVIEW + opening
        assert record.turns == (
            Turn("Is region1 on region2? " + limit, "region1 is  2 m from it."),
            Turn(" And?" + limit, "No"),
        )
        assert record.opening_regions == tuple(range(len(samples[index]["annotation"])))
        assert record.image == (tmp_path / f"images/{index:012}.jpg").read_bytes()
        assert record.at_most == 0
        assert record.sample_id == f"{source.name}/{index}"
        if index < 2:
            check_masks(record, samples[index])


def test_lvis_puts_regions_where_questions_name_them(tmp_path: Path) -> None:
    texts = ["Is <region2> a <cup>?", "<region2> is.", "<region1>, <region12>: < or >?", "Yes", "More?", "No"]
    sample = osprey_sample(1, 3, texts, file_name="000000000001.jpg")
    record = opened(OspreyLvis, tmp_path, sample)[0]
    assert record.opening == OVERVIEW
    assert record.opening_regions == ()
    # Each place takes the next annotation, whatever its number.
    assert record.turns == (
        Turn("Is <mask><pos> a <cup>?", "<region2> is.", (0,)),
        Turn("<mask><pos>, <mask><pos>: < or >?", "Yes", (1, 2)),
        Turn("More?", "No"),
    )
    check_masks(record, sample)
    assert record.image == (tmp_path / "images/000000000001.jpg").read_bytes()


def test_lvis_takes_the_file_name_as_it_is(tmp_path: Path) -> None:
    image(tmp_path / "images/COCO_train2014_000000000001.jpg", 4)
    sample = osprey_sample(1, 1, ["<region1>?", "Yes"])
    source = opened(OspreyLvis, tmp_path, sample)
    assert source[0].image == (tmp_path / "images/COCO_train2014_000000000001.jpg").read_bytes()
    assert source.image_key(0).endswith("/COCO_train2014_000000000001.jpg")


def test_detailed_descriptions_are_a_turn_for_each_region(tmp_path: Path) -> None:
    texts = ["<region1>: A dog: <brown>, wet.", "x <region2>: It is\ncut at the line.", "<region3>: <b>: c "]
    sample = osprey_sample(2, 3, [], description=texts)
    record = opened(OspreyDetailed, tmp_path, sample)[0]
    assert record.opening == OVERVIEW
    asked = {"phrases": "detailed", "slot": "<mask><pos>"}
    assert record.turns == (
        Turn("", "A dog: <brown>, wet.", (0,), **asked),
        Turn("", "It is", (1,), **asked),
        Turn("", "c ", (2,), **asked),
    )
    check_masks(record, sample)
    assert record.at_most == 0


def test_samples_without_a_turn_are_dropped_and_counted(tmp_path: Path) -> None:
    samples = [
        osprey_sample(0, 1, []),
        osprey_sample(1, 1, ["<region1>?", "a"], file_name="000000000001.jpg", description=["<r>: b"]),
        osprey_sample(2, 1, ["alone"]),
    ]
    for kind in (OspreyConversation, OspreyShortForm, OspreyPartLevel, OspreyLvis):
        source = opened(kind, tmp_path, *samples)
        assert source.dropped == {"a sample without a turn": 2}
        assert [turn.answer for turn in source[0].turns] == ["a"]
        assert len(source) == 1
    source = opened(OspreyDetailed, tmp_path, osprey_sample(0, 0, [], description=[]), samples[1])
    assert (len(source), source.dropped) == (1, {"a sample without a turn": 1})
    assert source[0].turns[0].answer == "b"


def test_a_question_without_an_answer_is_left_out(tmp_path: Path) -> None:
    source = opened(OspreyConversation, tmp_path, osprey_sample(0, 1, ["a", "b", "c"]))
    assert source[0].turns == (Turn("a", "b"),)


def test_turns_are_paired_by_place_alone(tmp_path: Path) -> None:
    sample = osprey_sample(0, 1, [], conversations=messages(["a", "b", "c", "d"])[::-1])
    record = opened(OspreyConversation, tmp_path, sample)[0]
    assert record.turns == (Turn("d", "c"), Turn("b", "a"))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (OspreyLvis, {"conversations": messages(["<region1>", "a"])}, "name 1 regions, there are 2"),
        (OspreyLvis, {"conversations": messages(["<region1>" * 3, "a"])}, "name 3 regions, there are 2"),
        (OspreyLvis, {"conversations": messages(["<region1><mask><pos><region1>?", "a"])}, "<mask><pos>"),
        (OspreyConversation, {"conversations": "none"}, "'conversations' should be list, got str"),
        (OspreyConversation, {"conversations": [{"from": "human"}] * 2}, "no key 'value'"),
        (OspreyConversation, {"conversations": [1, 2]}, "expected an object with 'value', got int"),
        (OspreyConversation, {"annotation": {}}, "'annotation' should be list, got dict"),
        (OspreyConversation, {"annotation": [[]]}, "region 1 of 1: expected an object with 'segmentation'"),
        (OspreyConversation, {"annotation": [{"segmentation": [[1, 2]]}]}, "region 1 of 1: a polygon needs"),
        (OspreyConversation, {"height": 47}, r"region 2 of 2: the RLE is \[48, 64\]"),
        (OspreyConversation, {"file_name": "x/../../y.jpg"}, "outside"),
        (OspreyDetailed, {"description": ["<region1>: a"]}, "1 descriptions for 2 annotations"),
        (OspreyDetailed, {"description": ["<region1>: a", "region2: b"]}, "description 2 is not of the form"),
        (OspreyDetailed, {"description": ["<region1>: a", 5]}, "'description' should hold str only, got int"),
        (OspreyDetailed, {}, "no key 'description'"),
    ],
)  # fmt: skip
def test_a_bad_sample_says_what_is_wrong_and_stops_no_other(
    tmp_path: Path, kind: type[FileSource], changes: dict[str, Any], message: str
) -> None:
    texts = ["<region1> and <region2>?", "a"]
    sample = osprey_sample(0, 2, texts, file_name="000000000000.jpg")
    good = {**sample, "description": ["<1>: a", "<2>: b"]}
    source = opened(kind, tmp_path, {**sample, **changes}, 7, good)
    with pytest.raises(ValueError, match=message):
        source[0]
    with pytest.raises(ValueError, match="got int"):
        source[1]
    assert source[2].turns[0].answer == "a"
    assert len({source.image_key(index) for index in range(3)}) >= 2
