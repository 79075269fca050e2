"""Sources by name, their places under a data root, and the ways to ask."""

import string
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.builder import prepare
from data_pipelines.catalog import CATALOG, missing, open_from_root, open_source
from data_pipelines.paraphrases import PHRASES
from tests.data_pipelines.data_files import write_all

PLACES = {
    "coco": ("coco/annotations/instances_train2017.json", "coco/imgs"),
    "refcoco": ("refcocos/finetune_refcoco_train_with_mask.json", "coco/imgs"),
    "refcoco_plus": ("refcocos/finetune_refcoco+_train_with_mask.json", "coco/imgs"),
    "pascal_part": ("part_data/pascal_part/train.json", "part_data/pascal_part/VOCdevkit/VOC2010/JPEGImages"),
    "part_imagenet": ("part_data/partImagenet/train_format.json", "part_data/partImagenet/train"),
    "vg": ("vg/vg_train_with_mask.json", "vg/image"),
    "vcr": ("vcr/train.jsonl", "vcr/vcr1images"),
    "osprey_conversation": ("Osprey-724K/osprey_conversation.json", "coco/imgs"),
    "osprey_short_form": ("Osprey-724K/osprey_short_form.json", "coco/imgs"),
    "osprey_part_level": ("Osprey-724K/osprey_part_level.json", "coco/imgs"),
    "osprey_lvis": ("Osprey-724K/osprey_lvis_positive_negative.json", "coco/imgs"),
    "osprey_detailed": ("Osprey-724K/osprey_detail_description.json", "coco/imgs"),
    "llava_pretrain": ("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain/images"),
    "llava_instruct": ("llava_v1_5_mix665k.json", "."),
}
OTHERS = {"custom", "shapes", "tfds_coco", "tfds_ref_coco", "tfds_lvis"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_all(root)
    return root


def test_every_source_has_its_name_and_place() -> None:
    assert CATALOG.keys() == PLACES.keys() | OTHERS
    assert {name: (CATALOG[name].annotations, CATALOG[name].images) for name in PLACES} == PLACES
    assert all(entry.get.endswith(".") for entry in CATALOG.values())


@pytest.mark.parametrize("name", PLACES)
def test_a_source_opens_from_the_root_as_from_its_files(root: Path, name: str) -> None:
    source = open_from_root(name, root)
    annotations, images = PLACES[name]
    again = open_source(name, annotations=root / annotations, images=root / images)
    assert source.name == name
    assert len(source) == len(again) == 3
    assert not source.dropped
    for index in range(3):
        record = source[index]
        assert record.turns == again[index].turns
        assert record.sample_id == f"{name}/{index}"
        assert (record.opening == "") == (record.image is None)
        assert source.image_key(index) == again.image_key(index)


def test_sources_of_one_image_agree_on_its_key(root: Path) -> None:
    keys = {name: open_from_root(name, root).image_key(0) for name in PLACES}
    of_coco = {name for name, (_, images) in PLACES.items() if images == "coco/imgs"}
    assert len(of_coco) == 8
    assert len({keys[name] for name in of_coco}) == 1
    assert len(set(keys.values())) == 1 + len(PLACES) - len(of_coco)


def test_what_is_missing_is_said_of_all_at_once(root: Path, tmp_path: Path) -> None:
    names = [*PLACES, "shapes", "custom:mine.jsonl", "prepared"]
    lines = missing(names, tmp_path)
    assert [line.partition(": ")[0] for line in lines] == [*PLACES, "custom:mine.jsonl", "prepared"]
    for name, line in zip(PLACES, lines, strict=False):
        annotations, images = PLACES[name]
        assert f"there is no {tmp_path / annotations}" in line
        assert (f"and no {tmp_path / images}" in line) == (images != ".")
        assert CATALOG[name].get in line
    assert missing([*PLACES, "shapes"], root) == []


def test_a_users_file_is_named_with_custom(root: Path) -> None:
    (root / "mine.jsonl").write_text("")
    assert missing(["custom:mine.jsonl"], root) == []
    assert open_from_root("custom:mine.jsonl", root).name == "custom"
    assert open_from_root(f"custom:{root / 'mine.jsonl'}", "elsewhere").name == "custom"
    with pytest.raises(ValueError, match=r"custom:FILE\.jsonl"):
        open_from_root("custom", root)
    assert "custom:FILE.jsonl" in missing(["custom"], root)[0]


def test_a_prepared_directory_is_a_source(root: Path, tmp_path: Path) -> None:
    annotations, images = PLACES["osprey_detailed"]
    prepare(
        "osprey_detailed",
        annotations=root / annotations,
        images=root / images,
        output=root / "prepared/detailed",
        workers=1,
    )
    assert missing(["prepared/detailed"], root) == []
    source = open_from_root("prepared/detailed", root)
    assert [source[index].turns for index in range(3)] == [
        record.turns for record in map(open_from_root("osprey_detailed", root).__getitem__, range(3))
    ]


def test_unknown_names_and_wrong_paths_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"no source 'cocoa'.*coco, refcoco"):
        open_source("cocoa")
    with pytest.raises(ValueError, match=r"no source 'cocoa'.*coco, refcoco"):
        open_from_root("cocoa", root)
    with pytest.raises(ValueError, match="the source coco needs annotations and images"):
        open_source("coco")
    with pytest.raises(ValueError, match="the source vg needs images"):
        open_source("vg", annotations=root / "vg/vg_train_with_mask.json")
    with pytest.raises(ValueError, match="the source shapes takes no annotations and no images"):
        open_source("shapes", annotations="a", images="b")
    assert open_source("shapes").name == "shapes"


def test_a_hosted_set_that_is_not_there_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="lvis"):
        open_source("tfds_lvis", annotations=tmp_path)

    def absent() -> None:
        raise ValueError("lvis isn't here")

    monkeypatch.setattr("data_pipelines.sources.hosted.HostedLvis", absent)
    assert missing(["tfds_lvis"], tmp_path) == [f"tfds_lvis: lvis isn't here. {CATALOG['tfds_lvis'].get}"]


def test_naming_sources_imports_nothing_that_is_not_opened() -> None:
    code = (
        "import sys; from data_pipelines.catalog import CATALOG, open_source; open_source('shapes'); "
        "print([m for m in ('tensorflow_datasets', 'array_record', 'jax', 'grain') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(("kind", "places"), [("short", 1), ("detailed", 1), ("why", 0), ("lead_in", 1)])
def test_there_are_enough_ways_to_ask_each_with_its_place(kind: str, places: int) -> None:
    phrases = PHRASES[kind]
    assert len({phrase.casefold() for phrase in phrases}) == len(phrases) >= 20
    for phrase in phrases:
        fields = [name for _, name, _, _ in string.Formatter().parse(phrase) if name is not None]
        assert fields == [""] * places
        assert phrase == phrase.strip()
        assert not set("<>\n") & set(phrase)
        assert phrase[-1] in ".?:,"
    assert set(PHRASES) == {"short", "detailed", "why", "lead_in"}
