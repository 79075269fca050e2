"""How regions are answered: in words of the model's own, or with one of a file's labels."""

import codecs
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from osprey_jax.engine import Prepared
from osprey_jax.predictor import Generation
from osprey_jax.prompt import Tokenizer
from osprey_jax.recognize import Recognition
from osprey_jax.request import Request
from osprey_jax.vocabulary import Vocabulary

DIGITS = 5
"""Of probabilities and their logarithms."""


class Answerer(Protocol):
    """What is needed of `Osprey`."""

    def prepare(self, image: Any, masks: Any) -> Prepared:
        """Called from several threads."""
        ...

    def answer(self, prepared: Sequence[Prepared], asked: Request) -> list[list[Generation]]:
        """Depends on its arguments alone, bit for bit."""
        ...

    def recognize(
        self, prepared: Sequence[Prepared], labels: Vocabulary, *, question: str | None, **limits: float
    ) -> list[list[Recognition]]:
        """Depends on its arguments alone, bit for bit."""
        ...


class Way(Protocol):
    """A way to answer; what `answers` gives for a region is what `told` takes."""

    def answers(self, osprey: Answerer, prepared: Sequence[Prepared]) -> Sequence[Sequence[Any]]:
        """One for each region of some images, depending on these images alone."""
        ...

    def told(self, answer: Any) -> dict[str, Any]:
        """What a line says of an answer: `text` first."""
        ...


@dataclasses.dataclass(frozen=True)
class Words:
    """Whatever the model says."""

    request: Request

    def answers(self, osprey: Answerer, prepared: Sequence[Prepared]) -> list[list[Generation]]:
        """See `Way`."""
        return osprey.answer(prepared, self.request)

    def told(self, answer: Generation) -> dict[str, Any]:
        """See `Way`."""
        return {
            "text": self.request.keep(answer.text),
            "logprob": _rounded(math.fsum(answer.logprobs)),
            "logprobs": [_rounded(value) for value in answer.logprobs],
        }


@dataclasses.dataclass(frozen=True)
class Choice:
    """The likeliest of some labels, or none of them below the `limits` of `Osprey.classify`."""

    labels: Vocabulary
    question: str | None
    limits: Mapping[str, float]

    def answers(self, osprey: Answerer, prepared: Sequence[Prepared]) -> list[list[Recognition]]:
        """See `Way`."""
        return osprey.recognize(prepared, self.labels, question=self.question, **self.limits)

    def told(self, answer: Recognition) -> dict[str, Any]:
        """See `Way`."""
        return {
            "text": answer.label,
            "probability": _rounded(answer.probability),
            "logprob": _rounded(answer.logprob),
        }


def _rounded(value: float) -> float:
    return round(value, DIGITS) + 0.0  # so that there is no -0.0


def read_vocabulary(path: Path, tokenizer: Tokenizer) -> Vocabulary:
    """The labels of a text file in UTF-8, one a line, without white space around them; empty lines are none.

    Raises ValueError, which names the file and the line; OSError.
    """
    lines = _read_labels(path)
    try:
        return Vocabulary(list(lines), tokenizer)
    except ValueError as error:
        # It names the label, or the two, as repr does.
        named = [str(line) for label, line in lines.items() if repr(label) in str(error)]
        where = f", line{'s' if len(named) > 1 else ''} {' and '.join(named)}" if named else ""
        raise ValueError(f"{path}{where}: {error}") from error


def _read_labels(path: Path) -> dict[str, int]:
    """Each label with the number of its line."""
    if not path.is_file():
        raise FileNotFoundError(f"no file of labels at {path}")
    lines: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        try:
            label = line.decode().strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: this is no text in UTF-8: {error.reason}") from error
        if label in lines:
            raise ValueError(f"{path}, line {number}: {label!r} is in line {lines[label]} already")
        if label:
            lines[label] = number
    if not lines:
        raise ValueError(f"{path} holds no label")
    return lines
