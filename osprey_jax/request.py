"""What users may ask of a model about regions, checked and brought into the model's form."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np

from osprey_jax.generate import Greedy, Sampler, TopP
from osprey_jax.prompt import IMAGE_TOKEN, MASK_TOKEN, POSITION_TOKEN, PROTOCOLS, REGION

Level = Literal["short", "detailed"]

ANSWER_TOKENS = {"short": 64, "detailed": 512}
"""Default limits of an answer, by level."""
CHAT_TOKENS = 512
"""Default limit of an answer to a question of one's own."""
MOST_TOKENS = 4096
"""As many as the decoder's context; it was made for no more."""


class Decoding(NamedTuple):
    """How answers are decoded; `decoding` makes it."""

    sampler: Sampler
    limit: int
    """Tokens of an answer at most."""
    seed: int
    stop: tuple[str, ...]
    """An answer ends before the first of these texts in it."""


class Request(NamedTuple):
    """What is asked of an image's regions and how it is answered; `request` makes it."""

    prompts: tuple[str, ...]
    """One for all regions, or one for each."""
    keep: Callable[[str], str]
    """The part of an answer that is kept."""
    decoding: Decoding


def request(
    level: Level = "short",
    *,
    question: str | Sequence[str] | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
) -> Request:
    """Checks what `Osprey.describe` is asked, and takes its options; raises ValueError as it does."""
    if level not in tuple(ANSWER_TOKENS):
        raise ValueError(f"level must be 'short' or 'detailed', got {level!r}")
    protocol = PROTOCOLS[f"demo_{level}"]
    if question is None:
        keep, limit = protocol.keep, ANSWER_TOKENS[level]
        prompts: tuple[str, ...] = (protocol.prompt(),)
    else:
        questions: Sequence[Any] = question if isinstance(question, list | tuple) else [question]
        prompts = tuple(protocol.prompt(checked_question(one)) for one in questions)
        keep, limit = str, CHAT_TOKENS
    limit = limit if max_new_tokens is None else max_new_tokens
    how = decoding(limit, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
    return Request(prompts, keep, how)


def decoding(
    max_new_tokens: int, *, temperature: float, top_p: float, seed: int, stop: str | Sequence[str]
) -> Decoding:
    """Checks the options of decoding; raises ValueError that names the one that is wrong."""
    limit, number = _integer("max_new_tokens", max_new_tokens), _integer("seed", seed)
    if limit < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {limit}")
    if limit > MOST_TOKENS:
        raise ValueError(f"max_new_tokens must be at most {MOST_TOKENS}, got {limit}")
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"seed must have at most 64 bits, got {number}")
    if not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number of at least 0, got {temperature!r}")
    if temperature > float(np.finfo(np.float32).max):
        raise ValueError(f"temperature must be a number that float32 has, got {temperature!r}")
    if not isinstance(top_p, Real) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must be a number in (0, 1], got {top_p!r}")
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple) or not all(isinstance(text, str) and text for text in stops):
        raise ValueError(f"stop must be a text or a list of texts, none of them empty, got {stop!r}")
    sampler: Sampler = Greedy()
    # What is too small for float32's arithmetic leaves the likeliest token alone, as 0 does.
    if temperature >= float(np.finfo(np.float32).tiny):
        sampler = TopP(temperature=np.asarray(temperature, np.float32), top_p=np.asarray(top_p, np.float32))
    return Decoding(sampler, limit, number, tuple(stops))


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def checked_question(question: str) -> str:
    """A question of one's own with its region's placeholders."""
    if not isinstance(question, str):
        raise ValueError(f"a question must be text, got {question!r}")
    text = question.replace("<region>", REGION)
    if (count := text.count(REGION)) != 1:
        raise ValueError(f"a question must name <region> once, this one does so {count} times: {question}")
    for token in (IMAGE_TOKEN, MASK_TOKEN, POSITION_TOKEN):
        if token in text.replace(REGION, ""):
            raise ValueError(f"a question must not hold {token} but for its <region>: {question}")
    return text


def said(messages: Sequence[Mapping[str, str]]) -> list[str]:
    """What the messages say, once their form is checked."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f"messages must be a list, got {messages!r}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} must have a role and a content that is text, got {message!r}")
    roles = [message.get("role") for message in messages]
    if len(roles) % 2 == 0 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise ValueError(
            f"messages must alternate user and assistant, first and last the user's; got the roles {roles}"
        )
    return [message["content"].replace("<", "").replace(">", "") for message in messages]
