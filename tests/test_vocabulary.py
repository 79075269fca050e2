"""Vocabularies: the ids of labels against those that training puts a loss on, tries against literals."""

import importlib.resources
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from osprey_jax.prompt import IGNORE_LABEL, PROTOCOLS, Tokenizer, encode_dialogue
from osprey_jax.vocabulary import Trie, Vocabulary

MODELS = {
    "small": Path(__file__).parent / "golden" / "small.model",
    "mistral": Path(str(importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1")),
}
LABELS = ["cat", "caterpillar", "cat food", "Cat", "cat.", "teddy bear", "7up", "猫", "crème brûlée", "a: b"]
WORDS = ("<unk>", "<s>", "</s>", "ASSISTANT:", "red", "green", "big", "old", "house", "boat", "hut")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Two of Llama's kind, and one that has a token for each word of `WORDS`, by its place, and no others."""
    loaded = {}
    for name, model in MODELS.items():
        directory = tmp_path_factory.mktemp(name)
        shutil.copyfile(model, directory / "tokenizer.model")
        loaded[name] = Tokenizer.load(directory)
    directory = tmp_path_factory.mktemp("words")
    words = {
        "version": "1.0",
        "added_tokens": [
            {"id": place, "content": word, "special": True, "normalized": False}
            | {"single_word": False, "lstrip": False, "rstrip": False}
            for place, word in enumerate(WORDS[:3])
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: place for place, word in enumerate(WORDS)},
            "unk_token": "<unk>",
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(words))
    return {**loaded, "words": Tokenizer.load(directory)}


def paths(trie: Trie, node: int = 0, before: tuple[int, ...] = ()) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Nodes without children, and the tokens that lead there."""
    start, count = trie.start[node], trie.num_tokens[node]
    tokens = (*before, *trie.tokens[start : start + count].tolist())
    if trie.num_children[node] == 0:
        yield node, tokens
    for child in range(trie.num_children[node]):
        yield from paths(trie, trie.children[node] + child, tokens)


def sizes(vocabulary: Vocabulary) -> list[tuple[int, int, int]]:
    """Of each node: tokens, children, label."""
    count = len(vocabulary.label_of)
    numbers = (vocabulary.trie.num_tokens[:count], vocabulary.trie.num_children[:count], vocabulary.label_of)
    return list(zip(*(x.tolist() for x in numbers), strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("protocol", ["lvis_paco", "panoptic"])
def test_ids_of_labels_are_those_that_training_puts_a_loss_on(
    tokenizers: dict[str, Tokenizer], name: str, protocol: str
) -> None:
    question = PROTOCOLS[protocol].opening + PROTOCOLS[protocol].question
    for label, ids in zip(LABELS, Vocabulary(LABELS, tokenizers[name]).token_ids, strict=True):
        labels = encode_dialogue(tokenizers[name], [(question, label)]).labels
        assert ids == [token for token in labels if token != IGNORE_LABEL]


@pytest.mark.parametrize("labels", [LABELS, LABELS[:1], [f"{a} {b}" for a in LABELS for b in LABELS]])
def test_all_labels_and_nothing_else_are_at_the_ends_of_the_trie(
    tokenizers: dict[str, Tokenizer], labels: Sequence[str]
) -> None:
    vocabulary = Vocabulary(labels, tokenizers["small"])
    found = {vocabulary.label_of[node]: list(tokens) for node, tokens in paths(vocabulary.trie)}
    assert found == dict(enumerate(vocabulary.token_ids))
    assert (vocabulary.label_of >= 0).sum() == len(labels)
    assert vocabulary.labels == tuple(labels)


def test_tokens_between_choices_are_kept_together(tokenizers: dict[str, Tokenizer]) -> None:
    labels = ["red house", "big old boat", "big old", "red boat hut", "green"]
    vocabulary = Vocabulary(labels, tokenizers["words"])
    assert vocabulary.token_ids == [[4, 8, 2], [6, 7, 9, 2], [6, 7, 2], [4, 9, 10, 2], [5, 2]]
    assert sizes(vocabulary) == [
        (0, 3, -1),
        (1, 2, -1),  # red
        (2, 0, 4),  # green </s>
        (2, 2, -1),  # big old
        (2, 0, 0),  # house </s>
        (3, 0, 3),  # boat hut </s>
        (1, 0, 2),  # </s>
        (2, 0, 1),  # boat </s>
    ]
    assert vocabulary.trie.children[:4].tolist() == [1, 4, 0, 6]
    assert vocabulary.trie.tokens[:15].tolist() == [4, 5, 2, 6, 7, 8, 2, 9, 10, 2, 2, 9, 2, 0, 0]


def test_children_of_every_node_are_within_the_widths(tokenizers: dict[str, Tokenizer]) -> None:
    labels = [f"{chr(97 + a)}{chr(97 + b)}" for a in range(26) for b in range(26)]
    vocabulary = Vocabulary(labels, tokenizers["small"])
    first, *others = vocabulary.trie.num_children
    assert (first, max(others)) <= vocabulary.widths <= (4 * first, 4 * max(others))


@pytest.mark.parametrize(
    ("labels", "step", "room"),
    [
        (["red", "green", "big"], 1, 16),  # one token before </s>
        (["red red red red", "green green green green"], 4, 16),
        (["red", "red red", "red red red"], 1, 16),
        ([" ".join(["red"] * 39), " ".join(["green"] * 40)], 16, 64),
    ],
)
def test_steps_and_room_suit_the_labels(
    tokenizers: dict[str, Tokenizer], labels: list[str], step: int, room: int
) -> None:
    vocabulary = Vocabulary(labels, tokenizers["words"])
    assert (vocabulary.step, vocabulary.room) == (step, room)


def test_vocabularies_of_like_sizes_have_arrays_of_one_size(tokenizers: dict[str, Tokenizer]) -> None:
    """So that they share programs."""
    made = [
        Vocabulary([f"{number} {word}" for number in range(count)], tokenizers["mistral"])
        for count, word in ((700, "apple"), (800, "old pear"))
    ]
    assert [x.shape for x in made[0].trie] == [x.shape for x in made[1].trie]
    assert made[0].widths == made[1].widths


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([], "at least one"),
        ("cat", "list of texts"),
        (None, "list of texts"),
        (["cat", ""], "not empty, got ''"),
        (["cat", " \n"], "not empty"),
        (["cat", 7], "got 7"),
        (["cat", "dog", "cat"], "'cat' and 'cat' are the same"),
        (["cat", " cat "], "'cat' and ' cat ' are the same"),
        (["cat</s>dog"], "'cat</s>dog' holds a special token"),
        (["cat <mask><pos>"], "special token"),
        (["<image>"], "special token"),
    ],
)
def test_a_bad_vocabulary_is_refused(tokenizers: dict[str, Tokenizer], labels: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Vocabulary(labels, tokenizers["small"])


def test_words_that_the_tokenizer_lacks_are_refused(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(ValueError, match=r"'red car' .* can't spell"):
        Vocabulary(["red house", "red car"], tokenizers["words"])
