"""The demo of segmenting: what it concludes from scores that are known, and one small run of all of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.shapes import Scene, Shapes
from osprey_jax.masks import encode_rle, rle_area, rle_box
from osprey_jax.sam import demo
from osprey_jax.sam.evaluation import OBJECT, OBJECT_AT_PART, PART, Score, evaluate, summarise
from osprey_jax.sam.predictor import Sam
from osprey_jax.segments import Segment
from tests.sam.scenes import CONFIG, SETTINGS, SIDE


class Knowing:
    """An Osprey that sees through the picture: it knows the scene, its masks and the words."""

    def __init__(self) -> None:
        source = Shapes(split="held_out", seed=1, size=SIDE)
        self.scenes = {scene.image.tobytes(): scene for scene in map(source.scene, range(20))}

    def describe_point(self, sam: Sam, image: np.ndarray, point: list[float]) -> Segment:
        scene = self.scenes[image.tobytes()]
        x, y = map(int, point)
        region = next(number for number, mask in enumerate(scene.masks) if mask[y, x])
        return self.segment(scene, region, {"point": point})

    def describe_box(self, sam: Sam, image: np.ndarray, box: list[float]) -> Segment:
        return self.segment(self.scenes[image.tobytes()], 0, {"box": box})

    def describe_everything(self, sam: Sam, image: np.ndarray) -> list[Segment]:
        scene = self.scenes[image.tobytes()]
        places = [np.argwhere(mask)[0, ::-1] for mask in scene.masks]
        return [self.segment(scene, number, {"point": place.tolist()}) for number, place in enumerate(places)]

    def segment(self, scene: Scene, region: int, prompt: dict[str, list[float]]) -> Segment:
        rle = encode_rle(scene.masks[region])
        return Segment(demo.words(scene, region), rle, rle_box(rle), rle_area(rle), prompt, 0.9)


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a demo with a small network that is barely trained."""
    (tmp_path / "osprey").mkdir()
    monkeypatch.setattr(demo, "tiny", lambda: CONFIG)
    monkeypatch.setattr(demo, "Settings", lambda: SETTINGS)
    monkeypatch.setattr(demo, "REGIONS", 6)
    monkeypatch.setattr(demo, "PICTURES", 2)
    monkeypatch.setattr(demo.Osprey, "load", lambda path, dtype: Knowing())
    return ["--output", str(tmp_path / "demo"), "--osprey", str(tmp_path / "osprey")]


@pytest.mark.slow  # it compiles all of training, which tests/sam/test_training.py does as well
def test_the_whole_of_it_runs(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too briefly trained to have learned; then the same with scores of one that has."""
    assert demo.main(arguments) == 1
    told = capsys.readouterr()
    assert "error: it did not learn: at least 0.85 and 0.9 were expected" in told.err
    output = Path(arguments[1])
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["regions"] >= 6
    assert 0 <= metrics["click_iou"] <= metrics["click_best_of_3_iou"] < 0.85
    assert metrics["everything_words"] == 1
    assert metrics["everything_found"] == metrics["everything_regions"]
    assert metrics["everything_other"] == 0
    for name in ("points", "boxes", "everything"):
        with Image.open(output / f"{name}.png") as picture:
            assert min(picture.size) > 400
    assert Sam.load(output / "checkpoint").config == CONFIG

    monkeypatch.setattr(demo, "train", None)  # what is trained isn't trained again
    monkeypatch.setattr(
        demo,
        "score",
        lambda sam, source: [Score("click", OBJECT, *[0.86] * 4), Score("box", OBJECT, *[0.91] * 4)],
    )
    assert demo.main(arguments) == 0
    assert "0.860 for a click, 0.910 for a box" in capsys.readouterr().out


def test_a_stopped_demo_says_so(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "train", lambda *args, stopped: (3, {}))
    assert demo.main(arguments) == 1
    assert "after step 3; the same command goes on from there" in capsys.readouterr().out
    assert not (Path(arguments[1]) / "checkpoint").exists()


def test_without_osprey_nothing_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--output", str(tmp_path), "--osprey", str(tmp_path / "none")]) == 2
    assert "none; `make demo` makes one" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_masks_are_scored_as_a_user_gets_them(checkpoint: Path) -> None:
    """By the masks that `Sam.predict` gives for the same prompts."""
    sam, source = Sam.load(checkpoint), Shapes(split="held_out", size=96)
    truths = list(demo.truths(source, regions=12))
    assert sum(len(truth.masks) for truth in truths) >= 12
    scores = [each for some in evaluate(sam, truths, seed=0) for each in some]
    boxes = iter([each for each in scores if each.prompt == "box"])
    for truth in truths:
        embedding = sam.encode(truth.image)
        for mask, is_part in zip(truth.masks, truth.is_part, strict=True):
            found = sam.predict(embedding, boxes=demo.box_of(mask)[None], multimask=False)
            predicted, score = np.asarray(found.masks)[0, 0], next(boxes)
            expected = (predicted & mask).sum() / (predicted | mask).sum()
            assert score.iou == pytest.approx(expected)
            assert score.kind == (PART if is_part else OBJECT)
            assert score.expected == pytest.approx(float(found.iou[0, 0]), abs=1e-4)
    assert all(score.iou <= score.best for score in scores)


def test_means_are_by_prompt_and_kind() -> None:
    scores = [
        Score("click", OBJECT, 0.8, 1, 0.9, 0.7),
        Score("click", OBJECT, 0.6, 1, 0.7, 0.5),
        Score("click", OBJECT_AT_PART, 0.1, 1, 0.4, 0.3),
        Score("box", PART, 0.5, 1, 0.5, 0.5),
    ]
    rows = {(row.prompt, row.kind): row for row in summarise(scores)}
    assert [row[1] for row in rows] == [OBJECT, OBJECT_AT_PART, "all", PART, "all"]
    assert rows["click", OBJECT].iou == pytest.approx(0.7)
    assert rows["click", "all"][2:] == pytest.approx((3, 0.5, 2 / 3, 0.5))
    assert rows["box", "all"].regions == 1
