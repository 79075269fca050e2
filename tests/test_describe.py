"""The describe command: what it writes, prints and refuses, mostly with a stand-in for the predictor."""

import inspect
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from osprey_jax import convert, describe, predictor
from osprey_jax.generate import Greedy
from osprey_jax.prompt import Tokenizer, tokenize
from tests.parity import reference

HEIGHT, WIDTH = 30, 40
LABELS = np.zeros((HEIGHT, WIDTH), np.uint8)
LABELS[2:10, 5:25] = 9
LABELS[15:29, 30:40] = 4
SHORT = "Please give me a short description of <region>. Using a short phrase."


class FakeOsprey:
    """Answers with the regions' areas; takes what the predictor takes and no more."""

    loads: list[tuple[Path, str | None, str | None]]
    calls: list[dict]
    failure: Exception | None

    def load(self, directory: Path, dtype: str | None = None, *, quantize: str | None = None) -> "FakeOsprey":
        self.loads.append((directory, dtype, quantize))
        return self

    def describe_each(self, *args: object, **options: object) -> Iterator[str]:
        bound = inspect.signature(predictor.Osprey.describe_each).bind(self, *args, **options)
        self.calls.append(bound.arguments)
        if self.failure is not None:
            raise self.failure
        for mask in bound.arguments["masks"]:
            yield f"a région of {mask.sum()} pixels"


@pytest.fixture
def osprey(monkeypatch: pytest.MonkeyPatch) -> FakeOsprey:
    fake = FakeOsprey()
    fake.loads, fake.calls, fake.failure = [], [], None
    monkeypatch.setattr(describe, "Osprey", fake)
    return fake


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a photograph, masks and a checkpoint's directory."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)).save("photo.png")
    Image.fromarray(LABELS).save("labels.png")
    (tmp_path / "checkpoint").mkdir()
    return tmp_path


def run(*options: str, masks: Sequence[str] = ("labels.png",), image: str = "photo.png") -> int:
    return describe.main(["--checkpoint", "checkpoint", "--image", image, "--masks", *masks, *options])


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"photo.png", "labels.png", "checkpoint"}


def test_the_output_has_a_line_for_each_region_in_order(osprey: FakeOsprey, folder: Path) -> None:
    assert run("--output", "words.jsonl") == 0
    lines = Path("words.jsonl").read_text(encoding="utf-8").splitlines()
    assert "région" in lines[0]
    records = [json.loads(line) for line in lines]
    keys = ["image", "region", "box", "area", "segmentation", "question", "text"]
    assert [list(record) for record in records] == [keys, keys]
    assert [record["region"] for record in records] == [4, 9]
    assert [record["box"] for record in records] == [[30, 15, 40, 29], [5, 2, 25, 10]]
    assert [record["area"] for record in records] == [140, 160]
    assert [record["text"] for record in records] == ["a région of 140 pixels", "a région of 160 pixels"]
    assert {record["image"] for record in records} == {"photo.png"}
    assert {record["question"] for record in records} == {SHORT}
    for record in records:
        np.testing.assert_array_equal(record["region"] == LABELS, coco_mask.decode(record["segmentation"]))
    assert files(folder) == {"words.jsonl"}


def test_ids_and_category_names_of_coco_annotations_are_in_the_output(osprey: FakeOsprey) -> None:
    annotations = [
        {"id": 71, "image_id": 1, "category_id": 2, "segmentation": [[1, 1, 9, 1, 9, 9]]},
        {"id": 72, "image_id": 1, "category_id": 3, "segmentation": [[90, 90, 99, 90, 99, 99]]},
    ]
    images = [{"id": 1, "file_name": "2017/photo.png"}, {"id": 2, "file_name": "2017/other.png"}]
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 2, "name": "dog"}]}
    Path("coco.json").write_text(json.dumps(coco))
    assert run("--output", "words.jsonl", masks=["coco.json"]) == 0
    first, outside = map(json.loads, Path("words.jsonl").read_text().splitlines())
    assert (first["region"], first["label"]) == (71, "dog")
    assert "label" not in outside
    assert (outside["region"], outside["box"], outside["area"]) == (72, [0, 0, 0, 0], 0)


