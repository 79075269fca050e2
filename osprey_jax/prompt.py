"""From words to token ids: tokenizer, conversation template, label masks and the protocols of inference.

The weights know exact strings and exact ids, so everything here is an interface, oddities included.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers

IMAGE_TOKEN = "<image>"
MASK_TOKEN = "<mask>"
POSITION_TOKEN = "<pos>"
REGION = MASK_TOKEN + POSITION_TOKEN
"""How a prompt names one region."""

IMAGE_TOKEN_ID = -200
"""Stands in token ids for the image."""
IGNORE_LABEL = -100
"""The label of tokens that carry no loss."""

SYSTEM_TRAINING = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SYSTEM_INFERENCE = SYSTEM_TRAINING.replace("user", "human")
OVERVIEW = "This provides an overview of the picture.\n"

_BOS, _EOS, _UNKNOWN = "<s>", "</s>", "<unk>"
_SPACE = "▁"


class Tokenizer:
    """A BPE tokenizer with the specials `<unk>`, `<s>`, `</s>` and the region placeholders.

    From a `tokenizer.model` it gives the ids that the fast Llama tokenizer of transformers 4.31 gives, with
    which the released weights were trained and which later versions of transformers don't reproduce.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, file_name: str, data: bytes):
        """Use `load`; `file_name` and `data` are what `save` writes."""
        backend.add_special_tokens([MASK_TOKEN, POSITION_TOKEN])
        self._backend, self._file_name, self._data = backend, file_name, data
        self.bos_id, self.eos_id, self.pad_id = map(self._special_id, (_BOS, _EOS, _UNKNOWN))
        self.mask_id, self.position_id = map(self._special_id, (MASK_TOKEN, POSITION_TOKEN))

    def _special_id(self, token: str) -> int:
        index = self._backend.token_to_id(token)
        if index is None:
            raise ValueError(f"it lacks the special token {token}")
        return int(index)

    @classmethod
    def load(cls, directory: Path | str) -> "Tokenizer":
        """Reads a directory's `tokenizer.model` (SentencePiece BPE), else its `tokenizer.json`.

        Raises ValueError where there is neither, or the file is damaged or of another kind.
        """
        root = epath.Path(directory)
        for name, parse in (("tokenizer.model", _legacy_llama), ("tokenizer.json", _from_json)):
            path = root / name
            if path.is_file():
                data = path.read_bytes()
                try:
                    return cls(parse(data), file_name=name, data=data)
                except Exception as error:
                    raise ValueError(f"cannot read {path}: {error}") from error
        raise ValueError(f"no tokenizer in {directory}: neither tokenizer.model nor tokenizer.json")

    def save(self, directory: Path | str) -> None:
        """Writes the file that this tokenizer was loaded from, byte for byte."""
        (Path(directory) / self._file_name).write_bytes(self._data)

    def encode(self, text: str) -> list[int]:
        """Token ids without a leading BOS; special tokens in the text are recognised."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens skipped, white space at the ends stripped."""
        return self._backend.decode(list(ids), skip_special_tokens=True).strip()


def _from_json(data: bytes) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_buffer(data)


def _legacy_llama(data: bytes) -> tokenizers.Tokenizer:
    """Derives the BPE from a SentencePiece model as transformers 4.31 did."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=data)
    names = [pieces.id_to_piece(index) for index in range(pieces.get_piece_size())] if data else []
    if names[:3] != [_UNKNOWN, _BOS, _EOS]:
        raise ValueError(f"its first pieces are {names[:3]}, not {_UNKNOWN}, {_BOS} and {_EOS}")
    scores = [pieces.get_score(index) for index in range(len(names))]
    if not all(score == int(score) for score in scores):
        raise ValueError("a SentencePiece model of another kind than BPE")
    vocabulary = {piece: index for index, piece in enumerate(names)}
    # By score, then by the piece made: Llama's pieces of white space may share a score.
    merges = sorted(
        (-scores[index], index, vocabulary[piece[:cut]], vocabulary[piece[cut:]])
        for piece, index in vocabulary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    )
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            [(names[left], names[right]) for *_, left, right in merges],
            unk_token=_UNKNOWN,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([_UNKNOWN, _BOS, _EOS])
    return backend


def tokenize(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt: BOS first, `IMAGE_TOKEN_ID` at each `<image>`; pieces between are tokenized alone."""
    ids = [tokenizer.bos_id]
    for index, piece in enumerate(prompt.split(IMAGE_TOKEN)):
        ids += [IMAGE_TOKEN_ID] if index else []
        ids += tokenizer.encode(piece)
    return ids


def normalize_image(question: str) -> str:
    """Puts a question's `<image>` in front of it, on a line of its own; other questions are left alone."""
    if IMAGE_TOKEN not in question:
        return question
    return f"{IMAGE_TOKEN}\n{question.replace(IMAGE_TOKEN, '').strip()}".strip()


