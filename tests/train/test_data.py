"""The stages on small files of every data set: they run, are killed, and go on as if nothing had been."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from tests.data_pipelines.data_files import write_all
from tests.train.runs import ROOT, SMALL, Command, Start, learned, leaves, newest, steps, wait_until

STEPS = 40
OVERRIDES = {
    "steps": STEPS,
    "epochs": 0.0,
    "batch_size": 4,
    "checkpoint_every": 3,
    "eval_every": 0,
    "dtype": "float32",
    "mesh.fsdp": 1,
    "model.mask_token_id": 512,
    "model.position_token_id": 513,
    "model.decoder.vocab_size": 512,
    "data.buckets": ((400, 20),),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_all(root)
    return root


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token for each word, and one for all that it doesn't know: sequences are short."""
    words = ["<unk>", "<s>", "</s>", "USER:", "ASSISTANT:", "a", "the", "is", "dog", "cup"]
    words += [f"<reserved{number}>" for number in range(len(words), 512)]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(words[:3])
    directory = tmp_path_factory.mktemp("words")
    backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_a_stage_on_all_of_its_data_killed_and_resumed_is_the_same_run(
    stage: str, root: Path, tokenizer: Path, command: Command, start: Start, tmp_path: Path
) -> None:
    def run(name: str) -> subprocess.Popen:
        own = {"data.root": root, "data.tokenizer": tokenizer}
        _, workdir, *flags = command(tmp_path / name, **{**SMALL, **OVERRIDES, **own})
        return start([f"--config={ROOT / 'configs' / stage}.py", workdir, *flags])

    def finish(process: subprocess.Popen) -> None:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err

    killed = run("killed")
    wait_until(lambda: newest(tmp_path / "killed") >= 3 and steps(tmp_path / "killed") > 3, killed)
    killed.kill()
    killed.communicate()
    assert steps(tmp_path / "killed") < STEPS
    # Programs are compiled by now, so that both begin at once.
    for process in (run("killed"), run("whole")):
        finish(process)
    assert learned(tmp_path / "killed") == learned(tmp_path / "whole")
    found, expected = (leaves(tmp_path / name / "export" / "params") for name in ("killed", "whole"))
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
