"""What `inspect` shows against literals and against what training encodes."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data_pipelines import catalog, command_line, inspection, looking
from data_pipelines.__main__ import main
from data_pipelines.conversation import draws
from data_pipelines.records import Record, Turn
from data_pipelines.sample_figure import LOSS_PAPER, draw_sample
from data_pipelines.transforms import encode
from osprey_jax.config import OspreyConfig
from osprey_jax.figure import COLOURS
from osprey_jax.masks import encode_rle, mask_pyramid
from osprey_jax.prompt import SYSTEM_TRAINING, Tokenizer
from tests.data_pipelines import custom_files

HEIGHT, WIDTH = 30, 40
GREY = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
LEFT, RIGHT = np.zeros((2, HEIGHT, WIDTH), bool)
LEFT[2:12, 3:13] = True
RIGHT[5:25, 20:35] = True
NOTHING = np.zeros_like(LEFT)
SYSTEM_WORDS = len(SYSTEM_TRAINING.split())


@dataclasses.dataclass
class Cards:
    """A source of the records that it is given."""

    records: list[Record]
    name: str = "cards"
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def image_key(self, index: int) -> str:
        return f"card {index}"


def record(*turns: Turn, **values: object) -> Record:
    masks = tuple(map(encode_rle, (LEFT, RIGHT, NOTHING)))
    values = {"image": GREY, "opening": "<image>\n", "masks": masks, **values}
    return Record(sample_id="cards/0", turns=turns, **values)


def look(tokenizer: Tokenizer, *turns: Turn, **values: object) -> looking.Sample:
    return looking.look(Cards([record(*turns, **values)]), 0, tokenizer)


@pytest.fixture(scope="module")
def shapes_tokenizer() -> Tokenizer:
    return command_line.open_tokenizer(None)


@pytest.fixture(scope="module")
def with_tokenizer(shapes_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options: to make the default tokenizer anew takes long."""
    folder = tmp_path_factory.mktemp("tokenizer")
    shapes_tokenizer.save(folder)
    return ["--tokenizer", str(folder)]


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `coco.json` and `images`: a picture of 0 to 4 annotations each, and some broken ones."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "images").mkdir()
    rng, images, annotations = np.random.default_rng(0), [], []
    for number in range(7):
        noise = rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH})
        for corner in range(number % 5):
            box = [corner, corner, corner + 9, corner, corner + 9, corner + 9, corner, corner + 9]
            annotations.append({"image_id": number, "category_id": corner % 2, "segmentation": [box]})
    (folder / "images" / "2.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    (folder / "images" / "3.jpg").unlink()
    annotations.append({"image_id": 6, "category_id": 1, "segmentation": [[1, 2, 3, 4]]})
    categories = [{"id": 0, "name": "red car"}, {"id": 1, "name": "犬\x1b[31m"}]
    told = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(told))
    return folder


def coco_options(folder: Path) -> list[str]:
    return ["--source", "coco", "--annotations", f"{folder}/coco.json", "--images", f"{folder}/images"]


def test_json_has_ids_labels_masks_and_text_of_the_whole_prompt(tokenizer: Tokenizer) -> None:
    turns = (
        Turn("What is <mask><pos>", "red car", (1,)),
        Turn("is <mask><pos> blue", "<mask><pos> is", (0, 1)),
    )
    told = json.loads(inspection.to_json(look(tokenizer, *turns)))
    assert told.keys() == {"input_ids", "labels", "masks", "mask_areas", "mask_shapes", "text"}
    first, second = [4, -200, 6, 7, 11, 12, 5, 8, 10, 2], [4, 7, 11, 12, 9, 5, 11, 12, 7, 2]
    assert told["input_ids"] == [1, *[0] * SYSTEM_WORDS, *first, *second]
    labels = [*[-100] * 7, 8, 10, 2, *[-100] * 6, -100, -100, 7, 2]
    assert told["labels"] == [*[-100] * (SYSTEM_WORDS + 1), *labels]
    np.testing.assert_array_equal(coco_mask.decode(told["masks"]).transpose(2, 0, 1), [RIGHT, LEFT, RIGHT])
    assert told["mask_areas"] == [300, 100, 300]
    assert told["mask_shapes"] == [[HEIGHT, WIDTH]] * 3
    assert told["text"] == (
        f"{SYSTEM_TRAINING} USER: <image>\nWhat is <mask><pos> ASSISTANT: red car</s>"
        "USER: is <mask><pos> blue ASSISTANT: <mask><pos> is</s>"
    )


def test_a_caption_stands_alone_behind_its_image(tokenizer: Tokenizer) -> None:
    sample = look(tokenizer, Turn("", "red car"), plain=True)
    assert sample.dialogue == ([1, -200, 8, 10], [-100, -100, 8, 10])
    assert sample.text == "<image>red car\n"


