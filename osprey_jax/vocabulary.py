"""Vocabularies to recognise regions with: a trie over the tokens of labels, as flat arrays.

Each branching of the trie is one choice. What lies between two branchings is forced and kept together, so a
label is as many choices away as the vocabulary needs to tell it from the others, however long it is.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from osprey_jax.prompt import IMAGE_TOKEN, REGION, Tokenizer, conversation, tokenize

if TYPE_CHECKING:  # which imports JAX
    from osprey_jax.typing import ArrayLike, Int

_STEPS = (1, 4, 16)
_RUN_COST = 8
"""What a run of the decoder costs beside its tokens, in tokens: from a few on a CPU to many on a GPU."""


class Trie(NamedTuple):
    """Nodes of a compressed trie, all int32, padded so that vocabularies of like sizes share programs.

    Node 0 is the start. It has no tokens, every other node has those that lead to it from its parent: the
    first was chosen among the parent's children, the others are forced. A node without children is a label.
    """

    children: 'Int[ArrayLike, " N"]'
    """Number of the first child; the others follow it."""
    num_children: 'Int[ArrayLike, " N"]'
    start: 'Int[ArrayLike, " N"]'
    """Where its tokens are in `tokens`."""
    num_tokens: 'Int[ArrayLike, " N"]'
    tokens: 'Int[ArrayLike, " _"]'


class Vocabulary:
    """Labels to choose from, prepared once for any number of images.

    Attributes:
      labels: as they were given.
      token_ids: what the model is trained to emit for each, `</s>` included.
      trie: over `token_ids`.
      label_of: for each node, the index of its label, -1 for others.
      widths: bounds of the number of children, of the start and of other nodes.
      step: tokens that a run of the decoder takes of a row at most, so that labels cost least on the average.
      room: slots of the cache for that, a power of four.
      pad_id: the tokenizer's.
    """

    def __init__(self, labels: Sequence[str], tokenizer: Tokenizer):
        """Raises ValueError for no labels, or one that is empty, or can't be said, or is there twice."""
        if isinstance(labels, str) or not isinstance(labels, Sequence):
            raise ValueError(f"labels must be a list of texts, got {labels!r}")
        if not labels:
            raise ValueError("labels must hold at least one label")
        self.labels, self.pad_id = tuple(labels), tokenizer.pad_id
        self.token_ids = _token_ids(self.labels, tokenizer)
        nodes = _compressed(self.token_ids)
        self.label_of = np.array([node.label for node in nodes], np.int32)
        self.trie = _as_arrays(nodes)
        counts = [node.num_children for node in nodes]
        self.widths = (_bucket(counts[0]), _bucket(max(counts[1:])))
        passes = {step: _passes(nodes, step) for step in _STEPS}
        self.step = min(_STEPS, key=lambda step: passes[step].mean() * (step + _RUN_COST))
        self.room = _bucket(self.step * int(passes[self.step].max()))


class _Node(NamedTuple):
    tokens: Sequence[int]
    label: int
    children: int
    num_children: int


def _token_ids(labels: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Each label's ids behind `ASSISTANT:`, those that `prompt.encode_dialogue` puts a loss on."""

    def encode(answer: str | None) -> list[int]:
        return tokenize(tokenizer, conversation([(REGION, answer)], system=""))

    asked = encode(None)
    specials = {
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
        tokenizer.mask_id,
        tokenizer.position_id,
    }
    found: dict[tuple[int, ...], str] = {}
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"a label must be text and not empty, got {label!r}")
        ids = encode(label.strip())
        answer = tuple(ids[len(asked) :])
        if IMAGE_TOKEN in label or specials & {*answer[:-1]}:
            raise ValueError(f"label {label!r} holds a special token or what the tokenizer can't spell")
        if ids[: len(asked)] != asked:
            raise ValueError(f"label {label!r} can't be told from the prompt's end by this tokenizer")
        if answer in found:
            raise ValueError(f"labels {found[answer]!r} and {label!r} are the same to the model")
        found[answer] = label
    return [list(answer) for answer in found]


def _compressed(token_ids: Sequence[list[int]]) -> list[_Node]:
    """Nodes level by level. As each sequence has its own `</s>`, none is the beginning of another."""
    order = sorted(range(len(token_ids)), key=lambda index: token_ids[index])
    ranked = [token_ids[index] for index in order]
    # Of each node: the run of ranked labels below it, and where its tokens begin and end in them.
    waiting = [(0, len(ranked), 0, 0)]
    nodes: list[_Node] = []
    for first, last, begin, end in waiting:  # grows meanwhile
        children = len(waiting)
        if len(ranked[first]) > end:
            waiting += _children(ranked, first, last, end)
        count = len(waiting) - children
        label = -1 if count else order[first]
        nodes.append(_Node(ranked[first][begin:end], label, children if count else 0, count))
    return nodes


def _children(
    ranked: Sequence[Sequence[int]], first: int, last: int, begin: int
) -> list[tuple[int, int, int, int]]:
    """The runs of equal tokens at `begin`, each with the end of what its labels have in common."""
    tokens = np.array([ids[begin] for ids in ranked[first:last]])
    cuts = [first, *(first + 1 + np.flatnonzero(np.diff(tokens))).tolist(), last]
    found = []
    for low, high in itertools.pairwise(cuts):
        one, other = ranked[low], ranked[high - 1]
        end = begin + 1
        while end < min(len(one), len(other)) and one[end] == other[end]:
            end += 1
        found.append((low, high, begin, end))
    return found


def _passes(nodes: Sequence[_Node], step: int) -> np.ndarray:
    """For each label, the runs of the decoder that lead to it, of at most `step` tokens each."""
    needed = np.zeros(len(nodes), np.int64)
    for number, node in enumerate(nodes):  # parents first
        # Nothing follows a label's last token, so it isn't run.
        needed[number] += -(-(len(node.tokens) - (node.label >= 0)) // step)
        needed[node.children : node.children + node.num_children] = needed[number]
    return needed[[node.label >= 0 for node in nodes]]


def _as_arrays(nodes: Sequence[_Node]) -> Trie:
    lengths = [len(node.tokens) for node in nodes]
    starts = np.cumsum([0, *lengths[:-1]])

    def padded(values: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.pad(np.asarray(values, np.int32), (0, _bucket(len(values)) - len(values)))

    return Trie(
        children=padded([node.children for node in nodes]),
        num_children=padded([node.num_children for node in nodes]),
        start=padded(starts),
        num_tokens=padded(lengths),
        tokens=padded([token for node in nodes for token in node.tokens]),
    )


def _bucket(size: int) -> int:
    """The size or more: a power of four from 16 on."""
    return max(16, 4 ** -(-(size - 1).bit_length() // 2))
