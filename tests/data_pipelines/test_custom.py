"""A user's JSONL becomes the records that its documentation promises."""

import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data_pipelines.conversation import converse, draws
from data_pipelines.records import Record
from data_pipelines.sources.custom import Custom
from data_pipelines.transforms import encode
from osprey_jax.config import OspreyConfig
from osprey_jax.prompt import IGNORE_LABEL, IMAGE_TOKEN_ID, Tokenizer
from tests.data_pipelines.custom_files import (
    CUT_OFF,
    HEIGHT,
    WIDTH,
    encoded,
    picture,
    sample,
    says,
    write_images,
    write_lines,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path)
    return tmp_path


def record(folder: Path, *args: Any, **fields: Any) -> Record:
    return Custom(write_lines(folder / "data.jsonl", [sample(*args, **fields)]))[0]


def mask_of(folder: Path, region: dict) -> np.ndarray:
    made = record(folder, regions=[region])
    assert made.masks[0]["size"] == [HEIGHT, WIDTH]
    return coco_mask.decode(dict(made.masks[0]))


def test_prompt_is_the_overview_then_the_questions_with_regions_in_their_places(folder):
    made = record(
        folder,
        "Is <region2> left of <region1>?",
        "<region2> is.",
        "And <region2>?",
        "No.",
        regions=[{"box": [0, 0, 2, 2]}, {"box": [4, 4, 5, 5]}],
    )
    said = converse(made, draws(0, "custom", 0, 0))
    assert said.turns == (
        (
            "<image>\nThis provides an overview of the picture.\nIs <mask><pos> left of <mask><pos>?",
            "region2 is.",
        ),
        ("And <mask><pos>?", "No."),
    )
    assert said.regions == ((1, 0), (1,))
    assert made.at_most == 0
    assert made.image == (folder / "a.jpg").read_bytes()


def test_listed_regions_make_the_prompt_that_chat_uses(folder):
    made = record(
        folder,
        "Is <region2> left of <region1>?",
        "<region2> is.",
        "And <region3>?",
        "No.",
        regions=[{"box": [0, 0, 2, 2]}, {"box": [4, 4, 5, 5]}, CUT_OFF],
        list_regions=True,
    )
    said = converse(made, draws(0, "custom", 0, 0))
    assert said.turns == (
        (
            "<image>\nThis provides an overview of the picture.\nTher are 3 part regions in the picture: "
            "region1<mask><pos>,region2<mask><pos>,region3<mask><pos>. Is region2 left of region1?",
            "region2 is.",
        ),
        ("And region3?", "No."),
    )
    assert said.regions == ((0, 1, 2), ())


def test_regions_are_listed_only_where_that_is_asked_for_and_there_are_some(folder):
    for made in (
        record(folder, list_regions=False),
        record(folder, "A?", "B.", regions=[], list_regions=True),
    ):
        assert made.opening == "<image>\nThis provides an overview of the picture.\n"
        assert made.opening_regions == ()


def test_encoded_sample_carries_loss_on_answers_alone(
    folder: Path, tokenizer: Tokenizer, config: OspreyConfig
):
    # The vocabulary of the tests has a word for everything that is said here.
    made = record(folder, "What is <region1>", "red car")
    example = encode(
        made, tokenizer, config, rng=draws(0, "custom", 0, 0), length=64, regions=4, system="Sys"
    )
    ids = example.tokens.input_ids.tolist()
    overview = [0] * len(["This", "provides", "an", "overview", "of", "the", "picture."])
    assert ids == [1, 3, 4, *[IMAGE_TOKEN_ID] * 4, *overview, 6, 7, 11, 12, 5, 8, 10, 2]
    assert example.tokens.labels.tolist() == [IGNORE_LABEL] * (len(ids) - 3) + [8, 10, 2]


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ([1, 2, 4, 5], slice(2, 5), slice(1, 4)),
        ([0, 0, WIDTH, HEIGHT], slice(None), slice(None)),
        # A centre on the first edge belongs to it, one on the last doesn't.
        ([1.5, 0.5, 3.5, 2.5], slice(0, 2), slice(1, 3)),
        ([1.51, 0.51, 3.51, 2.51], slice(1, 3), slice(2, 4)),
        ([-(10**400), -5, 1, 10**400], slice(None), slice(0, 1)),
        ([0.6, 0.6, 1.4, 1.4], slice(0), slice(0)),
        ([100, 0, 101, 1], slice(0), slice(0)),
    ],
)
def test_box_holds_the_pixels_whose_centre_is_inside(folder, box, rows, columns):
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[rows, columns] = 1
    # A second region keeps the sample where the first is empty.
    made = record(folder, "<region1> <region2>?", "Yes.", regions=[{"box": box}, {"box": [0, 0, 1, 1]}])
    assert np.array_equal(coco_mask.decode(dict(made.masks[0])), expected)


