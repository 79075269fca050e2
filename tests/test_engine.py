"""Batches of regions against the torch reference, which answers one at a time and knows no prefix."""

import itertools
import threading
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch

from osprey_jax import checkpoint, engine, request, sharding
from osprey_jax.models.llama import init_cache
from osprey_jax.predictor import Osprey
from osprey_jax.prompt import PROTOCOLS, REGION, Tokenizer
from tests.parity import reference
from tests.parity.bridge import our_config, our_params
from tests.parity.scenes import picture

PIECES = Path(__file__).parent / "golden" / "small.model"
SIZES = reference.ReferenceConfig(
    vocab_size=400, dim=64, ffn_dim=96, num_heads=8, num_kv_heads=8, image_size=64
)
SHORT = PROTOCOLS["demo_short"].prompt()
NEVER = -1
"""No token's id: answers go on up to their limit."""
COMMON = 60
"""A token that ends most answers about `MASKS`, at many lengths."""
COMMON_OF_BOTH = 364
"""A token that ends some answers about each of `BOTH`, at many lengths."""


def boxes(count: int, seed: int) -> np.ndarray:
    """Rectangles of all sizes, `(count, 60, 80)`."""
    rng, masks = np.random.default_rng(seed), np.zeros((count, 60, 80), bool)
    for mask in masks:
        top, left, height, width = rng.integers((0, 0, 2, 2), (50, 70, 25, 35))
        mask[top : top + height, left : left + width] = True
    return masks


IMAGE, MASKS = picture(60, 80), boxes(21, seed=0)
SEVERAL = [(picture(60, 80, seed), boxes(count, seed)) for seed, count in enumerate((5, 3, 8), 1)]
BOTH = [(picture(60, 80, seed), boxes(12, seed)) for seed in (7, 6)]


class Two:
    """Ours and the reference with the same weights, whose answers differ from region to region."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.reference = tokenizer, reference.OspreyReference(SIZES, seed=6)
        extractor, llama = self.reference.mask_extractor, self.reference.llama
        with torch.no_grad():
            for linear in (extractor.feat_linear, extractor.mask_linear.layers[2]):
                linear.weight *= 8
            for layer in llama.model.layers:
                layer.self_attn.q_proj.weight *= 4
                layer.self_attn.o_proj.weight *= 2
        self.config = our_config(SIZES)
        self.params = our_params(self.reference.release_state_dict(), self.config)
        self.ours = Osprey(self.config, self.params, tokenizer)
        self.known: dict[tuple[bytes, bytes, int, str], list[int]] = {}

    def expected(self, image: np.ndarray, mask: np.ndarray, limit: int, prompt: str = SHORT) -> list[int]:
        """Torch's answer about one region alone, its end token included."""
        key = (image.tobytes(), mask.tobytes(), limit, prompt)
        if key not in self.known:
            ids = self.ours.tokenize(prompt)
            self.known[key] = self.reference.greedy(image, mask[None], ids, limit, eos_id=NEVER)
        whole, end = self.known[key], self.tokenizer.eos_id
        return whole[: whole.index(end) + 1] if end in whole else whole


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.model").write_bytes(PIECES.read_bytes())
    return Two(Tokenizer.load(directory))


