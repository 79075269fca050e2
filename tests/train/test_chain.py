"""The three stages one after another, from the parts that users have to a model that torch loads.

Each runs on small files of every data set that its configuration names, in their real formats.
"""

import collections
import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sentencepiece
import tokenizers

from osprey_jax import Osprey, convert, train_config
from osprey_jax.config import ExtractorConfig, from_config
from osprey_jax.train_data import make_data
from tests.data_pipelines.data_files import write_all
from tests.parity import bridge, reference, scenes
from tests.train.runs import ROOT, Start, learned, leaves, newest, rows, steps, wait_until

WORDS = 512
SIZES = reference.ReferenceConfig(
    depths=(1, 1, 1, 1), dims=(8, 16, 32, 32), image_size=64, extractor_dim=32, position_size=28,
    vocab_size=WORDS, num_heads=2, num_kv_heads=1,
)  # fmt: skip
STEPS = 30


class Stage(NamedTuple):
    """One run of the chain."""

    config: str
    origin: str
    """The run whose directory it begins from, or the first checkpoint."""
    changes: str
    """Matches the paths of what it trains; of adapters, of what they are merged into."""
    falls_to: float
    """How much of the first losses the last ones may be.

    With a rate of nearly 0 batches that differ make it 0.98 to 1.01. The decoder that stage 2 leaves alone
    is a random one, which an extractor can make say only so much.
    """
    overrides: dict[str, object]


