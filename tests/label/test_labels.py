"""`--labels`: a label for each region out of a file, instead of words."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from osprey_jax.label import command
from osprey_jax.predictor import Osprey
from tests.label import data_files
from tests.label.conftest import Run, contents, lines
from tests.label.data_files import NAMES
from tests.label.stand_in import StandIn

LABELS = ["cat", "red boat", "café", "red box", "dog"]
LABELLED = ["--labels", "labels.txt"]


@pytest.fixture(autouse=True)
def labels_file(folder: Path) -> Path:
    path = folder / "labels.txt"
    path.write_text("\n".join(LABELS) + "\n", encoding="utf-8")
    return path


def test_labels_and_their_probabilities_are_those_that_classify_has_for_an_image_alone(
    checkpoint: Path, labels_file: Path
) -> None:
    labels = ["".join(letters) for letters in itertools.product("abcde", repeat=4)]
    labels_file.write_text("\n".join(labels))
    question = "What is <region>?"
    options = ["--checkpoint", str(checkpoint), "--images", "images", "--masks", "coco.json"]
    options += [*LABELLED, "--question", question]
    assert command.main([*options, "--output", "all"]) == 0
    found = {(line["image"], line["region"]): line for line in lines("all")}
    assert len({line["text"] for line in found.values()}) > 3
    osprey = Osprey.load(checkpoint, dtype="float32")
    for index in (2, 5):  # of three regions each, so that few programs are compiled
        masks = data_files.masks(index)
        alone = osprey.classify(
            data_files.picture(index), np.stack(list(masks.values())), labels, question=question
        )
        for number, recognition in zip(masks, alone, strict=True):
            line = found[NAMES[index], number]
            assert (line["text"], line["question"]) == (recognition.label, question)
            assert line["probability"] == pytest.approx(recognition.probability, abs=1e-4)
            assert line["logprob"] == pytest.approx(recognition.logprob, abs=1e-3)
    limit = np.mean([line["probability"] for line in found.values()])
    assert command.main([*options, "--output", "sure", "--threshold", str(limit)]) == 0
    sure = {(line["image"], line["region"]): line for line in lines("sure")}
    for key, line in found.items():
        assert sure[key]["text"] == (line["text"] if line["probability"] >= limit else None)
        assert sure[key]["probability"] == line["probability"]
    assert len({line["text"] for line in sure.values()}) > 1


def test_a_line_has_a_label_and_how_sure_it_is(run: Run) -> None:
    assert run(*LABELLED) == 0
    found = lines("out")
    assert list(found[0]) == [
        *("image", "region", "label", "box", "area", "segmentation", "question", "text"),
        *("probability", "logprob", "model", "prompt"),
    ]
    assert found[0]["label"] == "thing"
    assert found[0]["question"] == "What is the category of <region>? Using only one word or phrase."
    assert {line["text"] for line in found} <= set(LABELS)
    assert run(*LABELLED, "--min-logprob", -2, output="sure") == 0
    for line, free in zip(lines("sure"), found, strict=True):
        assert line["text"] == (free["text"] if free["logprob"] >= -2 else None)
        assert line["logprob"] == free["logprob"]


@pytest.mark.parametrize("unit", [1, 2, 4])
def test_interrupted_and_gone_on_with_the_files_are_those_of_an_undisturbed_run(
    unit: int, run: Run, stand_in: StandIn
) -> None:
    assert run(*LABELLED, output="whole") == 0
    stand_in.interrupted_at = stand_in.calls + unit
    assert run(*LABELLED) == 130
    assert contents("out") != contents("whole")
    assert run(*LABELLED) == 0
    assert contents("out") == contents("whole")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("cat\ndog\n\n cat \n", "labels.txt, line 4: 'cat' is in line 1 already"),
        (b"cat\nd\xffg\n", "labels.txt, line 2: this is no text in UTF-8"),
        ("\n  \n", "labels.txt holds no label"),
        ("cat\n<mask>\n", "labels.txt, line 2: label '<mask>' holds a special token"),
        (
            "\ncat\nred boat\nred▁boat\n",
            "labels.txt, lines 3 and 4: labels 'red boat' and 'red▁boat' are the",
        ),
        (None, "no file of labels at"),
    ],
)
def test_a_bad_file_of_labels_is_refused_by_its_name_before_a_model_is_loaded(
    content: str | bytes | None,
    told: str,
    run: Run,
    stand_in: StandIn,
    labels_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is None:
        labels_file.unlink()
    else:
        labels_file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run(*LABELLED) == 2
    assert re.match(f"error: .*{re.escape(told)}", capsys.readouterr().err)
    assert stand_in.loads == []
    assert not Path("out").exists()


def test_a_run_of_other_labels_or_limits_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*LABELLED) == 0
    before = contents("out")
    Path("more.txt").write_text("\n".join([*LABELS, "cup"]))
    Path("other.txt").write_text("\n".join([*LABELS[:-1], "cup"]))
    for options, told in (
        (["--labels", "more.txt"], "prompt.labels.count: 5 then, 6 now"),
        (["--labels", "other.txt"], "prompt.labels.version: "),
        ([*LABELLED, "--threshold", 0.5], "prompt.threshold: 0.0 then, 0.5 now"),
        ([*LABELLED, "--min-logprob", -9], "prompt.min_logprob: null then, -9.0 now"),
        ([], "prompt.labels.count: 5 then, null now"),
    ):
        assert run(*options) == 2
        assert told in capsys.readouterr().err
    assert contents("out") == before


def test_the_same_labels_in_a_file_of_another_name_and_layout_go_on(run: Run, stand_in: StandIn) -> None:
    assert run(*LABELLED) == 0
    Path("windows.txt").write_bytes("\r\n\r\n".join(LABELS).encode("utf-8-sig"))
    assert run("--labels", "windows.txt") == 0
    assert len(stand_in.loads) == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([*LABELLED, "--level", "short"], "--level can't be given with --labels"),
        ([*LABELLED, "--temperature", 0.5, "--top-p", 0.9], "--temperature, --top-p can't be given with"),
        ([*LABELLED, "--max-new-tokens", 3, "--seed", 1], "--max-new-tokens, --seed can't be given with"),
        ([*LABELLED, "--stop", "."], "--stop can't be given with --labels"),
        (["--threshold", 0.5], "--threshold can't be given without --labels"),
        (["--min-logprob", -1], "--min-logprob can't be given without --labels"),
        ([*LABELLED, "--threshold", 50], "--threshold is a probability, from 0 to 1, not 50.0"),
        ([*LABELLED, "--threshold", "nan"], "--threshold is a probability"),
        ([*LABELLED, "--min-logprob", 0.5], "--min-logprob is a probability's logarithm"),
        ([*LABELLED, "--question", "What is it?"], "must name <region> once"),
        ([*LABELLED, "--question", ""], "must name <region> once"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list, told: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*options) == 2
    assert told in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_dry_run_estimates_and_writes_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*LABELLED, "--dry-run") == 0
    assert "regions of 7 images" in capsys.readouterr().out
    assert not Path("out").exists()


def test_the_gallery_shows_labels_and_where_there_is_none(run: Run) -> None:
    assert run(*LABELLED, "--threshold", 0.6, "--gallery") == 0
    page = Path("out/gallery.html").read_text(encoding="utf-8")
    said = [line["text"] for line in lines("out")]
    assert 0 < said.count(None) < len(said)
    assert page.count("<i>no label</i>") == said.count(None)
    for text in set(said) - {None}:
        assert f"<span>{text}<span" in page
    assert page.count('title="probability among the labels"') == len(said)
    assert "<dt>labels</dt><dd>labels.txt</dd>" in page
