"""Label decoding against the torch reference, which scores each label alone and knows no trie."""

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from osprey_jax import engine, recognize
from osprey_jax.predictor import Osprey
from osprey_jax.prompt import IGNORE_LABEL, PROTOCOLS, Tokenizer, encode_dialogue
from osprey_jax.recognize import Recognition
from osprey_jax.vocabulary import Vocabulary
from tests.parity import reference
from tests.parity.bridge import our_config, our_params
from tests.parity.scenes import picture, region_masks

PIECES = Path(__file__).parent / "golden" / "small.model"
SIZES = reference.ReferenceConfig(vocab_size=400, dim=64, ffn_dim=96, num_kv_heads=2, image_size=64)
LABELS = ("cat", "cat food", "caterpillar", "dog", "dog house", "red boat", "red house", "red houseboat", "7")
WAYS = (
    "caterpillar and a very long way to walk",
    "caterpillar and a very short way",
    "cat",
    "red",
    "dog",
    "7",
)
IMAGE, MASKS = picture(60, 80), region_masks(60, 80)
ROUNDING = 1e-4
"""Of logarithms that two correct float32 programs find, which attention as sharp as here makes coarse."""


class Expected(NamedTuple):
    """What a walk along torch's likeliest choices comes to."""

    label: str
    log_probability: float
    logprob: float
    runs: list[int]
    """Tokens from one choice to the next that have to be run."""