class Calls(NamedTuple):
    """What the engine asked of the network."""

    images: list[int]
    """Of each run of the tower."""
    prefixes: list[int]
    """Of each prefill."""
    shared: list[int]
    """Rows of the prefix's cache, of each batch."""
    rows: list[int]
    """Of each batch as it began, then as each run of decoding found it."""
    slots: list[int]
    """Of the rows' cache, of each run of decoding."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    seen = Calls([], [], [], [], [])
    real = {name: getattr(engine, name) for name in ("encode", "prefill", "begin", "decode")}

    def encode(model, params, images):
        seen.images.append(len(images))
        return real["encode"](model, params, images)

    def prefill(model, params, ids, *args):
        seen.prefixes.append(len(ids))
        return real["prefill"](model, params, ids, *args)

    def begin(model, params, prefix, ids, *args, **options):
        seen.shared.append(prefix.cache.keys[0].shape[0])
        seen.rows.append(len(ids))
        return real["begin"](model, params, prefix, ids, *args, **options)

    def decode(model, params, prefix, rows, **options):
        seen.rows.append(len(rows.token))
        seen.slots.append(rows.cache.positions.shape[1])
        return real["decode"](model, params, prefix, rows, **options)

    for function in (encode, prefill, begin, decode):
        monkeypatch.setattr(engine, function.__name__, function)
    return seen


def test_answers_that_end_at_uneven_lengths_are_torchs(
    two: Two, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two.tokenizer, "eos_id", COMMON)
    expected = [two.expected(IMAGE, mask, 28) for mask in MASKS]
    lengths = {len(ids) for ids in expected}
    assert len(lengths) > 5
    assert (min(lengths), max(lengths)) == (6, 28)
    found = two.ours.generate(IMAGE, MASKS, SHORT, max_new_tokens=28)
    assert [one.token_ids for one in found] == expected
    # The batch shrank and its cache grew on the way, or this shows less than it says.
    assert calls.rows[0] > calls.rows[-1]
    assert len(set(calls.rows)) > 2
    assert calls.slots[0] < calls.slots[-1]


def test_regions_of_several_images_answer_as_each_alone_in_torch(two: Two, calls: Calls) -> None:
    expected = [[two.expected(image, mask, 12) for mask in masks] for image, masks in SEVERAL]
    prepared = [two.ours.prepare(image, masks) for image, masks in SEVERAL]
    found = two.ours.answer(prepared, request.request(max_new_tokens=12))
    assert [[one.token_ids for one in answers] for answers in found] == expected
    assert sum(calls.images) == len(SEVERAL)
    # Groups of images went together; tower and prefill ran once for each.
    assert len(calls.images) < len(SEVERAL)
    assert calls.prefixes == calls.shared == calls.images


def test_answers_about_several_images_that_end_at_uneven_lengths_are_torchs(
    two: Two, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two.tokenizer, "eos_id", COMMON_OF_BOTH)
    expected = [[two.expected(image, mask, 12) for mask in masks] for image, masks in BOTH]
    ends = [[len(ids) < 12 for ids in answers] for answers in expected]
    assert all(len({len(ids) for ids in answers}) > 3 for answers in expected)
    prepared = [two.ours.prepare(image, masks) for image, masks in BOTH]
    found = two.ours.answer(prepared, request.request(max_new_tokens=12))
    assert [[one.token_ids for one in answers] for answers in found] == expected
    # The batch of both shrank while rows of both were under way, and not the same ones.
    assert calls.images == [2]
    assert (calls.rows[0], calls.rows[-1]) == (24, 16)
    assert {*ends[0]} == {*ends[1]} == {True, False}
    assert ends[0] != ends[1]


def test_many_images_are_described_in_their_order(two: Two, calls: Calls) -> None:
    decode, keep = two.tokenizer.decode, PROTOCOLS["demo_short"].keep
    expected = [[keep(decode(two.expected(image, mask, 12))) for mask in masks] for image, masks in SEVERAL]
    assert list(two.ours.describe_many(iter(SEVERAL), max_new_tokens=12)) == expected
    assert sum(calls.images) == len(SEVERAL) > len(calls.images)
    assert calls.prefixes == calls.images


def test_each_region_may_have_a_question_of_its_own(two: Two, calls: Calls) -> None:
    questions = (
        f"Say what {REGION} is.",
        f"Say, in a few words or one if you can, of what colour {REGION} is and what lies behind it!",
        f"Say what {REGION} is made of, and who has made it.",
        f"And {REGION}?",
    )
    prompts = [PROTOCOLS["demo_short"].prompt(questions[number % 4]) for number in range(8)]
    assert len({len(two.ours.tokenize(prompt)) for prompt in prompts}) == 4
    mask = MASKS[3]
    expected = [two.expected(IMAGE, mask, 12, prompt) for prompt in prompts]
    assert len({tuple(ids) for ids in expected}) == 4  # the question matters
    found = two.ours.generate(IMAGE, np.stack([mask] * 8), prompts, max_new_tokens=12)
    assert [one.token_ids for one in found] == expected
    masks = MASKS[:8]
    expected = [two.expected(IMAGE, *each) for each in zip(masks, [12] * 8, prompts, strict=True)]
    found = two.ours.generate(IMAGE, masks, prompts, max_new_tokens=12)
    assert [one.token_ids for one in found] == expected
    assert calls.prefixes == [1, 1]


def test_a_thousand_regions_cost_one_image_and_one_prefix(two: Two, calls: Calls) -> None:
    masks = boxes(1000, seed=9)
    found = two.ours.generate(IMAGE, masks, SHORT, max_new_tokens=3)
    assert len(found) == 1000
    assert (calls.images, calls.prefixes) == ([1], [1])
    assert set(calls.shared) == {1}
    assert max(calls.rows) <= engine.MAX_ROWS
    # The first and last of batches are among them.
    spots = (0, 1, 124, 125, 127, 128, 500, 874, 999)
    expected = [two.expected(IMAGE, masks[spot], 3) for spot in spots]
    assert len({tuple(ids) for ids in expected}) > 3
    assert [found[spot].token_ids for spot in spots] == expected


@pytest.mark.parametrize("rows", [1, 8])
def test_batches_are_such_that_all_caches_fit_the_device(
    two: Two, calls: Calls, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    limit, prompt = 12, two.ours.tokenize(SHORT)
    before = prompt.index(two.tokenizer.mask_id)
    prefix = before - 1 + two.config.vision.num_image_tokens
    room = 24 + 16  # of the prompt's 23 further tokens and the answer's 12, as they are padded
    slots = prefix + rows * 2 * room
    caches = jax.eval_shape(lambda: init_cache(two.config.decoder, 1, slots, dtype="float32"))
    needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((caches.keys, caches.values)))
    size = sum(x.nbytes for x in jax.tree.leaves(two.ours.params)) + 2 * needed
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": size})
    monkeypatch.setattr(engine.jax, "local_devices", lambda: [device])
    found = two.ours.generate(IMAGE, MASKS, SHORT, max_new_tokens=limit)
    assert max(calls.rows) == rows
    assert set(calls.slots) == {room}
    assert [one.token_ids for one in found] == [two.expected(IMAGE, mask, limit) for mask in MASKS]


def cut(two: Two, ids: list[int], stops: Sequence[str]) -> tuple[str, list[int]]:
    """The text before the first of `stops`, and the ids up to the one that completes it."""
    decode = two.tokenizer.decode
    for size in range(1, len(ids) + 1):
        text = decode(ids[:size])
        if any(stop in text for stop in stops):
            return text[: min(text.index(stop) for stop in stops if stop in text)], ids[:size]
    return decode(ids), ids


def test_a_stop_text_ends_its_own_answer_alone(two: Two) -> None:
    whole, stops = [two.expected(IMAGE, mask, 12) for mask in MASKS[:8]], ("ight", "hild")
    expected = [cut(two, ids, stops) for ids in whole]
    shortened = [one[1] != ids for one, ids in zip(expected, whole, strict=True)]
    assert set(shortened) == {True, False}
    found = two.ours.generate(IMAGE, MASKS[:8], SHORT, max_new_tokens=12, stop=stops)
    assert [(one.text, one.token_ids) for one in found] == expected
    assert all(len(one.logprobs) == len(one.token_ids) for one in found)


def test_decoding_ends_once_each_answer_has_had_a_stop_text(two: Two, calls: Calls) -> None:
    stops = ("2", "hi", "on", "ight")
    expected = [cut(two, two.expected(IMAGE, mask, 12), stops) for mask in MASKS[:8]]
    lengths = {len(ids) for _, ids in expected}
    assert len(lengths) > 2
    assert max(lengths) <= 1 + engine._STOP_STEPS < 12
    found = two.ours.generate(IMAGE, MASKS[:8], SHORT, max_new_tokens=12, stop=stops)
    assert [(one.text, one.token_ids) for one in found] == expected
    # The batch as it began and one run of decoding; a second one would go to the limit.
    assert calls.rows == [8, 8]


def sampled(
    two: Two, scenes: Sequence[tuple[np.ndarray, np.ndarray]], temperature: float = 1.5
) -> list[list[list[int]]]:
    """Token ids of answers that are drawn, of images that are answered together."""
    asked = request.request(max_new_tokens=12, temperature=temperature, top_p=0.95, seed=4)
    answers = two.ours.answer([two.ours.prepare(*scene) for scene in scenes], asked)
    return [[one.token_ids for one in each] for each in answers]


def test_what_is_drawn_depends_on_no_other_region_and_no_other_image(two: Two, calls: Calls) -> None:
    [three, first], [five, second] = sampled(two, SEVERAL[1:]), sampled(two, [SEVERAL[0], SEVERAL[2]])
    assert calls.images == [2, 2]
    assert first == second
    assert len({tuple(ids) for [ids, *_] in (three, five, first)}) == 3
    # Each image alone, wherever it was in its group; one of them among other regions.
    image, masks = SEVERAL[2]
    assert sampled(two, [(image, masks)]) == [first]
    assert sampled(two, [SEVERAL[0]]) == [five]
    more = np.concatenate([SEVERAL[1][1], MASKS[:5]])
    assert sampled(two, [(SEVERAL[1][0], more)])[0][:3] == three
    assert sampled(two, [(image, masks[:1])]) == [first[:1]]
    others = np.where((np.arange(8) == 5)[:, None, None], masks, MASKS[:8])
    [changed] = sampled(two, [(image, others)])
    assert changed[5] == first[5]
    assert sum(one != other for one, other in zip(changed, first, strict=True)) > 2


def test_equal_regions_draw_each_for_itself_whatever_batch_they_are_in(
    two: Two, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, masks = SEVERAL[2]
    equal = [(image, np.stack([masks[0]] * 8))]
    [together] = sampled(two, equal)
    assert together[0] == sampled(two, [(image, masks)])[0][0]
    assert len({tuple(ids) for ids in together}) > 5
    calls.rows.clear()
    monkeypatch.setattr(engine, "capacity", lambda *_: engine.Capacity(rows=4))
    assert sampled(two, equal) == [together]
    assert set(calls.rows) == {4}
    assert together[:4] != together[4:]


def test_each_token_of_each_region_is_drawn_anew(two: Two) -> None:
    # So warm that logits hardly count: what is drawn is one of 402 tokens, nearly evenly.
    [answers] = sampled(two, SEVERAL[2:], temperature=1e4)
    drawn = list(itertools.chain(*answers))
    assert len(drawn) > 60
    # Of 96 draws, 85 are expected to differ, within 3; of one draw for a row or a step, 8 or 12.
    assert len(set(drawn)) > 0.8 * len(drawn)


def assert_torchs_on_a_mesh(two: Two, split: Osprey) -> None:
    """Parameters lie on eight devices, and answers are torch's."""
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(split.params)} == {8}
    expected = [[two.expected(image, mask, 6) for mask in masks] for image, masks in SEVERAL[:2]]
    prepared = [split.prepare(image, masks) for image, masks in SEVERAL[:2]]
    found = split.answer(prepared, request.request(max_new_tokens=6))
    assert [[one.token_ids for one in answers] for answers in found] == expected