def test_the_predictor_gets_the_image_the_masks_and_every_option(osprey: FakeOsprey) -> None:
    sampling = ["--temperature", "0.5", "--top-p", "0.9", "--seed", "3", "--max-new-tokens", "7"]
    options = ["--level", "detailed", "--dtype", "bfloat16", "--quantize", "int8", "--stop", "!", *sampling]
    assert run(*options, "--output", "o.jsonl") == 0
    assert osprey.loads == [(Path("checkpoint"), "bfloat16", "int8")]
    (call,) = osprey.calls
    np.testing.assert_array_equal(call["image"], np.asarray(Image.open("photo.png")))
    np.testing.assert_array_equal(call["masks"], [LABELS == 4, LABELS == 9])
    assert "Can you give me a detailed description of <mask><pos>? ASSISTANT:" in call["asked"].prompts[0]
    assert call["asked"].keep("it: a dog. a dog. a cat") == "a dog."
    sampler, limit, seed, stop = call["asked"].decoding
    assert (sampler.temperature, sampler.top_p) == (0.5, np.float32(0.9))
    assert (limit, seed) == (7, 3)
    assert stop == ("!",)
    question = "Can you give me a detailed description of <region>?"
    assert json.loads(Path("o.jsonl").read_text().splitlines()[0])["question"] == question


def test_defaults_are_short_greedy_answers(osprey: FakeOsprey) -> None:
    assert run() == 0
    assert osprey.loads == [(Path("checkpoint"), None, None)]
    (call,) = osprey.calls
    [prompt] = call["asked"].prompts
    assert "Please give me a short description of <mask><pos>. Using a short phrase." in prompt
    assert call["asked"].decoding == (Greedy(), 64, 0, ())


def test_an_own_question_is_asked_and_recorded(osprey: FakeOsprey) -> None:
    assert run("--question", "What colour is <region>?", "--output", "o.jsonl") == 0
    asked = osprey.calls[0]["asked"]
    assert "picture.\nWhat colour is <mask><pos>? ASSISTANT:" in asked.prompts[0]
    assert asked.keep("it: a dog. a dog. a cat") == "it: a dog. a dog. a cat"
    assert asked.decoding.limit == 512
    assert json.loads(Path("o.jsonl").read_text().splitlines()[1])["question"] == "What colour is <region>?"


def test_without_an_output_a_numbered_table_is_printed(
    osprey: FakeOsprey, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert run() == 0
    out, err = capsys.readouterr()
    # The text has the 30 columns that are its least.
    assert out.splitlines() == [
        "#  region  box          area  text",
        "1  4       30 15 40 29  140   a région of 140 pixels",
        "2  9       5 2 25 10    160   a région of 160 pixels",
    ]
    assert err == ""
    assert files(folder) == set()


def test_many_regions_show_progress(osprey: FakeOsprey, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8) % 11).save("many.png")
    assert run("--output", "o.jsonl", masks=["many.png"]) == 0
    assert "10/10" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "kind"), [("f.png", "PNG"), ("f.JPG", "JPEG"), ("f.jpeg", "JPEG")])
def test_the_figure_is_written_in_the_format_of_its_suffix(
    osprey: FakeOsprey, folder: Path, name: str, kind: str
) -> None:
    assert run("--figure", name) == 0
    with Image.open(name) as figure:
        figure.load()
        assert (figure.format, figure.mode) == (kind, "RGB")
        assert figure.width > 900
    assert files(folder) == {name}


