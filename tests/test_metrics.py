"""Metrics of a run: what becomes of them where it goes on, and of what is seldom measured."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboardX import SummaryWriter

from osprey_jax.metrics import Metrics


def test_what_is_damaged_or_later_than_the_restored_step_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"loss": 0.5}\n{"step": 2}\n{"step": 3}\n{"step": 2')
    Metrics(tmp_path, step=2, steps=5, every=1).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_an_evaluation_reaches_tensorboard_whatever_the_step_and_the_line_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple] = []
    monkeypatch.setattr(SummaryWriter, "add_scalar", lambda _, *found: sent.append(found))
    monkeypatch.setattr(SummaryWriter, "add_image", lambda _, *found, **how: sent.append((*found, how)))
    metrics = Metrics(tmp_path, step=0, steps=5, every=4)
    metrics.evaluated(2, {"held_out_loss": 0.5}, {"held_out/a": Image.new("RGB", (3, 2))})
    for step in (1, 2, 3):
        metrics.write(step, {"loss": 1.0, "tokens": 7}, samples=1)
    metrics.close()
    (scalar, (tag, picture, step, how)) = sent
    assert scalar == ("held_out_loss", 0.5, 2)
    assert (tag, step, how) == ("held_out/a", 2, {"dataformats": "HWC"})
    np.testing.assert_array_equal(picture, np.zeros((2, 3, 3), np.uint8))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("held_out_loss") for line in lines] == [None, 0.5, None]
