"""The predictor against the torch reference, from a release on disk to words; what it refuses."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch

import osprey_jax
from osprey_jax import convert
from osprey_jax.predictor import Osprey
from tests.parity import reference

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
OPENING = "<image>\n\nThis provides an overview of the picture.\n"
SHORT = (
    f"{SYSTEM} USER: {OPENING}"
    "Please give me a short description of <mask><pos>. Using a short phrase. ASSISTANT:"
)
PIECES = Path(__file__).parent / "golden" / "small.model"
"""A tokenizer of 400 pieces."""
SMALL = reference.ReferenceConfig(vocab_size=400, dim=64, ffn_dim=96, num_kv_heads=2, image_size=128)
RELEASED = {
    "multi-head": reference.ReferenceConfig(
        vocab_size=400, dim=48, ffn_dim=80, num_heads=6, num_kv_heads=6, num_layers=3, dims=(8, 24, 40, 48)
    ),
    "whole tower": reference.ReferenceConfig(
        vocab_size=400, dim=64, num_kv_heads=2, depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)
    ),
}


@dataclasses.dataclass
class Pair:
    """The same weights twice: ours, loaded from a converted release, and the reference."""

    ours: Osprey
    theirs: reference.OspreyReference
    directory: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Small, with images of 128 pixels, which most facts need no more than."""
    return make_pair(SMALL, tmp_path_factory.mktemp("small"))


def make_pair(config: reference.ReferenceConfig, directory: Path) -> Pair:
    model = reference.OspreyReference(config)
    with torch.no_grad():
        # Louder region tokens, so that greedy answers differ from mask to mask.
        model.mask_extractor.feat_linear.weight *= 8
        model.mask_extractor.mask_linear.layers[2].weight *= 8
    reference.write_release(model, directory / "release", tokenizer_model=PIECES)
    if config.image_size != 512:  # the release's, which its config.json doesn't name
        path = directory / "release" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"image_size": config.image_size}))
    convert.convert(directory / "release", directory / "checkpoint")
    return Pair(Osprey.load(directory / "checkpoint", dtype="float32"), model, directory)


