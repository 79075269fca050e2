"""Rendered scenes as a source of records, and the tokenizer made from them."""

import hashlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.shapes import Shapes, train_tokenizer
from osprey_jax.config import preset
from osprey_jax.masks import decode_rles
from osprey_jax.prompt import SYSTEM_INFERENCE, Tokenizer, encode_dialogue
from tests.data_pipelines.scene_reader import INDICES, seen, turns_of

ROOT = Path(__file__).parents[2]
REGION = "<mask><pos>"


def test_a_scene_and_its_words_are_the_same_on_every_machine() -> None:
    record = Shapes(seed=3, kinds=("short",))[12345]
    assert (record.image.shape, record.image.dtype) == ((96, 96, 3), np.uint8)
    digest = hashlib.sha256(record.image.tobytes() + decode_rles(record.masks).tobytes()).hexdigest()
    assert digest == "ded29c209722558b32467bff7ddfd27a423df18b101eea4bbd5b7a6a3757c98c"
    assert [turn.answer for turn in record.turns] == [
        "a small pillar, striped red",
        "a small ring, plain red",
        "a small square, striped white",
        "a large ring, striped cyan",
    ]
    assert record.sample_id == "shapes/train/3/12345"


@pytest.mark.parametrize("size", [64, 96, 160])
def test_masks_hold_exactly_the_pixels_that_were_painted(size: int) -> None:
    """Each object and part has colours of its own, one where it is plain, else two; lines have theirs."""
    source = Shapes(size=size)
    for scene in map(source.scene, range(25)):
        numbers = scene.image.astype(int) @ (1, 256, 65536)
        inner = np.zeros_like(scene.masks)
        for region, mask in zip(scene.regions, scene.masks, strict=True):
            if region.whole is not None:
                assert not (mask & ~scene.masks[region.whole]).any()
                inner[region.whole] |= mask
        own = scene.masks & ~inner
        assert (own.sum(axis=0) <= 1).all()
        ink = (scene.image == 24).all(axis=2)
        assert not (ink & ~own.any(axis=0)).any()
        for region, mask in zip(scene.regions, own, strict=True):
            assert (mask & ink).any()
            colours = np.unique(numbers[mask & ~ink])
            assert len(colours) == (1 if region.texture == "plain" else 2)
            assert np.array_equal(mask & ~ink, np.isin(numbers, colours))


def test_enough_of_every_object_is_visible() -> None:
    for scene, things in map(seen, INDICES):
        for thing, mask in zip(things, scene.masks, strict=True):
            if thing.outline is not None:
                assert (thing.outline & mask).sum() >= 0.77 * thing.outline.sum()


def test_nothing_nearer_fills_the_hole_of_a_ring() -> None:
    """It would look like a disc."""
    rings = 0
    for scene in map(Shapes().scene, range(500)):
        for i, region in enumerate(scene.regions):
            if region.name == "ring":
                low, high = (reach(np.argwhere(scene.masks[i]), axis=0) for reach in (np.min, np.max))
                if np.ptp(high - low) == 0:  # neither wears a hat nor is cut off, so that its middle is known
                    rings += 1
                    middle = tuple((low + high) // 2)
                    assert not any(mask[middle] for mask in scene.masks[i + 1 : scene.num_objects])
    assert rings > 150


def test_scenes_have_objects_parts_and_overlaps_in_number() -> None:
    scenes = [Shapes().scene(index) for index in range(300)]
    counts = [scene.num_objects for scene in scenes]
    assert set(counts) == {3, 4, 5}
    assert 3.9 < np.mean(counts) < 4.2
    parts = [len(scene.regions) - scene.num_objects for scene in scenes]
    assert set(parts) == {0, 1, 2}
    assert 0.15 < np.mean(np.array(parts) > 0) < 0.4
    assert 0.6 < np.mean([scene.hidden.any() for scene in scenes]) < 0.85


@pytest.mark.parametrize("seed", [0, 1])
def test_train_and_held_out_scenes_differ_in_a_parity(seed: int) -> None:
    for parity, split in enumerate(("train", "held_out")):
        scenes = [Shapes(seed, split=split).scene(index) for index in range(100)]
        whole = [scene for scene in scenes if not scene.hidden.any()]
        assert len(whole) > 10
        for scene in whole:
            corners = [np.argwhere(mask).min(axis=0) for mask in scene.masks[: scene.num_objects]]
            assert np.sum(corners) % 2 == parity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split must be one of train, held_out, got 'test'"),
        ({"kinds": ("short", "long")}, "kinds must be some of short, .*, got"),
        ({"kinds": ()}, "kinds must be some of"),
        ({"seed": -1}, "seed and count can't be negative"),
        ({"size": 32}, "size must be at least 64, got 32"),
    ],
)
def test_wrong_options_are_rejected(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shapes(**options)


def test_a_source_ends() -> None:
    source = Shapes(count=3, kinds=("category",))
    assert [record.sample_id for record in source] == [f"shapes/train/0/{index}" for index in range(3)]
    assert len(source) == 3
    with pytest.raises(IndexError):
        source[-1]


def test_making_data_does_not_import_jax() -> None:
    program = "import sys, data_pipelines.shapes; print('jax' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout == "False\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


def test_the_tokenizer_is_the_same_in_another_process(directory: Path, tmp_path: Path) -> None:
    program = f"from data_pipelines.shapes import train_tokenizer; train_tokenizer({str(tmp_path)!r})"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


def test_the_tokenizer_fits_the_tiny_preset(tokenizer: Tokenizer) -> None:
    config = preset("tiny")
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert (tokenizer.mask_id, tokenizer.position_id) == (512, 513)
    assert (config.decoder.vocab_size, config.mask_token_id, config.position_token_id) == (512, 512, 513)


def test_every_word_of_the_data_is_one_token(tokenizer: Tokenizer) -> None:
    for record in map(Shapes(split="held_out", seed=5).__getitem__, range(200)):
        for text in itertools.chain(*turns_of(record)):
            words = re.findall(r"<mask>|<pos>|[A-Za-z]+|[^A-Za-z ]", text.removeprefix("<image>"))
            # A space beside a placeholder is a token, as in Llama's.
            spaces = text.count(" <mask>") + text.count("<pos> ")
            assert len(tokenizer.encode(text.removeprefix("<image>"))) == len(words) + spaces


def test_texts_come_back_from_their_tokens(tokenizer: Tokenizer) -> None:
    for record in map(Shapes(split="held_out", seed=5).__getitem__, range(200)):
        ids = encode_dialogue(tokenizer, turns_of(record), system=SYSTEM_INFERENCE).input_ids
        assert tokenizer.pad_id not in ids  # which is <unk>
        for text in itertools.chain(*turns_of(record)):
            for piece in re.split("<image>|<mask><pos>", text):
                assert tokenizer.decode(tokenizer.encode(piece)) == piece.strip()


def test_words_that_the_data_does_not_have_are_spelled(tokenizer: Tokenizer) -> None:
    text = "Which hedgehog says “café” 12 times, 刺猬?"
    ids = tokenizer.encode(text)
    assert tokenizer.pad_id not in ids
    assert tokenizer.decode(ids) == text
