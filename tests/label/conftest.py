"""A stand-in for the model, the command with it, and a small model."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from osprey_jax.checkpoint import save_params
from osprey_jax.config import DecoderConfig, ExtractorConfig, OspreyConfig, VisionConfig
from osprey_jax.label import command, plan
from osprey_jax.models.osprey import abstract_params
from osprey_jax.prompt import Tokenizer
from tests.label.data_files import coco
from tests.label.stand_in import UNIT_IMAGES, StandIn

Run = Callable[..., int]
PIECES = Path(__file__).parents[1] / "golden" / "small.model"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    model = StandIn()
    monkeypatch.setattr(command, "Osprey", model)
    monkeypatch.setattr(plan, "UNIT_IMAGES", UNIT_IMAGES)
    return model


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a checkpoint's directory and a data set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint" / "params").mkdir(parents=True)
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    (tmp_path / "checkpoint" / "tokenizer.model").write_bytes(PIECES.read_bytes())
    coco(tmp_path)
    return tmp_path


@pytest.fixture
def run(stand_in: StandIn) -> Run:
    def started(*options: object, output: str = "out", masks: object = "coco.json") -> int:
        data = ["--images", "images", "--masks", masks] if masks is not None else []
        given = ["--checkpoint", "checkpoint", *data, "--output", output, *options]
        return command.main(list(map(str, given)))

    return started


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(PIECES.read_bytes())
    tokenizer = Tokenizer.load(folder / "tokenizer")
    config = OspreyConfig(
        vision=VisionConfig(image_size=32, depths=(1, 1, 1, 1), dims=(8, 8, 8, 16)),
        extractor=ExtractorConfig(dim=16, position_size=16),
        decoder=DecoderConfig(
            vocab_size=400, dim=32, ffn_dim=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16
        ),
        mask_token_id=tokenizer.mask_id,
        position_token_id=tokenizer.position_id,
    )
    rng = np.random.default_rng(0)
    # Loud, so that words differ from mask to mask.
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), abstract_params(config)
    )
    save_params(folder / "checkpoint", params, config, tokenizer)
    return folder / "checkpoint"


def lines(output: str | Path, kind: str = "labels") -> list[dict]:
    """All lines of an output, shard after shard."""
    paths = sorted(Path(output).glob(f"{kind}-*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def contents(output: str | Path) -> dict[str, bytes]:
    """Every file of an output; but for the lock, which is empty, and the setting's paths."""
    paths = [path for path in Path(output).rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}
