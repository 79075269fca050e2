"""A tokenizer for the shapes' conversations, small enough for the `tiny` preset.

As in Llama's, spaces are part of the words and what is not in the vocabulary is spelled, at worst in bytes.
Differs: the words of the data are entries of their own, taken whole without merges, which would cost several
entries for each.
"""

import re
import string
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from data_pipelines.shapes.conversations import KINDS, converse
from data_pipelines.shapes.source import Shapes
from osprey_jax.prompt import (
    IMAGE_TOKEN,
    MASK_TOKEN,
    POSITION_TOKEN,
    PROTOCOLS,
    SYSTEM_INFERENCE,
    SYSTEM_TRAINING,
    conversation,
    region_list,
)

VOCAB_SIZE = 512
"""Entries, reserved ones included; the region placeholders' ids follow them."""

_SPECIALS = ("<unk>", "<s>", "</s>")
_SPACE = "▁"
_SCENES = 200
"""How many scenes are talked about, in every way, to find all words."""
_MAX_REGIONS = 9


def train_tokenizer(directory: Path | str) -> None:
    """Writes `tokenizer.json` into a directory that exists, the same bytes each time.

    `osprey_jax.prompt.Tokenizer.load` reads it; nearly every word of the data is one token.
    """
    letters = {*string.ascii_letters, *string.digits, _SPACE}
    pieces = {piece for text in _texts() for piece in _pieces(text)}
    letters |= {letter for piece in pieces for letter in piece if letter.isprintable()}
    entries = [*_SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    entries += [*sorted(letters), *sorted(pieces - letters)]
    reserved = VOCAB_SIZE - len(entries)
    assert reserved >= 0, f"the words don't fit: {len(entries)} entries"
    entries += [f"<reserved{number}>" for number in range(reserved)]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True, ignore_merges=True)
    )
    tokenizer.normalizer = _NORMALIZER
    tokenizer.pre_tokenizer = _WORDS
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([*_SPECIALS, MASK_TOKEN, POSITION_TOKEN])
    (Path(directory) / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


_NORMALIZER = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
_WORDS = pre_tokenizers.Split(tokenizers.Regex(r"▁?\p{L}+|▁?[^\p{L}▁]|▁"), "isolated")


def _pieces(text: str) -> Iterator[str]:
    """What the words of a text are before any is looked up; special tokens are left out."""
    for segment in re.split("|".join((IMAGE_TOKEN, MASK_TOKEN, POSITION_TOKEN, *_SPECIALS)), text):
        if segment:
            yield from (piece for piece, _ in _WORDS.pre_tokenize_str(_NORMALIZER.normalize_str(segment)))


def _texts() -> Iterator[str]:
    """Texts with all the words that the conversations and the protocols use."""
    source, rng = Shapes(count=_SCENES), np.random.Generator(np.random.PCG64(0))
    turns: set[tuple[str, str]] = set()
    for scene in map(source.scene, range(len(source))):
        for kind in KINDS:
            said = converse(scene, rng, kinds=(kind,))
            first, *others = ((turn.question, turn.answer) for turn in said.turns)
            turns.update([(said.opening + first[0], first[1]), *others])
    for turn in turns:
        yield conversation([turn], system=SYSTEM_TRAINING)
    for protocol in PROTOCOLS.values():
        yield protocol.opening + (protocol.question or "")
    for count in range(1, _MAX_REGIONS + 1):
        yield region_list(count)
    yield SYSTEM_INFERENCE