BOTH = r"(projector|extractor)/.*"
STAGES = {
    "stage1": Stage("stage1", "start", r"projector/.*", 0.8, {"data.buckets": ((96, 1),)}),
    "stage2": Stage("stage2", "stage1", r"extractor/.*", 0.93, {"data.buckets": ((320, 5),)}),
    "stage3": Stage("stage3", "stage2", rf"{BOTH}|decoder/.*", 0.4, {"data.buckets": ((320, 5),)}),
    "lora": Stage(
        "stage3",
        "stage2",
        rf"{BOTH}|decoder/layers/(self_attn|mlp)/.*",
        0.8,
        {"data.buckets": ((320, 5),), "lora.rank": 4, "lora.alpha": 8.0},
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_all(root)
    return root


def strings(value: Any) -> Iterator[str]:
    """All text in a JSON document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)


def write_tokenizer(path: Path, root: Path) -> None:
    """A token for each of the commonest words of the data, and one for all others: sequences are short."""
    texts = [text for file in sorted(root.rglob("*.json")) for text in strings(json.loads(file.read_text()))]
    count = collections.Counter(word for text in texts for word in text.split())
    words = ["<unk>", "<s>", "</s>", "USER:", "ASSISTANT:", *(word for word, _ in count.most_common(WORDS))]
    words = list(dict.fromkeys(words))[:WORDS]
    words += [f"<reserved{number}>" for number in range(len(words), WORDS)]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(words[:3])
    backend.save(str(path))


@pytest.fixture(scope="module")
def first(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of Vicuna's directory and open_clip's file, by the command that puts them together."""
    directory = tmp_path_factory.mktemp("parts")
    model = reference.OspreyReference(SIZES, seed=5)
    vicuna, tower = directory / "vicuna", directory / "open_clip_pytorch_model.bin"
    reference.write_vicuna(model, vicuna, tokenizer_model=None)
    write_tokenizer(vicuna / "tokenizer.json", root)
    fields = json.loads((vicuna / "config.json").read_text())
    (vicuna / "config.json").write_text(json.dumps(fields | {"image_size": SIZES.image_size}))
    reference.write_open_clip(model, tower)
    with pytest.MonkeyPatch.context() as patch:
        # The original's has 14 million parameters, of which no file tells the number.
        small = ExtractorConfig(dim=SIZES.extractor_dim, position_size=SIZES.position_size)
        patch.setattr(convert, "ExtractorConfig", lambda: small)
        parts = ["--decoder", str(vicuna), "--vision-tower", str(tower)]
        assert convert.main([str(directory / "first"), *parts]) == 0
    return directory / "first"


def arguments(stage: Stage, workdir: Path, origin: Path, root: Path, **more: object) -> list[str]:
    settings = {
        "init_from": origin, "data.root": root, "steps": STEPS, "epochs": 0.0, "batch_size": 4,
        "accumulation": 1, "learning_rate": 1e-2, "dtype": "float32", "mesh.fsdp": 1,
        "checkpoint_every": STEPS, **stage.overrides, **more,
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={ROOT / 'configs' / stage.config}.py", f"--workdir={workdir}", *flags]


def finish(process: subprocess.Popen) -> None:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


@pytest.fixture(scope="module")
def chain(root: Path, first: Path, start: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The first checkpoint and the runs' directories, each begun from the one before."""
    directory = tmp_path_factory.mktemp("runs")
    chain = {"start": first} | {name: directory / name for name in STAGES}
    for together in (["stage1"], ["stage2"], ["stage3", "lora"]):
        stages = [(STAGES[name], chain[name]) for name in together]
        lines = [arguments(stage, workdir, chain[stage.origin], root) for stage, workdir in stages]
        for process in [start(line) for line in lines]:
            finish(process)
    return chain


@pytest.fixture(scope="module")
def resumed(
    root: Path, first: Path, chain: dict[str, Path], start: Start, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Stages 2 and 3 once more, killed after their first checkpoint and started again.

    Where stage 2 begins there are only checkpoints of stage 1 at first, and another model as the export when
    it starts again.
    """
    directory = tmp_path_factory.mktemp("resumed")
    unfinished = directory / "unfinished"
    shutil.copytree(chain["stage1"] / "checkpoints", unfinished / "checkpoints")
    origins = {"stage2": unfinished, "stage3": chain["stage2"]}
    lines = [
        arguments(STAGES[name], directory / name, origin, root, checkpoint_every=3)
        for name, origin in origins.items()
    ]
    for name, process in [(name, start(line)) for name, line in zip(origins, lines, strict=True)]:
        workdir = directory / name
        wait_until(lambda workdir=workdir: newest(workdir) >= 3 and steps(workdir) > 3, process)
        process.kill()
        process.communicate()
        assert steps(workdir) < STEPS
    shutil.copytree(first, unfinished / "export")
    for process in [start(line) for line in lines]:
        finish(process)
    return {name: directory / name for name in origins}


@pytest.mark.parametrize("name", STAGES)
def test_the_loss_falls_in_each_stage(name: str, chain: dict[str, Path]) -> None:
    losses = [row["loss"] for row in rows(chain[name])]
    assert np.mean(losses[-8:]) < STAGES[name].falls_to * np.mean(losses[:4])


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_begins_with_the_one_before_and_changes_its_own_parts_alone(
    name: str, chain: dict[str, Path]
) -> None:
    stage = STAGES[name]
    origin = chain[stage.origin] / ("" if stage.origin == "start" else "export")
    found, expected = (leaves(path / "params") for path in (chain[name] / "export", origin))
    assert found.keys() == expected.keys()
    changed = {
        path for path in found if not np.array_equal(found[path], expected[path].astype(found[path].dtype))
    }
    assert changed == {path for path in found if re.fullmatch(stage.changes, path)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage2", "stage3"])
def test_a_stage_killed_and_resumed_is_the_same_run_whatever_became_of_where_it_began(
    name: str, chain: dict[str, Path], resumed: dict[str, Path]
) -> None:
    assert learned(resumed[name]) == learned(chain[name])
    found, expected = (leaves(run[name] / "export" / "params") for run in (resumed, chain))
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize("name", ["stage3", "lora"])
def test_torch_loads_what_came_out_and_has_the_same_logits(
    name: str, chain: dict[str, Path], tmp_path: Path
) -> None:
    assert convert.main(["--to-torch", str(chain[name] / "export"), str(tmp_path / "torch")]) == 0
    twin = reference.OspreyReference(SIZES, seed=6)
    twin.load_release_state_dict(reference.read_shards(tmp_path / "torch"))
    ours = Osprey.load(chain[name] / "export")
    image, masks = scenes.picture(64, 96), scenes.region_masks(64, 96)
    prompt = "<image>\nThis provides an overview of the picture. USER: " + "<mask><pos> and " * len(masks)
    found = ours.logits(image, masks, prompt)
    expected = twin.logits(image, masks, ours.tokenize(prompt)).numpy()
    assert bridge.largest_difference(found, expected) <= bridge.FORWARD


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_stage_1_learns_captions_with_their_newlines_and_no_end(root: Path, tmp_path: Path) -> None:
    pieces = ROOT / "tests" / "golden" / "small.model"
    shutil.copy(pieces, tmp_path / "tokenizer.model")
    plain = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    line = arguments(STAGES["stage1"], tmp_path / "run", tmp_path, root, **{"data.tokenizer": tmp_path})
    config = train_config.parse(line).config
    config.model.vision.image_size = 64
    config.model.mask_token_id, config.model.position_token_id = len(plain), len(plain) + 1
    with contextlib.closing(make_data(config, from_config(config.model.to_dict())).training) as loader:
        batch, sample_ids = next(loader)
    captions = json.loads((root / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json").read_text())
    texts = {f"llava_pretrain/{each['id']}": each["conversations"][1]["value"] + "\n" for each in captions}
    assert len(batch.labels) == len(sample_ids) == 4
    for ids, labels, sample_id in zip(batch.input_ids, batch.labels, sample_ids, strict=True):
        answer = labels[labels != -100].tolist()
        assert plain.decode(answer) == texts[sample_id]
        # The image's 16 tokens stand between the first token and the caption, padding behind it.
        assert ids.tolist() == [1, *[-200] * 16, *answer, *[0] * (len(ids) - 17 - len(answer))]
        np.testing.assert_array_equal(labels[17 : 17 + len(answer)], answer)