def test_polygons_are_rasterised_as_pycocotools_does(folder):
    polygons = [[0.5, 0.5, 6.2, 1, 3, 5.5], [5, 3, 9, 3, 9, 9, 5, 9]]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, HEIGHT, WIDTH)))
    assert np.array_equal(mask_of(folder, {"polygon": polygons}), expected)
    alone = coco_mask.decode(coco_mask.frPyObjects(polygons[:1], HEIGHT, WIDTH))[..., 0]
    assert np.array_equal(mask_of(folder, {"polygon": polygons[0]}), alone)


def test_both_forms_of_rle_are_read(folder):
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[1:3, 2] = 1
    counts = [2 * HEIGHT + 1, 2, HEIGHT * WIDTH - 2 * HEIGHT - 3]
    whole = coco_mask.encode(np.asfortranarray(expected))
    for rle in (counts, whole["counts"].decode()):
        assert np.array_equal(mask_of(folder, {"rle": {"size": [HEIGHT, WIDTH], "counts": rle}}), expected)


def _inside() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[2:4, 3:] = 1
    return mask


def _palette() -> Image.Image:
    indexed = Image.new("P", (WIDTH, HEIGHT))
    indexed.putpalette([255, 255, 255, 0, 0, 0])
    indexed.putdata(_inside().ravel().tolist())
    return indexed


