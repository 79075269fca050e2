"""LLaVA's two files as records."""

from pathlib import Path
from typing import Any

import pytest

from data_pipelines.records import Turn
from data_pipelines.sources.files import FileSource
from data_pipelines.sources.llava import LlavaInstruct, LlavaPretrain
from tests.data_pipelines.data_files import image, messages, write_json


def llava(kind: type[FileSource], tmp_path: Path, *samples: Any) -> FileSource:
    image(tmp_path / "images/a/1.jpg", 1)
    return kind(write_json(tmp_path / "annotations.json", samples), tmp_path / "images")


def test_llava_pretrain_is_an_image_and_its_caption(tmp_path: Path) -> None:
    texts = ["Provide a brief description.\n<image>", "a red bus \n"]
    record = llava(LlavaPretrain, tmp_path, {"image": "a/1.jpg", "conversations": messages(texts)})[0]
    assert record.plain
    assert record.opening == "<image>\n"
    assert record.turns == (Turn("", "a red bus \n"),)
    assert record.image == (tmp_path / "images/a/1.jpg").read_bytes()
    assert (record.masks, record.opening_regions, record.at_most) == ((), (), 0)


@pytest.mark.parametrize(
    "first", ["<image>\nWhat is it?", "What is it?\n<image>", " What is <image>it? <image>"]
)
def test_llava_instruct_has_its_image_in_the_opening(tmp_path: Path, first: str) -> None:
    texts = [first, " A bus.", " Why? ", "It has doors."]
    record = llava(LlavaInstruct, tmp_path, {"image": "a/1.jpg", "conversations": messages(texts)})[0]
    assert record.opening == "<image>\n"
    assert record.turns == (Turn("What is it?", " A bus."), Turn(" Why? ", "It has doors."))
    assert record.image == (tmp_path / "images/a/1.jpg").read_bytes()
    assert not record.plain


def test_llava_instruct_without_image_is_a_conversation_about_none(tmp_path: Path) -> None:
    sample = {"conversations": messages([" Hi? ", "Hello.", "Bye"])}
    source = llava(LlavaInstruct, tmp_path, sample, sample)
    record = source[0]
    assert (record.image, record.opening, record.masks) == (None, "", ())
    assert record.turns == (Turn(" Hi? ", "Hello."),)  # the question at the end has no answer
    assert source.image_key(0) != source.image_key(1)


def test_llava_instruct_begins_with_the_human(tmp_path: Path) -> None:
    said = [{"from": "system", "value": "Be kind."}, *messages(["Hi?", "Hello."])]
    assert llava(LlavaInstruct, tmp_path, {"conversations": said})[0].turns == (Turn("Hi?", "Hello."),)


@pytest.mark.parametrize(
    ("kind", "sample", "message"),
    [
        (LlavaInstruct, {"conversations": messages(["Hi?"])}, "no question has an answer"),
        (LlavaInstruct, {"conversations": messages([])}, "no question has an answer"),
        (LlavaInstruct, {"conversations": messages(["a", "b"])[::-1]}, "no question has an answer"),
        (LlavaInstruct, {"conversations": messages(["a", "b", "c"])[::2]}, "don't take turns"),
        (LlavaInstruct, {"conversations": [{"from": "human"}]}, "no key 'value'"),
        (LlavaInstruct, {"conversations": [{"from": "human", "value": 1}]}, "'value' should be str, got int"),
        (LlavaInstruct, {"conversations": messages(["Is <image> red?", "Yes"])}, "other places"),
        (LlavaInstruct, {"image": "a/1.jpg", "conversations": messages(["Red?", "Yes"])}, "its image"),
        (LlavaInstruct, {"image": "a/1.jpg", "conversations": messages(["<image>"] * 2)}, "other places"),
        (LlavaInstruct, {"image": [], "conversations": messages(["<image>", "b"])}, "'image' should"),
        (LlavaInstruct, {}, "no key 'conversations'"),
        (LlavaInstruct, [], "expected an object with 'conversations', got list"),
        (LlavaPretrain, {"conversations": messages(["a", "b"])}, "no key 'image'"),
        (LlavaPretrain, {"image": "a/1.jpg", "conversations": messages(["a"])}, "got 1 messages"),
        (LlavaPretrain, 7, "got int"),
    ],
)  # fmt: skip
def test_a_llava_sample_that_is_out_of_order_is_refused(
    tmp_path: Path, kind: type[FileSource], sample: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llava(kind, tmp_path, sample)[0]