def test_a_conversation_about_nothing_to_be_seen_has_no_image(tokenizer: Tokenizer) -> None:
    sample = look(tokenizer, Turn("What is red", "blue"), image=None, opening="", masks=())
    assert sample.dialogue.input_ids == [1, *[0] * SYSTEM_WORDS, 4, 6, 7, 8, 5, 9, 2]
    assert sample.text == f"{SYSTEM_TRAINING} USER: What is red ASSISTANT: blue</s>"
    assert "no image" in inspection.to_text(sample, tokenizer, colour=False)
    assert draw_sample(sample, tokenizer).width > 0


@pytest.mark.parametrize("name", ["shapes", "coco"])
def test_what_is_shown_is_what_training_encodes(
    name: str,
    coco: Path,
    shapes_tokenizer: Tokenizer,
    with_tokenizer: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = coco_options(coco) if name == "coco" else ["--source", "shapes"]
    paths = {"annotations": coco / "coco.json", "images": coco / "images"} if name == "coco" else {}
    source, config = catalog.open_source(name, **paths), OspreyConfig()
    orders = set()
    for epoch in range(4):
        at = ["--index", "3", "--epoch", str(epoch), "--seed", "5"]
        assert main(["inspect", *given, *with_tokenizer, *at, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        rng = draws(5, source.name, epoch, 3)
        example = encode(source[3], shapes_tokenizer, config, rng=rng, length=9999, regions=99)
        place = told["input_ids"].index(-200)
        for values, value, tokens in (
            (told["input_ids"], -200, example.tokens.input_ids),
            (told["labels"], -100, example.tokens.labels),
        ):
            assert [*values[:place], *[value] * 1024, *values[place + 1 :]] == tokens.tolist()
        masks = coco_mask.decode(told["masks"]).transpose(2, 0, 1)
        sizes = {"level_sizes": config.vision.level_sizes, "position_size": config.extractor.position_size}
        np.testing.assert_array_equal(mask_pyramid(masks, **sizes).position, example.masks.position)
        orders.add(str(told["masks"]))
    assert len(orders) > 1 or name == "shapes"


def test_samples_are_counted_after_dropped_ones(
    coco: Path, with_tokenizer: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # Of the pictures 0 and 5 have no annotation, so 1 is the first.
    assert main(["inspect", *coco_options(coco), "--index", "0", *with_tokenizer, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mask_areas"] == [81]
    assert main(["inspect", *coco_options(coco), "--index", "5", "--json"]) == 2
    assert re.fullmatch(
        r"error: no sample 5 in coco: --index goes from 0 to 4 \(dropped: 2 × .*\)\n", capsys.readouterr().err
    )


def test_what_carries_loss_is_exactly_the_answers(shapes_tokenizer: Tokenizer) -> None:
    turns = (
        Turn("What is 7", "zürich: 犬\n1. blue"),
        Turn("is <mask><pos> it?", "so <mask><pos>, yes", (0, 1)),
    )
    sample = look(shapes_tokenizer, *turns)
    spans = looking.spans(sample.dialogue, shapes_tokenizer)
    loss = [span.text for span in spans if span.has_loss]
    # A blank of the tokenizer's own comes after each special token.
    assert loss == [" zürich: 犬\\n\n1. blue</s>", " so ", " , yes</s>"]
    whole = "".join(span.text for span in spans).replace("\\n", "")
    assert whole.replace(" ", "") == f"<s>{sample.text}".replace(" ", "")


def test_loss_is_in_brackets_or_in_colour(shapes_tokenizer: Tokenizer) -> None:
    sample = look(
        shapes_tokenizer, Turn("What is it?", "red"), Turn("And <mask><pos>?", "a\x1b[0m car", (1,))
    )
    lines = inspection.to_text(sample, shapes_tokenizer, colour=False).splitlines()
    assert "What is it? ASSISTANT:[[ red</s>]]" in lines
    assert " USER: And <mask><pos> ? ASSISTANT:[[ a\\x1b[0m car</s>]]" in lines
    assert lines[-1].split() == ["region", "1", "300", "px,", "25.00%", "a\\x1b[0m", "car"]
    coloured = inspection.to_text(sample, shapes_tokenizer, colour=True)
    assert "ASSISTANT:\033[1;32m red</s>\033[0m\n" in coloured
    assert "[[" not in coloured


@pytest.mark.parametrize(
    ("terminal", "no_color", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_only_terminals_that_want_it_get_colour(
    terminal: bool,
    no_color: str,
    coloured: bool,
    with_tokenizer: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    assert main(["inspect", "--source", "shapes", "--index", "0", *with_tokenizer]) == 0
    assert ("\033[" in capsys.readouterr().out) == coloured


def test_what_training_leaves_out_is_told(shapes_tokenizer: Tokenizer) -> None:
    turns = [Turn("<mask><pos>", "red", (mask,)) for mask in (0, 1, 2)]
    told = inspection.to_text(look(shapes_tokenizer, *turns, at_most=1), shapes_tokenizer, colour=False)
    assert "for their masks are empty or broken: 1 regions" in told
    assert "not drawn: 1 of 3 turns; at most 1 are kept" in told


@pytest.mark.parametrize(
    ("index", "reason"),
    [(1, "2.jpg.*(cannot|Truncated)"), (2, "3.jpg")],
)
def test_a_broken_sample_is_one_line_and_no_json(
    index: int, reason: str, coco: Path, with_tokenizer: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *coco_options(coco), "--index", str(index), *with_tokenizer, "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"error: coco\[{index}\], .* can't be used, training skips it: .*\n", err)
    assert re.search(reason, err)


def test_an_image_of_another_size_than_its_masks_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"masks are \(30, 40\).*image is \(30, 36\)"):
        look(tokenizer, Turn("<mask><pos>", "red", (0,)), image=GREY[:, 4:])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--source", "nothing"], "nothing.*coco.*shapes"),
        ([], "no --source.*shapes"),
        (["--source", "coco"], "coco needs annotations and images"),
        (["--source", "coco", "--annotations", "no.json", "--images", "."], "coco.*no.json.*train2017"),
        (["--source", "coco", "--annotations", "bad.json", "--images", "."], "bad.json"),
        (
            ["--source", "coco", "--annotations", ".", "--images", "."],
            r"coco: cannot read \.: Is a directory",
        ),
        (
            ["--source", "custom", "--annotations", "mine.jsonl", "--images", "no"],
            "custom: no images at no: ",
        ),
        (["--source", "custom:empty.jsonl"], "custom has no samples|custom:empty.jsonl has no samples"),
        (["--source", "custom:no.jsonl"], r"custom: there is no no\.jsonl\. "),
        (["--source", "custom", "--annotations", "empty.jsonl"], "custom has no samples"),
        (["--source", "shapes", "--images", "."], "shapes takes no images"),
        (["--source", "shapes", "--source", "shapes"], "one --source"),
        (["--source", "."], "prepare"),
        (["--source", "shapes", "--index", "-1"], "no sample -1 in shapes"),
        (["--source", "shapes", "--seed", "-1"], "negative"),
        (["--source", "shapes", "--tokenizer", "."], "no tokenizer"),
        (["--source", "shapes", "--figure", "a.gif"], "a.gif"),
        (["--source", "shapes", "--figure", "no/a.png"], "no/a.png"),
    ],
)
def test_wrong_use_is_one_line_that_names_it(
    options: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{")
    Path("empty.jsonl").write_text("")
    Path("mine.jsonl").write_text("{}")
    assert main(["inspect", "--index", "0", "--json", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(told, err)


@pytest.mark.parametrize("json_alone", [False, True])
def test_tokens_of_the_small_tokenizer_are_called_so(
    json_alone: bool,
    shapes_tokenizer: Tokenizer,
    with_tokenizer: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command_line, "open_tokenizer", lambda _: shapes_tokenizer)
    command = ["inspect", "--source", "shapes", "--index", "0", *["--json"] * json_alone]
    note = "tokens are those of shapes' small tokenizer; --tokenizer DIR for yours\n"
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == ("" if json_alone else note)
    assert main([*command, *with_tokenizer]) == 0
    assert capsys.readouterr() == (out, "")


def test_a_file_of_ones_own_can_be_named_as_in_training(
    tmp_path: Path, with_tokenizer: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = custom_files.write_lines(tmp_path / "mine.jsonl", [custom_files.sample()])
    custom_files.write_images(tmp_path)
    assert main(["inspect", "--source", f"custom:{path}", "--index", "0", *with_tokenizer, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mask_areas"] == [4]


def test_the_figure_has_regions_and_words_in_their_colours(shapes_tokenizer: Tokenizer) -> None:
    turns = Turn("<mask><pos>?", "red " * 40, (0,)), Turn("<mask><pos>?", "blue", (1,))
    drawn, short = (
        np.asarray(draw_sample(look(shapes_tokenizer, *said), shapes_tokenizer))
        for said in (turns, turns[1:])
    )

    def count(picture: np.ndarray, colour: tuple[int, ...]) -> int:
        return int((picture == colour).all(axis=-1).sum())

    assert [count(drawn, COLOURS[number]) > 500 for number in (0, 1, 2)] == [True, True, False]
    assert count(drawn, LOSS_PAPER) > 4 * count(short, LOSS_PAPER) > 0
    assert len(drawn) > len(short)


def test_json_is_alone_on_stdout_beside_a_figure(
    tmp_path: Path, coco: Path, with_tokenizer: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sample.jpg"
    options = [*with_tokenizer, "--index", "3", "--figure", str(path), "--json"]
    assert main(["inspect", *coco_options(coco), *options]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert len(json.loads(out)["masks"]) == 4
    assert err == f"figure in {path}\n"
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
        assert min(picture.size) > 500


def test_a_picture_without_regions_is_drawn(shapes_tokenizer: Tokenizer) -> None:
    sample = look(shapes_tokenizer, Turn("What is it?", "red"), masks=())
    assert "no regions" in inspection.to_text(sample, shapes_tokenizer, colour=False)
    drawn = np.asarray(draw_sample(sample, shapes_tokenizer))
    assert (drawn == 128).all(axis=-1).sum() > 500_000