def test_eight_devices_that_split_heads_and_widths_answer_as_torch_does(two: Two) -> None:
    mesh = sharding.make_mesh(tensor=8)
    assert_torchs_on_a_mesh(two, Osprey(two.config, two.params, two.tokenizer, mesh=mesh))


def test_a_checkpoint_restored_in_parts_onto_a_mesh_of_three_axes_answers_as_torch_does(
    two: Two, tmp_path: Path
) -> None:
    checkpoint.save_params(tmp_path / "checkpoint", two.params, two.config, two.tokenizer)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    loaded = Osprey.load(tmp_path / "checkpoint", dtype="float32", mesh=mesh)
    large = [leaf for leaf in jax.tree.leaves(loaded.params) if leaf.size >= 4096]
    assert len(large) > 10
    assert all(leaf.addressable_shards[0].data.size < leaf.size for leaf in large)
    assert_torchs_on_a_mesh(two, loaded)


WRONG = {
    "masks of another size": ((IMAGE, MASKS[:, :-1]), ValueError, r"item 2: .*\(59, 80\)"),
    "no such file": (("nowhere.png", MASKS), FileNotFoundError, r"item 2: no image at nowhere\.png"),
    "no pair": ((IMAGE,), ValueError, "item 2 must be an image and its masks"),
    "the caller's own error": (RuntimeError("the shard broke off"), RuntimeError, "the shard broke off"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_an_item_is_raised_after_those_before_it_are_answered(two: Two, case: str) -> None:
    wrong, kind, message = WRONG[case]

    def items() -> Iterator[object]:
        yield from SEVERAL[:2]
        if isinstance(wrong, Exception):
            raise wrong
        yield wrong
        yield SEVERAL[2]

    answers = two.ours.describe_many(items(), max_new_tokens=12)
    keep = PROTOCOLS["demo_short"].keep
    for image, masks in SEVERAL[:2]:
        expected = [keep(two.tokenizer.decode(two.expected(image, mask, 12))) for mask in masks]
        assert next(answers) == expected
    with pytest.raises(kind, match=message):
        next(answers)


def test_a_stream_that_is_left_early_reads_no_further(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "WINDOW_REGIONS", 1)
    monkeypatch.setattr(two.ours, "answer", lambda window, asked: [[] for _ in window])
    taken = []

    def slowly() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while True:
            time.sleep(0.1)
            taken.append(SEVERAL[0])
            yield SEVERAL[0]

    def reading() -> bool:
        return any(thread.name.startswith("reading ahead") for thread in threading.enumerate())

    answers = two.ours.describe_many(slowly())
    assert next(answers) == []
    assert reading()
    answers.close()
    assert not reading()
    # What was still to be read ahead, so many items, was called off.
    assert len(taken) < engine.WINDOW_IMAGES
