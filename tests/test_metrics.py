"""Metrics of a run that goes on."""

from pathlib import Path

from osprey_jax.metrics import Metrics


def test_what_is_damaged_or_later_than_the_restored_step_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"loss": 0.5}\n{"step": 2}\n{"step": 3}\n{"step": 2')
    Metrics(tmp_path, step=2, steps=5, every=1).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
