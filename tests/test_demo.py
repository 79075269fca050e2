"""The demo: what it concludes from answers that are known beforehand, and one small run of all of it."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.shapes import Shapes, short_description
from osprey_jax import demo
from osprey_jax.config import tiny
from osprey_jax.engine import Prepared
from osprey_jax.request import Decoding
from tests.train.runs import SMALL


@dataclasses.dataclass
class Speaker:
    """Answers as an Osprey does, from the scene in the picture instead of from parameters."""

    says: Callable[[np.ndarray, int], str]
    """From a region's mask and its place in the list to the words."""

    config = tiny()

    def describe(self, image: np.ndarray, masks: np.ndarray) -> list[str]:
        return [self.says(mask, place) for place, mask in enumerate(masks)]

    def complete(self, prepared: Prepared, prompt: str, how: Decoding) -> str:
        return "Yes"


REGIONS = 60


def truths() -> dict[bytes, tuple[int, str]]:
    """The place and the words of each region of the first scenes, by its mask."""
    source = Shapes(split="held_out")
    return {
        mask.tobytes(): (region, f"{short_description(scene, region)}.")
        for scene in map(source.scene, range(REGIONS))
        for region, mask in enumerate(scene.masks)
    }


def run_with(speaker: Speaker, output: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict]:
    def trained(argv: Sequence[str]) -> int:
        (output / "run" / "export").mkdir(parents=True)
        return 0

    monkeypatch.setattr(demo.train, "main", trained)
    monkeypatch.setattr(demo.Osprey, "load", lambda path, dtype: speaker)
    monkeypatch.setattr(demo, "REGIONS", REGIONS)
    status = demo.main(["--output", str(output)])
    return status, json.loads((output / "metrics.json").read_text())


def test_one_who_knows_every_region_has_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = truths()
    speaker = Speaker(lambda mask, _: known[mask.tobytes()][1])
    status, metrics = run_with(speaker, tmp_path, monkeypatch)
    assert (status, metrics["exact_match"], metrics["regions"]) == (0, 1.0, REGIONS)
    # No two objects of a scene are called the same.
    assert metrics["exact_match_permuted"] < 0.05
    with Image.open(tmp_path / "regions.png") as sheet:
        assert min(sheet.size) > 400
        assert len(sheet.getcolors(maxcolors=1 << 24)) > 50


def test_words_that_are_always_the_same_are_not_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speaker = Speaker(lambda mask, place: "a small ring, plain red.")
    status, metrics = run_with(speaker, tmp_path, monkeypatch)
    assert status == 1
    assert metrics["exact_match"] < 0.1
    assert "error: it did not learn" in capsys.readouterr().err


def test_words_for_the_image_and_not_for_the_masks_are_not_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is said right, but in the order of the scene, whichever mask is shown."""
    known, said = truths(), []

    def says(mask: np.ndarray, place: int) -> str:
        region, words = known[mask.tobytes()]
        if region == place:
            if place == 0:
                said.clear()
            said.append(words)
        return said[place]

    status, metrics = run_with(Speaker(says), tmp_path, monkeypatch)
    assert (status, metrics["exact_match"], metrics["exact_match_permuted"]) == (1, 1.0, 1.0)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # how config_flags reads a file
def test_the_whole_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """From a configuration to pictures, with a model too small and too briefly trained to know anything."""
    overrides = SMALL | {"steps": 2, "eval_every": 0}
    lines = [f"    config.{key} = {value!r}" for key, value in overrides.items()]
    config = tmp_path / "small.py"
    config.write_text(
        "\n".join(
            [
                "from configs import tiny",
                "def get_config():",
                "    config = tiny.get_config()",
                *lines,
                "    return config",
            ]
        )
    )
    monkeypatch.setattr(demo, "REGIONS", 6)
    output = tmp_path / "demo"
    assert demo.main(["--output", str(output), "--config", str(config)]) == 1
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["regions"], metrics["exact_match"]) == (6, 0.0)
    assert (output / "regions.png").is_file()
    table = capsys.readouterr().out
    assert table.count("✓") + table.count("✗") == len(demo.KINDS)
