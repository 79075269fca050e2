"""The command with a real, small model: its words are those that the predictor has for each image alone."""

from pathlib import Path

import jax
import numpy as np
import pytest

from osprey_jax.checkpoint import save_params
from osprey_jax.config import DecoderConfig, ExtractorConfig, OspreyConfig, VisionConfig
from osprey_jax.label import command, plan
from osprey_jax.models.osprey import abstract_params
from osprey_jax.predictor import Osprey
from osprey_jax.prompt import Tokenizer
from tests.label import data_files
from tests.label.conftest import lines
from tests.label.data_files import NAMES

PIECES = Path(__file__).parents[1] / "golden" / "small.model"


@pytest.fixture(scope="module")
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