MASKS = {
    "grey": Image.fromarray(_inside()),
    "one bit": Image.fromarray(_inside() * 255).convert("1"),
    # Whose low byte alone would be 0.
    "deep": Image.fromarray(_inside().astype(np.uint16) * 256),
    "indices of a palette": _palette(),
    "three equal channels": Image.fromarray(_inside() * 200).convert("RGB"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_png_is_inside_where_it_is_not_zero(folder, kind):
    (folder / "m.png").write_bytes(encoded(MASKS[kind], "PNG"))
    assert np.array_equal(mask_of(folder, {"png": "m.png"}), _inside())


def test_region_without_a_pixel_leaves_with_its_turn(folder):
    made = record(
        folder, "<region1>?", "Gone.", "<region2>?", "Here.", regions=[CUT_OFF, {"box": [0, 0, 2, 2]}]
    )
    said = converse(made, draws(0, "custom", 0, 0))
    assert [answer for _, answer in said.turns] == ["Here."]
    assert said.dropped_regions == 1


def test_region_without_a_pixel_stays_where_another_is_named_with_it_or_it_is_named_again(folder):
    regions = [CUT_OFF, {"box": [0, 0, 2, 2]}]
    for second in ("<region1> or <region2>?", "<region1>?"):
        made = record(folder, "<region1>?", "Gone.", second, "Here.", regions=regions)
        said = converse(made, draws(0, "custom", 0, 0))
        assert [answer for _, answer in said.turns] == ["Gone.", "Here."]
        assert said.dropped_regions == 0


def test_regions_count_beyond_nine(folder):
    made = record(folder, "<region12>, <region1>?", "<region10>", regions=[{"box": [0, 0, 2, 2]}] * 12)
    assert made.turns == (("<mask><pos>, <mask><pos>?", "region10", (11, 0), "", ""),)


def test_conversation_about_the_whole_picture_needs_no_region(folder):
    made = record(folder, "What is it?", "A car.", regions=[])
    assert made.masks == ()
    assert made.turns[0].regions == ()


def test_samples_are_named_by_file_line_and_id(folder):
    lines = ["", sample(), "  ", sample(id=7), "no JSON", sample(id="ä")]
    source = Custom(write_lines(folder / "data.jsonl", lines))
    assert [source[i].sample_id for i in range(3)] == ["data.jsonl:2", "data.jsonl:4 (7)", "data.jsonl:6 (ä)"]
    assert dict(source.dropped) == {"a line that is no JSON object": 1}


def test_images_and_masks_are_found_in_another_folder_or_a_tar(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write_lines(elsewhere / "data.jsonl", [sample(regions=[{"png": "mask.png"}])])
    with tarfile.open(elsewhere / "all.tar", "w") as archive:
        for name in ("a.jpg", "mask.png"):
            archive.add(folder / name, name)
    for images in (folder, elsewhere / "all.tar"):
        made = Custom(path, images)[0]
        assert made.image == (folder / "a.jpg").read_bytes()
        assert coco_mask.area(dict(made.masks[0])) == 1


def test_samples_of_one_image_have_one_key(folder):
    lines = [sample(), sample(image="cmyk.jpg"), sample(image="./a.jpg")]
    source = Custom(write_lines(folder / "data.jsonl", lines))
    keys = [source.image_key(i) for i in range(3)]
    assert keys[0] == keys[2] != keys[1]


def test_pickled_source_reads_the_same_and_holds_no_open_file(folder):
    source = Custom(write_lines(folder / "data.jsonl", [b"\xef\xbb\xbf", sample(id=1), sample(id=2)]))
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i].sample_id for i in range(2)] == [source[i].sample_id for i in range(2)]
    assert copy[1].masks == source[1].masks


def test_other_keys_mean_nothing(folder):
    made = record(folder, regions=[{"box": [0, 0, 2, 2], "label": "a thing"}], split="train")
    assert len(made.masks) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": None}, "`image` is null"),
        ({"image": "none.jpg"}, "no image none.jpg"),
        ({"image": "../a.jpg"}, "outside of the images"),
        ({"image": "mask.txt"}, "mask.txt is no image"),
        ({"regions": {}}, "`regions` is an object that is empty"),
        ({"regions": [3]}, "region 1: a number where an object"),
        ({"regions": [{}]}, "region 1: it has no mask (it has no keys)"),
        ({"regions": [{"Bbox": 1, "id": 2}]}, "its keys are 'Bbox', 'id'; is 'Bbox' meant to be box?"),
        ({"list_regions": 1}, "`list_regions` is a number; give true or false"),
        ({"list_regions": None}, "`list_regions` is null; give true or false"),
        ({"regions": [{"box": [0, 0, 1, 1], "png": "mask.png"}]}, "region 1: it has png and box"),
        ({"regions": [{"box": [0, 0, 1]}]}, "`box` is [0, 0, 1], not four finite numbers; give [x0, y0"),
        ({"regions": [{"box": [0, [1], {}, "1"]}]}, '`box` is [0, […], {…}, "1"], not four'),
        ({"regions": [{"box": {"x": 1}}]}, "`box` is an object, not four"),
        ({"regions": [{"polygon": [[0, 0], [5, 0], [5, 5]]}]}, "flat lists of coordinates, no pairs"),
        ({"regions": [{"polygon": [[[0, 0], [5, 0], [5, 5]]]}]}, "flat lists of coordinates, no pairs"),
        ({"regions": [{"box": [4, 0, 1, 1]}]}, "two corners"),
        ({"regions": [{"box": [1, 0, 1, 1]}]}, "two corners"),
        ({"regions": [{"box": [0, 1, 1, 1]}]}, "two corners"),
        ({"regions": [{"polygon": [0, 0, 5, 5]}]}, "at least 3 points"),
        ({"regions": [{"polygon": {"counts": [48], "size": [6, 8]}}]}, "`polygon` is an object"),
        ({"regions": [{"rle": [[0, 0, 5, 0, 5, 5]]}]}, "`rle` is a list"),
        ({"regions": [{"rle": {"size": [8, 6], "counts": [48]}}]}, "expected [6, 8]"),
        ({"regions": [{"png": "a.jpg"}]}, "a.jpg is no PNG"),
        ({"regions": [{"png": "small.png"}]}, "small.png is (1, 1) (height, width), the image is (6, 8)"),
        ({"regions": [{"png": "colours.png"}]}, "colours.png is a colour image"),
        ({"id": True}, "`id` is true or false"),
        ({"conversations": []}, "`conversations` is a list that is empty"),
        ({"conversations": says("Alone")}, "message 1 has no answer"),
        ({"conversations": says("What?", "This.")[::-1]}, "`from` is 'gpt', not human"),
        ({"conversations": says("What?", " ")}, "message 2: `value`"),
        ({"conversations": [{"from": "human"}, "x"]}, "`value` is missing"),
        ({"conversations": says("<region2>?", "x")}, "<region2> is named, there is 1 region"),
        ({"conversations": says("<region1>?", "<region2>")}, "message 2: <region2> is named"),
        ({"conversations": says("<region0>?", "x")}, "'<region0>' names no region"),
        ({"conversations": says("<region>?", "x")}, "'<region>' names no region"),
        ({"conversations": says("<Region 1>?", "x")}, "'<Region 1>' names no region"),
        *(
            ({"conversations": says("What?", f"a {token} b")}, f"{token} is in the text")
            for token in ("<image>", "<mask>", "<pos>", "<s>", "</s>", "<unk>")
        ),
    ],
)
def test_what_is_wrong_is_said_with_the_line_when_the_sample_is_asked_for(folder, fields, message):
    (folder / "mask.txt").write_text("no image")
    (folder / "small.png").write_bytes(encoded(Image.new("L", (1, 1)), "PNG"))
    (folder / "colours.png").write_bytes(encoded(picture(), "PNG"))
    source = Custom(write_lines(folder / "data.jsonl", [sample(), sample(**fields)]))
    assert len(source) == 2
    with pytest.raises(ValueError, match=r"^data\.jsonl:2: ") as caught:
        source[1]
    assert message in str(caught.value)


