"""The command with a real, small model: its words are those that the predictor has for each image alone."""

from pathlib import Path

import numpy as np
import pytest

from osprey_jax.label import command, plan
from osprey_jax.predictor import Osprey
from tests.label import data_files
from tests.label.conftest import lines
from tests.label.data_files import NAMES


def test_words_and_probabilities_are_those_of_each_image_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "UNIT_IMAGES", 1)  # so that few programs are compiled
    options = ["--max-new-tokens", "6", "--question", "What is <region>?"]
    data = ["--checkpoint", str(checkpoint), "--images", "images", "--masks", "coco.json"]
    assert command.main([*data, "--output", "words", *options]) == 0
    found = {(line["image"], line["region"]): line for line in lines("words")}
    osprey = Osprey.load(checkpoint, dtype="float32")
    masks = data_files.masks(5)
    alone = osprey.describe(
        data_files.picture(5), np.stack(list(masks.values())), question="What is <region>?", max_new_tokens=6
    )
    assert [found[NAMES[5], number]["text"] for number in masks] == alone
    assert len({line["text"] for line in found.values()}) > 3
    for line in found.values():
        assert len(line["logprobs"]) <= 6
        assert line["logprob"] == pytest.approx(sum(line["logprobs"]), abs=1e-4)
        assert max(line["logprobs"]) <= 0