def test_bad_annotations_are_named_and_the_rest_is_described(
    osprey: FakeOsprey, capsys: pytest.CaptureFixture[str]
) -> None:
    rle = coco_mask.encode(np.asfortranarray(LABELS == 9, np.uint8))
    good = {"id": 5, "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}
    Path("m.json").write_text(json.dumps([{"id": 6, "segmentation": [[1, 2]]}, good, {"id": 7}]))
    assert run("--output", "o.jsonl", masks=["m.json"]) == 0
    assert [json.loads(line)["region"] for line in Path("o.jsonl").read_text().splitlines()] == [5]
    warning, *reasons = capsys.readouterr().err.splitlines()[:3]
    assert "m.json: 2 of 3 annotations are left out" in warning
    assert ["annotation 6" in reasons[0], "annotation 7" in reasons[1]] == [True, True]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"image": "gone.jpg"}, "gone.jpg"),
        ({"image": "broken.png"}, "broken.png"),
        ({"masks": ["gone.json"]}, "gone.json"),
        ({"masks": ["small.png"]}, "small.png"),
        ({"masks": ["broken.png"]}, "broken.png"),
        ({"masks": ["empty.json"]}, "empty.json"),
        ({"masks": ["bad.json"]}, "bad.json: annotation 12"),
        ({"masks": ["photo.txt"]}, "photo.txt"),
        ({"output": "gone/o.jsonl"}, "gone"),
        ({"output": "checkpoint"}, "checkpoint"),
        ({"output": "labels.png"}, "labels.png"),
        ({"figure": "f.gif"}, "f.gif"),
        ({"figure": "gone/f.png"}, "gone"),
        ({"figure": "photo.png"}, "photo.png"),
        ({"figure": "./o.png", "output": "o.png"}, "o.png"),
        ({"checkpoint": "gone"}, "gone"),
    ],
)
def test_wrong_files_are_one_error_line_before_the_model_is_loaded(
    osprey: FakeOsprey, folder: Path, capsys: pytest.CaptureFixture[str], options: dict, named: str
) -> None:
    Path("broken.png").write_bytes(Path("photo.png").read_bytes()[:200])
    Image.fromarray(LABELS[:9]).save("small.png")
    Path("empty.json").write_text("[]")
    Path("bad.json").write_text('[{"id": 12, "segmentation": []}]')
    Path("photo.txt").write_text("")
    before = {path.name: path.is_dir() or path.read_bytes() for path in folder.iterdir()}
    usual = {"checkpoint": "checkpoint", "image": "photo.png", "masks": ["labels.png"], "output": "o.jsonl"}
    arguments = []
    for option, value in (usual | options).items():
        arguments += [f"--{option}", *([value] if isinstance(value, str) else value)]
    assert describe.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err
    assert osprey.loads == []
    assert {path.name: path.is_dir() or path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--question", "What is it?"], "a question must name <region> once"),
        (["--question", "Is <region> like <region>?"], "a question must name <region> once"),
        (["--question", "<image> What is <region>?"], "a question must not hold <image>"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--temperature", "-1"], "temperature must be"),
        (["--temperature", "nan"], "temperature must be"),
        (["--top-p", "0"], "top_p must be"),
        (["--top-p", "1.5"], "top_p must be"),
        (["--seed", str(2**63)], "seed must have"),
    ],
)
def test_what_the_predictor_refuses_is_refused_before_it_is_loaded(
    osprey: FakeOsprey, capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    assert run(*options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {named}")
    assert osprey.loads == []


@pytest.mark.parametrize(
    "options",
    [
        ["--question", "<region>?", "--level", "short"],
        ["--level", "long"],
        ["--max-new-tokens", "2.5"],
        ["--temperature", "warm"],
        ["--seed", "a"],
        ["--dtype", "float16"],
    ],
)
def test_options_of_another_kind_are_refused_with_status_2(
    osprey: FakeOsprey, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(*options)
    assert exit_.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument {options[-2] if len(options) > 2 else options[0]}" in last
    assert osprey.loads == []


def test_a_failing_model_leaves_old_files_alone_and_no_new_ones(
    osprey: FakeOsprey, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("o.jsonl").write_text("old")
    osprey.failure = ValueError("no room for so many tokens")
    assert run("--output", "o.jsonl", "--figure", "f.png") == 2
    assert capsys.readouterr().err == "error: no room for so many tokens\n"
    assert Path("o.jsonl").read_text() == "old"
    assert files(folder) == {"o.jsonl"}


def test_an_interrupted_write_leaves_the_old_file(
    osprey: FakeOsprey, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("f.png").write_text("old")

    def save(self: Image.Image, path: Path, **options: object) -> None:
        Path(path).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(KeyboardInterrupt):
        run("--figure", "f.png")
    assert Path("f.png").read_text() == "old"
    assert files(folder) == {"f.png"}


def test_an_existing_output_is_replaced_and_a_link_stays_one(osprey: FakeOsprey, folder: Path) -> None:
    Path("runs").mkdir()
    Path("runs/first.jsonl").write_text("old\n" * 9)
    Path("latest.jsonl").symlink_to("runs/first.jsonl")
    assert run("--output", "latest.jsonl") == 0
    assert Path("latest.jsonl").is_symlink()
    assert len(Path("runs/first.jsonl").read_text().splitlines()) == 2
    assert [path.name for path in Path("runs").iterdir()] == ["first.jsonl"]


def test_what_no_encoding_holds_is_escaped(osprey: FakeOsprey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(osprey, "describe_each", lambda *_: ["\ud800 ends", "fine"])
    assert run("--output", "o.jsonl", "--figure", "f.png") == 0
    first = Path("o.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert json.loads(first)["text"] == "\ud800 ends"
    assert run() == 0


def test_help_shows_an_example_and_the_kinds_of_masks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        describe.main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for part in ("python -m osprey_jax.describe --checkpoint", "COCO json", "label map", "<region>"):
        assert part in shown


def runs(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed counts: lengths down the columns, of zeros first."""
    lengths = [(value, len(list(group))) for value, group in itertools.groupby(mask.T.ravel().tolist())]
    return [0] * lengths[0][0] + [length for _, length in lengths]


def kept_by_the_demo(text: str) -> str:
    """What follows the first colon, its sentences up to the first repeated one."""
    text = text.split(":")[1] if ":" in text else text
    sentences = [sentence for sentence in text.split(".") if sentence]
    length = next((i for i, s in enumerate(sentences) if s in sentences[:i]), len(sentences))
    return "".join(sentence + "." for sentence in sentences[:length]).strip()


def test_from_a_release_and_a_photograph_to_the_references_words(folder: Path) -> None:
    """The main job whole: release, checkpoint, polygons and both kinds of RLE, JSON lines, figure."""
    pieces = Path(__file__).parent / "golden" / "small.model"
    sizes = reference.ReferenceConfig(vocab_size=400, dim=64, num_kv_heads=2, image_size=96)
    model = reference.OspreyReference(sizes)
    with torch.no_grad():
        # Louder region tokens, so that the words differ from mask to mask.
        model.mask_extractor.feat_linear.weight *= 8
        model.mask_extractor.mask_linear.layers[2].weight *= 8
        # No special tokens and no bytes, whose runs the two tokenizers replace in different ways.
        model.llama.lm_head.weight[:259] = 0
    reference.write_release(model, "release", tokenizer_model=pieces)
    settings = Path("release/config.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"image_size": 96}))

    coarse = np.random.default_rng(5).integers(0, 256, (5, 6, 3), np.uint8)
    Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC).save("scene.jpg")
    photograph = np.asarray(Image.open("scene.jpg"))
    masks = np.zeros((3, 120, 160), bool)
    masks[0, 10:50, 20:60] = True
    masks[1, 70:110, 90:150] = masks[1, 60:75, 100:110] = True
    masks[2] = np.hypot(*(np.indices((120, 160)) - np.array([80, 30])[:, None, None])) < 20
    compressed = coco_mask.encode(np.asfortranarray(masks[2], np.uint8))["counts"].decode()
    segmentations = [
        [[20, 10, 60, 10, 60, 50, 20, 50]],
        {"size": [120, 160], "counts": runs(masks[1])},
        {"size": [120, 160], "counts": compressed},
    ]
    annotations = [{"id": 40 + i, "image_id": 7, "segmentation": s} for i, s in enumerate(segmentations)]
    coco = {"images": [{"id": 7, "file_name": "scene.jpg"}], "annotations": annotations, "categories": []}
    Path("coco.json").write_text(json.dumps(coco))

    assert convert.main(["release", "osprey"]) == 0
    command = ["--checkpoint", "osprey", "--image", "scene.jpg", "--masks", "coco.json"]
    options = ["--dtype", "float32", "--output", "words.jsonl", "--figure", "words.png"]
    assert describe.main([*command, *options]) == 0

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    prompt = (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the human's questions. USER: <image>\n\nThis provides an "
        "overview of the picture.\nPlease give me a short description of <mask><pos>. Using a short phrase. "
        "ASSISTANT:"
    )
    ids = tokenize(Tokenizer.load("osprey"), prompt)
    expected = [model.greedy(photograph, mask[None], ids, 64) for mask in masks]
    records = [json.loads(line) for line in Path("words.jsonl").read_text().splitlines()]
    assert [record["region"] for record in records] == [40, 41, 42]
    for record, mask, answer in zip(records, masks, expected, strict=True):
        np.testing.assert_array_equal(coco_mask.decode(record["segmentation"]), mask)
        assert record["text"] == kept_by_the_demo(tokenizer.decode(answer).strip())
    assert len({record["text"] for record in records}) == 3
    # The photograph, 1000 pixels wide, stands in margins of 20 above the words; its right edge has no region.
    with Image.open("words.png") as figure:
        assert figure.width == 1040
        assert figure.height > 790
        edge = np.asarray(figure.crop((980, 20, 1020, 770)))
    enlarged = Image.fromarray(photograph).resize((1000, 750), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(edge, np.asarray(enlarged)[:, 960:])