def picture(height: int, width: int) -> np.ndarray:
    """Smooth colours, edges and noise."""
    rng = np.random.default_rng(height)
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), PIL.Image.Resampling.BICUBIC)).astype(int)
    smooth[height // 3 : height // 2, width // 4 : width // 2] = (200, 30, 60)
    return np.clip(smooth + rng.integers(-20, 20, smooth.shape), 0, 255).astype(np.uint8)


def regions(height: int, width: int) -> np.ndarray:
    """A box, a thin line, nothing, scattered pixels, one pixel."""
    masks = np.zeros((5, height, width), bool)
    masks[0, height // 4 : height // 2, width // 3 : width // 2] = True
    masks[1, height // 2] = True
    masks[3] = np.random.default_rng(1).random((height, width)) < 0.01
    masks[4, 7, 5] = True
    return masks


IMAGE, MASKS = picture(300, 420), regions(300, 420)


def without_end(token_ids: list[int], eos_id: int) -> list[int]:
    return token_ids[:-1] if token_ids[-1:] == [eos_id] else token_ids


@pytest.mark.parametrize("size", [(300, 420), (533, 211)])
def test_greedy_tokens_of_every_mask_are_the_references(pair: Pair, size: tuple[int, int]) -> None:
    assert_same_tokens(pair, picture(*size), regions(*size))


def test_logits_of_several_regions_are_the_references(pair: Pair) -> None:
    assert_same_logits(pair)


@pytest.mark.parametrize("sizes", ["multi-head", pytest.param("whole tower", marks=pytest.mark.slow)])
def test_tokens_and_logits_of_images_of_512_pixels_are_the_references(sizes: str, tmp_path: Path) -> None:
    pair = make_pair(RELEASED[sizes], tmp_path)
    assert pair.ours.config.vision.num_image_tokens == 1024
    assert_same_tokens(pair, IMAGE, MASKS[:2])
    assert_same_logits(pair)


def assert_same_tokens(pair: Pair, image: np.ndarray, masks: np.ndarray) -> None:
    found = pair.ours.generate(image, masks, SHORT, max_new_tokens=32)
    ids = pair.ours.tokenize(SHORT)
    expected = [pair.theirs.greedy(image, mask[None], ids, 32) for mask in masks]
    assert [without_end(g.token_ids, 2) for g in found] == expected
    assert len({tuple(tokens) for tokens in expected}) > 1, "no mask matters: the test shows nothing"


def assert_same_logits(pair: Pair) -> None:
    asked = "region1<mask><pos>,region2<mask><pos>,<mask><pos> and <mask><pos>?"
    prompt = f"{SYSTEM} USER: {OPENING}{asked} ASSISTANT:"
    masks = MASKS[[0, 2, 3, 1]]
    found = pair.ours.logits(IMAGE, masks, prompt)
    expected = pair.theirs.logits(IMAGE, masks, pair.ours.tokenize(prompt)).numpy()
    assert (found.shape, found.dtype) == (expected.shape, np.float32)
    assert np.abs(found - expected).max() <= 2e-4 * np.abs(expected).max()


def test_logprobs_are_the_references_log_probabilities_of_the_tokens(pair: Pair) -> None:
    answer, *_ = pair.ours.generate(IMAGE, MASKS, SHORT, max_new_tokens=6)
    prompt = pair.ours.tokenize(SHORT)
    logits = pair.theirs.logits(IMAGE, MASKS[:1], prompt + answer.token_ids)
    before = logits[-len(answer.token_ids) - 1 : -1].log_softmax(-1)
    expected = before[torch.arange(len(answer.token_ids)), torch.tensor(answer.token_ids)].numpy()
    np.testing.assert_allclose(answer.logprobs, expected, atol=2e-4)


def test_describe_asks_the_demos_questions_and_keeps_what_it_keeps(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, answer = [], "Region: a red box. it. a red box. it"
    monkeypatch.setattr(pair.ours.tokenizer, "decode", lambda ids: decoded.append(ids) or answer)
    detailed = f"{SYSTEM} USER: {OPENING}Can you give me a detailed description of <mask><pos>? ASSISTANT:"
    own = f"{SYSTEM} USER: {OPENING}What colour is <mask><pos>? ASSISTANT:"
    for options, prompt, kept in (
        ({}, SHORT, "a red box. it."),
        ({"level": "detailed"}, detailed, "a red box. it."),
        ({"question": "What colour is <region>?"}, own, answer),
    ):
        assert pair.ours.describe(IMAGE, MASKS, **options, max_new_tokens=4) == [kept] * 5
        ids = pair.ours.tokenize(prompt)
        expected = [pair.theirs.greedy(IMAGE, mask[None], ids, 4) for mask in MASKS]
        assert [without_end(ids, 2) for ids in decoded] == expected
        decoded.clear()


def test_chat_lists_the_regions_once_and_goes_on(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.ours.tokenizer, "decode", lambda ids: " ".join(map(str, without_end(ids, 2))))
    messages = [
        {"role": "user", "content": "What is <region2>?"},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "And region1?"},
    ]
    prompt = (
        f"{SYSTEM} USER: <image>\nThis provides an overview of the picture.\n"
        "Ther are 2 part regions in the picture: region1<mask><pos>,region2<mask><pos>. "
        "What is region2? ASSISTANT: a dog</s>USER: And region1? ASSISTANT:"
    )
    expected = pair.theirs.greedy(IMAGE, MASKS[:2], pair.ours.tokenize(prompt), 8)
    assert pair.ours.chat(IMAGE, MASKS[:2], messages, max_new_tokens=8) == " ".join(map(str, expected))


def test_embeddings_are_the_references_mask_tokens(pair: Pair) -> None:
    with torch.no_grad():
        features = pair.theirs.tower(pair.theirs.preprocess(IMAGE))
        expected, _ = pair.theirs.extract(features, torch.from_numpy(MASKS).float())
    found = pair.ours.embed(IMAGE, MASKS)
    assert (found.shape, found.dtype) == (expected.shape, np.float32)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5 * float(expected.abs().max()))


def test_an_answer_ends_with_the_end_token(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, *_ = pair.ours.generate(IMAGE, MASKS, SHORT, max_new_tokens=9)
    end = whole.token_ids[5]
    monkeypatch.setattr(pair.ours.tokenizer, "eos_id", end)
    short, *_ = pair.ours.generate(IMAGE, MASKS, SHORT, max_new_tokens=9)
    assert short.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1]
    assert len(short.logprobs) == len(short.token_ids)


def test_sampling_repeats_by_seed_and_ignores_the_neighbours(pair: Pair) -> None:
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.95}
    first = pair.ours.generate(IMAGE, MASKS, SHORT, **settings, seed=3)
    others = MASKS[[0, 1, 4, 4, 2, 3]]
    assert pair.ours.generate(IMAGE, others, SHORT, **settings, seed=3)[:2] == first[:2]
    numpy_seed = {"max_new_tokens": np.int64(12), "seed": np.uint8(3)}
    assert pair.ours.generate(IMAGE, iter(MASKS), SHORT, **settings | numpy_seed) == first
    assert pair.ours.generate(IMAGE, MASKS, SHORT, **settings, seed=4) != first
    greedy = pair.ours.generate(IMAGE, MASKS, SHORT, max_new_tokens=12)
    almost = pair.ours.generate(IMAGE, MASKS, SHORT, max_new_tokens=12, temperature=0.7, top_p=1e-6)
    assert [g.token_ids for g in almost] == [g.token_ids for g in greedy]


def test_images_and_masks_may_come_in_every_accepted_form(pair: Pair, tmp_path: Path) -> None:
    PIL.Image.fromarray(IMAGE).save(tmp_path / "photo.png")
    expected = pair.theirs.extract(
        pair.theirs.tower(pair.theirs.preprocess(IMAGE)), torch.from_numpy(MASKS).float()
    )[0].detach()
    for image in (tmp_path / "photo.png", str(tmp_path / "photo.png"), PIL.Image.fromarray(IMAGE)):
        for masks in (MASKS.astype(np.uint8), MASKS * np.uint8(255), list(MASKS), jnp.asarray(MASKS)):
            found = pair.ours.embed(image, masks)
            np.testing.assert_allclose(found, expected, atol=2e-5 * float(expected.abs().max()))


def test_bfloat16_holds_tower_and_decoder_in_it_and_the_extractor_in_float32(pair: Pair) -> None:
    half = Osprey.load(pair.directory / "checkpoint", dtype="bfloat16")
    assert half.params["decoder"]["norm"]["scale"].dtype == jnp.bfloat16
    assert half.params["vision"]["stem_conv"]["kernel"].dtype == jnp.bfloat16
    assert half.params["extractor"]["res2"]["kernel"].dtype == jnp.float32
    expected = pair.theirs.logits(IMAGE, MASKS[:1], half.tokenize(SHORT)).numpy()
    error = np.abs(half.logits(IMAGE, MASKS[:1], SHORT) - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 0.1  # eight bits of mantissa, through every layer
    assert len(half.generate(IMAGE, MASKS[:1], SHORT, max_new_tokens=3)[0].token_ids) == 3


def test_the_package_offers_the_predictor() -> None:
    assert osprey_jax.Osprey is Osprey
    with pytest.raises(AttributeError, match=r"osprey_jax.*nothing"):
        osprey_jax.nothing  # noqa: B018


def test_a_tokenizer_of_another_model_is_refused(pair: Pair) -> None:
    config = dataclasses.replace(pair.ours.config, mask_token_id=32000, position_token_id=32001)
    with pytest.raises(ValueError, match=r"<mask> and <pos> at \(400, 401\).*config at \(32000, 32001\)"):
        Osprey(config, pair.ours.params, pair.ours.tokenizer)


def asking(*messages: object) -> Callable[[Osprey], str]:
    return lambda o: o.chat(IMAGE, MASKS, list(messages))


def describing(**options: object) -> Callable[[Osprey], list[str]]:
    return lambda o: o.describe(IMAGE, MASKS, **options)


USER, ASSISTANT = {"role": "user", "content": "What is region1?"}, {"role": "assistant", "content": "a dog"}
TWO = SHORT.replace("<mask><pos>", "<mask><pos> and <mask><pos>")
WRONG = {
    "no such image": (lambda o: o.embed("nowhere.jpg", MASKS), r"no image at nowhere\.jpg"),
    "grey array": (lambda o: o.embed(IMAGE[:, :, 0], MASKS), r"\(h, w, 3\) uint8, got \(300, 420\)"),
    "no masks": (lambda o: o.describe(IMAGE, MASKS[:0]), "no masks given"),
    "None for masks": (lambda o: o.describe(IMAGE, None), "no masks given"),
    "no masks to iterate over": (lambda o: o.describe(IMAGE, iter([])), "no masks given"),
    "empty list": (lambda o: o.describe(IMAGE, []), "no masks given"),
    "other size": (lambda o: o.describe(IMAGE, MASKS[:, :-1]), r"\(299, 420\).*image is \(300, 420\)"),
    "single mask": (
        lambda o: o.describe(IMAGE, MASKS[0]),
        r"got \(300, 420\); for a single mask pass mask\[None\]",
    ),
    "values": (lambda o: o.describe(IMAGE, MASKS * np.uint8(7)), "found the values 0, 7"),
    "two regions": (lambda o: o.generate(IMAGE, MASKS, TWO), "must hold <mask> 1 times, it does so 2 times"),
    "no region": (
        lambda o: o.generate(IMAGE, MASKS, SHORT.replace("<mask>", "")),
        "<mask> 1 times.* 0 times",
    ),
    "no position": (
        lambda o: o.generate(IMAGE, MASKS, SHORT.replace("<pos>", "")),
        "<pos> 1 times.* 0 times",
    ),
    "no image in prompt": (
        lambda o: o.generate(IMAGE, MASKS, SHORT.replace("<image>", "")),
        "<image> 1 times",
    ),
    "no text": (lambda o: o.generate(IMAGE, MASKS, None), "a prompt must be text, got None"),
    "position first": (
        lambda o: o.generate(IMAGE, MASKS, SHORT.replace("<mask><pos>", "<pos><mask>")),
        "each <mask> of a prompt must be followed by its <pos>",
    ),
    "position apart": (
        lambda o: o.logits(IMAGE, MASKS[:2], TWO.replace("<mask><pos> and", "<mask> <pos> and")),
        "each <mask> of a prompt must be followed by its <pos>",
    ),
    "logits of two": (lambda o: o.logits(IMAGE, MASKS[:3], TWO), "<mask> 3 times, it does so 2 times"),
    "question": (describing(question="What?"), "name <region> once.* 0 times: What?"),
    "question of two": (describing(question="<region> or <mask><pos>?"), "once.* 2 times"),
    "question with an image": (describing(question="<image> <region>"), "not hold <image> but for its <reg"),
    "question with a mask": (describing(question="<mask> <region>"), "not hold <mask> but for its <region>"),
    "question with a position": (describing(question="<pos><region>"), "not hold <pos> but for its <region>"),
    "no question": (describing(question=3), "a question must be text, got 3"),
    "level": (describing(level="long"), "'short' or 'detailed', got 'long'"),
    "level of no name": (describing(level=["short"]), r"'short' or 'detailed', got \['short'\]"),
    "limit": (describing(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
    "an endless answer": (describing(max_new_tokens=4097), "max_new_tokens must be at most 4096, got 4097"),
    "half a token": (describing(max_new_tokens=2.5), r"max_new_tokens must be an integer, got 2\.5"),
    "temperature": (describing(temperature=-1), "temperature must be a number of at least 0, got -1"),
    "no temperature": (describing(temperature=float("nan")), "temperature must be a number .*got nan"),
    "infinite temperature": (describing(temperature=float("inf")), "temperature must be a number .*got inf"),
    "temperature beyond float32": (describing(temperature=1e39), "temperature must be a number that float32"),
    "temperature in words": (describing(temperature="warm"), "temperature must be a number .*got 'warm'"),
    "top_p": (describing(top_p=0), r"top_p must be a number in \(0, 1\], got 0"),
    "no top_p": (describing(top_p=None), r"top_p must be a number in \(0, 1\], got None"),
    "seed": (describing(seed="a"), "seed must be an integer, got 'a'"),
    "large seed": (describing(seed=2**63), "seed must have at most 64 bits, got 9223372036854775808"),
    "roles": (asking({"role": "assistant", "content": "hello"}), r"alternate user and.*\['assistant'\]"),
    "no role": (asking({"content": "hello"}), r"alternate user and assistant.*\[None\]"),
    "no messages": (asking(), "alternate user and assistant"),
    "one string": (lambda o: o.chat(IMAGE, MASKS, "hello"), "messages must be a list, got 'hello'"),
    "one message": (lambda o: o.chat(IMAGE, MASKS, USER), "messages must be a list, got {'role'"),
    "a string among messages": (asking(USER, ASSISTANT, "hello"), "message 3 must have a role and .*'hello'"),
    "no content": (asking({"role": "user"}), "message 1 must have .* content that is text"),
    "content None": (asking(USER, {**ASSISTANT, "content": None}, USER), "message 2 must have .*None"),
    "content in parts": (asking({"role": "user", "content": ["hi"]}), r"message 1 must have .*\['hi'\]"),
    "dtype": (lambda o: Osprey.load("anywhere", dtype="float16"), "'float32' or 'bfloat16', got 'float16'"),
    "no checkpoint": (lambda o: Osprey.load("nowhere"), r"no directory nowhere"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(pair: Pair, case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(pair.ours)


def test_an_unreadable_image_and_a_release_are_named(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"cannot read the image .*photo\.jpg"):
        pair.ours.embed(tmp_path / "photo.jpg", MASKS)
    with pytest.raises(ValueError, match=r"PyTorch release.*convert it first: python convert_torch_ckpt\.py"):
        Osprey.load(pair.directory / "release")
