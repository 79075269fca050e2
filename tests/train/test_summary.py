"""What a run says before its first step, and the share of the devices' peak that it reaches."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from osprey_jax import flops, train_config, train_step
from osprey_jax.config import from_config
from osprey_jax.metrics import Metrics
from osprey_jax.models.osprey import Osprey
from osprey_jax.training_summary import model_flops, summary
from tests.train.runs import ROOT

# ml_collections loads a config file by a method that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def test_stage_3_of_the_release_is_summed_up_with_its_operations_and_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flops, "peak", lambda _: 275e12)
    config, *_ = train_config.parse([f"--config={ROOT / 'configs' / 'stage3.py'}", "--workdir=x"])
    config.data.buckets = ((1536, 32),)
    config.mesh.fsdp = 1
    config.batch_size = 1
    mesh = train_step.make_mesh(config, jax.devices()[:1])
    model_config = from_config(config.model.to_dict())
    _, state = train_step.make_state(config, model_config, mesh)
    operations = model_flops(Osprey(model_config, jnp.dtype("bfloat16"), remat="full"), state)
    said = list(summary(state, mesh, config, operations=operations, step=0, steps=1000))
    numbers = {line.split()[0]: [float(x) for x in re.findall(r"([\d.]+) M", line)] for line in said[1:6]}
    parts = ("decoder", "extractor", "projector")
    assert numbers["vision"] == [0, 196.23]
    assert numbers["decoder"] == [6738.42, 0]  # Llama-2-7B, as published
    assert numbers["all"][0] == pytest.approx(sum(numbers[part][0] for part in parts), abs=0.02)
    assert "1 cpu devices" in said[6]
    tera = float(re.match(r"([\d,.]+) TFLOP in the largest step", said[7])[1])
    # Six for each parameter that multiplies and token, and attention; the tower forward alone.
    products = 6.738e9 - 32000 * 4096
    expected = 6 * products * 1536 + 12 * 32 * 4096 * 1536**2 + 0.36e12
    assert tera == pytest.approx(expected / 1e12, rel=0.02)
    assert "at 40% of the devices' peak" in said[7]


def test_the_share_of_the_peak_is_measured_where_the_peak_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 2.0, 4.0])
    monkeypatch.setattr("osprey_jax.metrics.time", SimpleNamespace(monotonic=lambda: next(clock)))
    metrics = Metrics(tmp_path, step=0, steps=9, every=2, peak=1000.0)
    for step in (1, 2):
        metrics.write(step, {"loss": 1.0, "tokens": 10}, samples=1, operations=500)
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["mfu"] for row in rows] == [0.25, 0.25]
    assert " · 25.0% MFU · " in capsys.readouterr().err