def conversation(turns: Sequence[tuple[str, str | None]], *, system: str) -> str:
    """The text of questions and answers; it ends at `ASSISTANT:` where the last answer is None."""
    return f"{system} " + "".join(_turn(question, answer) for question, answer in turns)


def _turn(question: str, answer: str | None) -> str:
    asked = f"USER: {question} ASSISTANT:"
    return asked if answer is None else f"{asked} {answer}{_EOS}"


class Dialogue(NamedTuple):
    """Token ids with `IMAGE_TOKEN_ID` for the image, and the label of each: itself or `IGNORE_LABEL`."""

    input_ids: list[int]
    labels: list[int]


def encode_dialogue(
    tokenizer: Tokenizer, turns: Sequence[tuple[str, str]], *, system: str = SYSTEM_TRAINING
) -> Dialogue:
    """Ids of a whole conversation, and labels on its answers.

    An answer's labels begin with the token after `ASSISTANT:` and end with its `</s>`.
    """
    dialogue = Dialogue([tokenizer.bos_id], [IGNORE_LABEL])
    for index, (question, answer) in enumerate(turns):
        # Each turn ends with a special token, so the turns' ids are those of the whole text.
        prefix = "" if index else f"{system} "
        asked = tokenize(tokenizer, prefix + _turn(question, None))[1:]
        ids = tokenize(tokenizer, prefix + _turn(question, answer))[1:]
        start = _common_length(asked, ids)
        unlabelled = (tokenizer.mask_id, tokenizer.position_id, IMAGE_TOKEN_ID)
        dialogue.input_ids.extend(ids)
        dialogue.labels.extend([IGNORE_LABEL] * start)
        dialogue.labels.extend(IGNORE_LABEL if token in unlabelled else token for token in ids[start:])
    return dialogue


def encode_caption(tokenizer: Tokenizer, caption: str) -> Dialogue:
    """The plain template of image-text alignment: image, caption and newline; no `</s>`."""
    answer = tokenizer.encode(f"{caption}\n")
    return Dialogue([tokenizer.bos_id, IMAGE_TOKEN_ID, *answer], [IGNORE_LABEL, IGNORE_LABEL, *answer])


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def region_list(count: int) -> str:
    """How the conversation data lists the regions of an image, in front of the first question."""
    regions = ",".join(f"region{number}{REGION}" for number in range(1, count + 1))
    lead = "Ther are 1 part region" if count == 1 else f"Ther are {count} part regions"
    return f"{lead} in the picture: {regions}. "


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How the original asks for one thing: the strings of the prompt and what is kept of an answer."""

    opening: str
    """What precedes the question, image included."""
    question: str | None
    """With one `REGION`; None where a benchmark asks its own."""
    keep: Callable[[str], str]

    def prompt(self, question: str | None = None) -> str:
        """The complete prompt for this protocol's question, or for the one given."""
        asked = self.question if question is None else question
        assert asked is not None, "this protocol has no question of its own"
        return conversation([(self.opening + asked, None)], system=SYSTEM_INFERENCE)


def _all(text: str) -> str:
    return text


def _between_colons(text: str) -> str:
    return text.split(":")[1] if ":" in text else text


def _sentences(text: str) -> str:
    """Sentences up to the first repeated one, each ended by a full stop, as the original's demo has them."""
    kept: list[str] = []
    for sentence in filter(None, _between_colons(text).split(".")):
        if sentence in kept:
            break
        kept.append(sentence)
    return "".join(f"{sentence}." for sentence in kept).strip()


def _category(text: str) -> str:
    return _between_colons(text).translate(str.maketrans(".:,", "   "))


def _caption(text: str) -> str:
    return _between_colons(text).replace(".", ".\n")


_DEMO = f"{IMAGE_TOKEN}\n\n{OVERVIEW}"
_CLASSIFICATION = f"{IMAGE_TOKEN}\n{OVERVIEW}"
_BENCHMARK = f"{IMAGE_TOKEN}\n.\n{OVERVIEW}"

PROTOCOLS: Mapping[str, Protocol] = {
    "demo_short": Protocol(
        _DEMO, f"Please give me a short description of {REGION}. Using a short phrase.", _sentences
    ),
    "demo_detailed": Protocol(_DEMO, f"Can you give me a detailed description of {REGION}?", _sentences),
    "lvis_paco": Protocol(
        _CLASSIFICATION, f"What is the category of {REGION}? Using only one word or phrase.", _category
    ),
    "panoptic": Protocol(_BENCHMARK, f"What is in {REGION}? Using a short phrase.", _all),
    "refcocog": Protocol(_BENCHMARK, f"Please give me a short description of {REGION}.", _caption),
    "ferret_bench": Protocol(_BENCHMARK, None, _all),
    "detailed_description": Protocol(_BENCHMARK, None, _between_colons),
    "pope": Protocol(f"{IMAGE_TOKEN}\n", None, str.lower),
}