def test_missing_keys_are_named(folder):
    source = Custom(write_lines(folder / "data.jsonl", ["{}"]))
    with pytest.raises(
        ValueError, match=r"`image` is missing.*`regions` is missing.*`conversations` is missing"
    ):
        source[0]
    source = Custom(write_lines(folder / "data.jsonl", ['{"images": "a.jpg", "text": ""}']))
    with pytest.raises(ValueError, match=r"its keys are 'images', 'text'; is 'images' meant to be image\?"):
        source[0]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[1]",
        b"\xff\xfe{\x00}\x00",
        b'{"id": NaN}',
        b'{"id": -Infinity}',
        b'{"id": 1, "id": 1}',
        b'{"a": {"id": 1, "id": 1}}',
        b'{"id": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"image": "\\uD800.jpg"}',
    ],
)
def test_lines_that_readers_of_json_disagree_about_have_no_index(folder, line):
    source = Custom(write_lines(folder / "data.jsonl", [sample(), line, sample()]))
    assert (len(source), source.dropped.total()) == (2, 1)
    assert source[1].sample_id == "data.jsonl:3"


@pytest.mark.parametrize(
    ("text", "convert"),
    [
        ('\n  [{"image": "a.jpg"}]', "jq -c '.[]'"),
        ("\ufeff[\n]", "jq -c '.[]'"),
        ('{\n  "image": "a.jpg"\n}\n', "jq -c ."),
    ],
)
def test_json_that_is_no_jsonl_is_refused_with_the_way_to_convert_it(folder, text, convert):
    path = folder / "my data.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{path} is JSON and not JSONL") as caught:
        Custom(path)
    assert str(caught.value).endswith(f" {convert} '{path}' > '{path}.jsonl'")


def test_image_of_too_many_pixels_is_refused_before_it_is_decoded(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(ValueError, match=r"a\.jpg has more than 47 pixels"):
        record(folder)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 3)  # where Pillow raises by itself
    with pytest.raises(ValueError, match=r"a\.jpg has more than 16 pixels"):
        record(folder)