class Two:
    """Ours and the reference with the same weights, whose choices differ from region to region."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.reference = tokenizer, reference.OspreyReference(SIZES, seed=5)
        extractor, llama = self.reference.mask_extractor, self.reference.llama
        with torch.no_grad():
            for linear in (extractor.feat_linear, extractor.mask_linear.layers[2]):
                linear.weight *= 8
            for layer in llama.model.layers:
                layer.self_attn.q_proj.weight *= 4
                layer.self_attn.o_proj.weight *= 2
        config = our_config(SIZES)
        self.ours = Osprey(config, our_params(self.reference.release_state_dict(), config), tokenizer)
        self.prompt = self.ours.tokenize(PROTOCOLS["lvis_paco"].prompt())

    def token_ids(self, label: str) -> tuple[int, ...]:
        labels = encode_dialogue(self.tokenizer, [("<mask><pos>", label)]).labels
        return tuple(token for token in labels if token != IGNORE_LABEL)

    @functools.cache  # noqa: B019 - as long as the tests of this file
    def logits(self, region: int, label: str) -> np.ndarray:
        """Torch's logits of each of the label's tokens."""
        ids = self.token_ids(label)
        logits = self.reference.logits(IMAGE, MASKS[region : region + 1], [*self.prompt, *ids])
        return logits[-len(ids) - 1 : -1].double().numpy()

    def scores(self, region: int, labels: Sequence[str]) -> dict[str, tuple[float, float, list[int]]]:
        """Of each label: logarithm of its probability among them and among all that can be said; its runs."""
        all_ids = {label: self.token_ids(label) for label in labels}
        found = {}
        for label, ids in all_ids.items():
            among, free, runs = 0.0, 0.0, []
            for place, (token, logits) in enumerate(zip(ids, self.logits(region, label), strict=True)):
                follow = sorted({o[place] for o in all_ids.values() if o[:place] == ids[:place]})
                among += logits[token] - np.logaddexp.reduce(logits[follow])
                free += logits[token] - np.logaddexp.reduce(logits)
                if len(follow) > 1 or place == 0:
                    runs.append(0)
                runs[-1] += token != self.tokenizer.eos_id
            found[label] = among, free, runs
        return found

    def expected(self, region: int, labels: Sequence[str]) -> Expected:
        scores, left = self.scores(region, labels), list(labels)
        for place in range(max(len(self.token_ids(label)) for label in labels)):
            if len(left) > 1:
                best = max(
                    left, key=lambda label: self.logits(region, label)[place][self.token_ids(label)[place]]
                )
                left = [o for o in left if self.token_ids(o)[place] == self.token_ids(best)[place]]
        return Expected(left[0], *scores[left[0]])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.model").write_bytes(PIECES.read_bytes())
    return Two(Tokenizer.load(directory))


def assert_is(found: Recognition, expected: Expected) -> None:
    assert found.label == expected.label
    assert math.log(found.probability) == pytest.approx(expected.log_probability, abs=ROUNDING)
    assert found.logprob == pytest.approx(expected.logprob, abs=ROUNDING)


@pytest.fixture
def widths_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Rows and runs of the decoder, of each call of `descend`."""
    calls: list[tuple[int, int]] = []

    def counted(model, params, prefix, walk, *args, **options):
        before = int(walk.cache.end)
        walk = real(model, params, prefix, walk, *args, **options)
        calls.append((len(walk.node), (int(walk.cache.end) - before) // options["step"]))
        return walk

    real = recognize.descend
    monkeypatch.setattr(recognize, "descend", counted)
    return calls


def test_labels_and_scores_are_those_of_torch_along_the_trie(two: Two) -> None:
    expected = [two.expected(region, LABELS) for region in range(len(MASKS))]
    found = two.ours.classify(IMAGE, MASKS, LABELS)
    assert len({one.label for one in expected}) > 1  # or the test shows little
    for one, other in zip(found, expected, strict=True):
        assert_is(one, other)


def test_probabilities_of_all_labels_sum_to_one(two: Two) -> None:
    """Of nine in torch, which the test above compares with; of two, one in torch and one here."""
    found = two.ours.classify(IMAGE, MASKS, ["cat", "red boat"])
    for region, one in enumerate(found):
        scores = two.scores(region, LABELS)
        assert sum(math.exp(among) for among, *_ in scores.values()) == pytest.approx(1)
        [other] = {"cat", "red boat"} - {one.label}
        among = two.scores(region, ["cat", "red boat"])[other][0]
        assert one.probability + math.exp(among) == pytest.approx(1, abs=ROUNDING)
        assert one.probability >= 0.5


def test_forced_tokens_share_a_run_with_the_choice_before_them(
    two: Two, widths_run: list[tuple[int, int]]
) -> None:
    step = Vocabulary(WAYS, two.tokenizer).step
    counts = set()
    for region in range(len(MASKS)):
        expected = two.expected(region, WAYS)
        widths_run.clear()
        [found] = two.ours.classify(IMAGE, MASKS[region : region + 1], WAYS)
        assert_is(found, expected)
        assert widths_run == [(1, sum(math.ceil(count / step) for count in expected.runs))]
        counts.add(widths_run[0][1])
    assert step > 1
    assert len(counts) > 1


def test_rows_that_are_done_leave_the_batch(two: Two, widths_run: list[tuple[int, int]]) -> None:
    masks = np.concatenate([MASKS, MASKS[:, ::-1], MASKS[:, :, ::-1]])[:20]
    two.ours.classify(IMAGE, masks, WAYS)
    rows = [rows for rows, _ in widths_run]
    assert rows[0] == engine.row_bucket(20)
    assert rows == sorted(set(rows), reverse=True)
    assert len(rows) > 1


def test_regions_of_several_images_equal_each_alone(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two images of nine and twelve regions, and a third of one; in batches of eight rows at most, too."""
    regions = np.concatenate([MASKS, MASKS[:, ::-1]])
    items = [(IMAGE, regions[:9]), (IMAGE[::-1], regions[1:13]), (IMAGE[:, ::-1], regions[:1])]
    prompts = (PROTOCOLS["lvis_paco"].prompt(),)
    asked = [two.ours._ids.asked(two.ours.prepare(image, masks), prompts) for image, masks in items]
    alone = [[two.ours.classify(image, mask[None], LABELS)[0] for mask in masks] for image, masks in items]
    assert len({one.label for image in alone for one in image}) > 1
    for most in (engine.MAX_ROWS, 8):
        monkeypatch.setattr(engine, "capacity", lambda *_, most=most: engine.Capacity(rows=most))
        together = recognize.recognize(two.ours.network, asked, Vocabulary(LABELS, two.tokenizer))
        for found, expected in zip(together, alone, strict=True):
            assert [one.label for one in found] == [one.label for one in expected]
            for one, other in zip(found, expected, strict=True):
                assert one[1:] == pytest.approx(other[1:], abs=ROUNDING)


def test_many_labels_need_no_program_of_their_own(two: Two) -> None:
    """Two vocabularies of more than a hundred."""
    names = [f"{a}{b}" for a in "bcdfghjklmnpqrstvwxz" for b in ("ar", "en", "id", "ow", "us", "at", "im")]
    first, second = names[:-5], names[3:]
    two.ours.classify(IMAGE, MASKS, first)
    programs = recognize.start._cache_size(), recognize.descend._cache_size()
    found = two.ours.classify(IMAGE, MASKS, second)
    assert (recognize.start._cache_size(), recognize.descend._cache_size()) == programs
    assert_is(found[0], two.expected(0, second))


def test_a_single_label_has_probability_one_and_torchs_logprob(two: Two) -> None:
    for region, found in enumerate(two.ours.classify(IMAGE, MASKS, ["cat food"])):
        assert_is(found, two.expected(region, ["cat food"]))
        assert found.probability == 1


def test_a_region_below_a_limit_has_no_label_but_its_scores(two: Two) -> None:
    free = two.ours.classify(IMAGE, MASKS, LABELS)
    for field in ("probability", "logprob"):
        values = [getattr(one, field) for one in free]
        limit = sorted(values)[3]
        option = {"probability": "threshold", "logprob": "min_logprob"}[field]
        found = two.ours.classify(IMAGE, MASKS, LABELS, **{option: limit})
        assert found == [
            one if value >= limit else one._replace(label=None)
            for one, value in zip(free, values, strict=True)
        ]
        assert sum(one.label is None for one in found) == 3


def test_another_question_is_asked_in_its_place(two: Two) -> None:
    question = "What is the name for {}? Using only two words or a phrase."
    [found] = two.ours.classify(IMAGE, MASKS[:1], LABELS, question=question.format("<region>"))
    other = Two.__new__(Two)
    other.__dict__.update(two.__dict__)
    other.prompt = two.ours.tokenize(PROTOCOLS["lvis_paco"].prompt(question.format("<mask><pos>")))
    assert_is(found, other.expected(0, LABELS))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": []}, "at least one label"),
        ({"threshold": 1.5}, "threshold must be a probability, got 1.5"),
        ({"threshold": math.nan}, "threshold"),
        ({"min_logprob": 0.1}, "min_logprob"),
        ({"question": "What?"}, "must name <region> once"),
    ],
)
def test_what_is_wrong_is_said(two: Two, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        two.ours.classify(IMAGE, MASKS, **({"labels": LABELS} | options))
