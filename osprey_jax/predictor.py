"""`Osprey`: an image, region masks and a question in; words about each region out."""

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from osprey_jax import checkpoint
from osprey_jax.config import OspreyConfig
from osprey_jax.generate import Greedy, Sampler, TopP, answer, prefill
from osprey_jax.image import ImageLike, load_image, preprocess
from osprey_jax.masks import MaskPyramid, as_masks, mask_pyramid
from osprey_jax.models import osprey as network
from osprey_jax.prompt import (
    IMAGE_TOKEN,
    IMAGE_TOKEN_ID,
    MASK_TOKEN,
    OVERVIEW,
    POSITION_TOKEN,
    PROTOCOLS,
    REGION,
    SYSTEM_INFERENCE,
    Tokenizer,
    conversation,
    region_list,
    tokenize,
)
from osprey_jax.typing import Array, ArrayLike, Float, Params

Masks = ArrayLike | Iterable[ArrayLike]
"""`(R, h, w)`: an array or an iterable of `(h, w)` arrays, bool, 0/1 or 0/255, at the image's own size."""
Level = Literal["short", "detailed"]

ANSWER_TOKENS = {"short": 64, "detailed": 512}
"""Default limits of `describe`, by level."""
CHAT_TOKENS = 512
"""Default limit of `chat`, and of `describe` for a question of one's own."""
_LENGTH_STEP, _SUFFIX_STEP = 64, 32


class Generation(NamedTuple):
    """An answer; `token_ids` ends with `</s>` unless the limit cut it off."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    """Of each token: natural logarithm of the model's probability, before temperature and top-p."""


class Decoding(NamedTuple):
    """How answers are decoded; `decoding` makes it."""

    sampler: Sampler
    limit: int
    seed: int


class Request(NamedTuple):
    """What is asked of each region and how it is answered; `request` makes it."""

    prompt: str
    keep: Callable[[str], str]
    """The part of an answer that is kept."""
    decoding: Decoding


class Osprey:
    """A model with its tokenizer, ready to answer.

    Methods take an image (a path, a Pillow image or an `(h, w, 3)` uint8 array) and `masks` (see `Masks`) of
    at least one region, which may be empty. They raise ValueError (FileNotFoundError for a path that isn't
    there) that says which of them is wrong and how. Answers are greedy unless `temperature` is above 0; then
    they depend on `seed` and the region's number alone.
    """

    def __init__(self, config: OspreyConfig, params: Params, tokenizer: Tokenizer, *, dtype: str = "float32"):
        """`params` as `models.osprey.init_params` makes them; `dtype` is what is computed in."""
        ids = (tokenizer.mask_id, tokenizer.position_id)
        if ids != (config.mask_token_id, config.position_token_id):
            raise ValueError(
                f"the tokenizer has {MASK_TOKEN} and {POSITION_TOKEN} at {ids}, the model's config at "
                f"{(config.mask_token_id, config.position_token_id)}"
            )
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.model = network.Osprey(config, jnp.dtype(dtype))

    @classmethod
    def load(cls, directory: Path | str, dtype: str | None = None) -> "Osprey":
        """Loads a checkpoint made by `convert_torch_ckpt.py` or by training.

        Args:
          directory: the checkpoint.
          dtype: "float32" or "bfloat16", of parameters and arithmetic; the extractor is float32 in both. By
            default bfloat16 on accelerators and float32 on CPU.
        """
        if dtype is None:
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
        config = checkpoint.load_config(directory)
        tokenizer = Tokenizer.load(directory)
        shapes = network.abstract_params(config, dtype)
        shapes = {**shapes, "extractor": network.abstract_params(config, "float32")["extractor"]}
        return cls(config, checkpoint.load_params(directory, shapes), tokenizer, dtype=dtype)

    def describe(
        self,
        image: ImageLike,
        masks: Masks,
        level: Level = "short",
        *,
        question: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Says in words what each region is, one text per mask.

        Args:
          image: the picture.
          masks: the regions.
          level: "short" or "detailed": the original demo's question, and the part of its answer that is kept.
          question: asked instead, with `<region>` where the region is meant; the answer is given whole.
          max_new_tokens: limit of an answer; by default `ANSWER_TOKENS` or `CHAT_TOKENS`.
          temperature: 0 for greedy answers.
          top_p: sampling is from the likeliest tokens that reach this probability.
          seed: of sampling.
        """
        asked = request(
            level,
            question=question,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        return list(self._describe(image, masks, asked))

    def _describe(self, image: ImageLike, masks: Masks, asked: Request) -> Iterator[str]:
        """`describe`, each text as soon as it is there: for the command's progress bar."""
        for generation in self._generate(image, masks, asked.prompt, asked.decoding):
            yield asked.keep(generation.text)

    def generate(
        self,
        image: ImageLike,
        masks: Masks,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[Generation]:
        """Answers a complete prompt, template included, once for each mask.

        `prompt` holds one `<image>` and one `<mask><pos>`, which stands for each region in turn.
        """
        settings = decoding(max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        return list(self._generate(image, masks, prompt, settings))

    def _generate(
        self, image: ImageLike, masks: Masks, prompt: str, settings: Decoding
    ) -> Iterator[Generation]:
        ids = self._expand(prompt, regions=1)
        tokens, count = self._visual_tokens(image, masks)
        split = ids.index(self.tokenizer.mask_id)
        yield from self._answers(tokens, ids[:split], ids[split:], range(count), settings)

    def chat(
        self,
        image: ImageLike,
        masks: Masks,
        messages: Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int = CHAT_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """The next answer of a conversation about all regions, which its messages call region1, region2, ….

        `messages` alternate {"role": "user", "content": …} and {"role": "assistant", "content": …}, first and
        last the user's. As in the conversation data, `<` and `>` are taken out of what they say.
        """
        settings = decoding(max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        said = _said(messages)
        tokens, count = self._visual_tokens(image, masks)
        said[0] = f"{IMAGE_TOKEN}\n{OVERVIEW}{region_list(count)}{said[0]}"
        turns = list(zip(said[::2], [*said[1::2], None], strict=True))
        ids = self._expand(conversation(turns, system=SYSTEM_INFERENCE), regions=count)
        [generation] = self._answers(tokens, ids[:-1], ids[-1:], [0], settings)
        return generation.text

    def logits(self, image: ImageLike, masks: Masks, prompt: str) -> Float[np.ndarray, "T V"]:
        """Float32 next-token logits over the whole sequence; the image takes `num_image_tokens` places of it.

        `prompt` holds one `<image>` and one `<mask><pos>` for each mask, in the masks' order.
        """
        pixels, pyramid, count = self._inputs(image, masks)
        ids = self._expand(prompt, regions=count)
        # Padding is on the right, so causality alone keeps it out.
        padded = self._padded(ids, _LENGTH_STEP)
        return np.asarray(_logits(self.model, self.params, pixels, pyramid, padded)[0, : len(ids)])

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids of a prompt, BOS first, -200 for `<image>`."""
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt must be text, got {prompt!r}")
        return tokenize(self.tokenizer, prompt)

    def embed(self, image: ImageLike, masks: Masks) -> Float[np.ndarray, "R D"]:
        """Float32 mask tokens, one for each region: for retrieval and deduplication."""
        tokens, count = self._visual_tokens(image, masks)
        return np.asarray(tokens.mask[0, :count])

    def _inputs(self, image: ImageLike, masks: Masks) -> tuple[np.ndarray, MaskPyramid, int]:
        """The network's inputs for one image, its regions padded to a power of two, and their true number."""
        picture = load_image(image)
        regions = as_masks(masks, picture.shape[:2])
        vision, size = self.config.vision, self.config.extractor.position_size
        pyramid = mask_pyramid(regions, level_sizes=vision.level_sizes, position_size=size)
        missing = (1 << (len(regions) - 1).bit_length()) - len(regions)
        pyramid = jax.tree.map(lambda x: np.pad(x, ((0, missing), (0, 0), (0, 0)))[None], pyramid)
        return preprocess(picture, size=vision.image_size)[None], pyramid, len(regions)

    def _visual_tokens(self, image: ImageLike, masks: Masks) -> tuple[network.VisualTokens, int]:
        pixels, pyramid, count = self._inputs(image, masks)
        return _visual_tokens(self.model, self.params, pixels, pyramid), count

    def _expand(self, text: str, *, regions: int) -> list[int]:
        """Ids of a prompt with the image's places; it has to name one image and so many regions."""
        ids = self.tokenize(text)
        for name, token, expected in (
            (IMAGE_TOKEN, IMAGE_TOKEN_ID, 1),
            (MASK_TOKEN, self.tokenizer.mask_id, regions),
            (POSITION_TOKEN, self.tokenizer.position_id, regions),
        ):
            if (count := ids.count(token)) != expected:
                raise ValueError(
                    f"the prompt must hold {name} {expected} times, it does so {count} times: {text!r}"
                )
        region = (self.tokenizer.mask_id, self.tokenizer.position_id)
        if list(itertools.pairwise(ids)).count(region) != regions:
            raise ValueError(
                f"each {MASK_TOKEN} of a prompt must be followed by its {POSITION_TOKEN}: {text!r}"
            )
        place = ids.index(IMAGE_TOKEN_ID)
        return ids[:place] + [IMAGE_TOKEN_ID] * self.config.vision.num_image_tokens + ids[place + 1 :]

    def _answers(
        self,
        tokens: network.VisualTokens,
        prefix: list[int],
        rest: list[int],
        regions: Iterable[int],
        settings: Decoding,
    ) -> Iterator[Generation]:
        """Decodes an answer for each of `regions`, all behind one prefix."""
        room = max(_SUFFIX_STEP, 1 << (settings.limit - 1).bit_length())
        first, second = self._padded(prefix, _LENGTH_STEP), self._padded(rest, _SUFFIX_STEP)
        shared = prefill(self.model, self.params, first, np.int32(len(prefix)), tokens)
        for region in regions:
            out = answer(
                self.model,
                self.params,
                shared,
                second,
                np.int32(len(rest)),
                tokens,
                region=np.int32(region),
                sampler=settings.sampler,
                key=jax.random.fold_in(jax.random.key(settings.seed), region),
                limit=np.int32(settings.limit),
                eos_id=np.int32(self.tokenizer.eos_id),
                room=room,
            )
            length = int(out.length)
            ids = np.asarray(out.token_ids)[:length].tolist()
            text = self.tokenizer.decode(ids)
            yield Generation(text, ids, np.asarray(out.logprobs)[:length].tolist())

    def _padded(self, ids: list[int], step: int) -> np.ndarray:
        padded = np.full((1, -(-len(ids) // step) * step), self.tokenizer.pad_id, np.int32)
        padded[0, : len(ids)] = ids
        return padded


@partial(jax.jit, static_argnames="model")
def _visual_tokens(
    model: network.Osprey, params: Params, images: Array, masks: MaskPyramid
) -> network.VisualTokens:
    features = network.apply(model, params, network.Osprey.features, images)
    return network.apply(model, params, network.Osprey.visual_tokens, features, masks)


@partial(jax.jit, static_argnames="model")
def _logits(
    model: network.Osprey, params: Params, images: Array, masks: MaskPyramid, input_ids: Array
) -> Array:
    return network.apply(model, params, network.Osprey.__call__, images, masks, input_ids)


def request(
    level: Level = "short",
    *,
    question: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Request:
    """Checks what `Osprey.describe` is asked, and takes its options; raises ValueError as it does."""
    if level not in tuple(ANSWER_TOKENS):
        raise ValueError(f"level must be 'short' or 'detailed', got {level!r}")
    protocol = PROTOCOLS[f"demo_{level}"]
    if question is None:
        prompt, keep, limit = protocol.prompt(), protocol.keep, ANSWER_TOKENS[level]
    else:
        prompt, keep, limit = protocol.prompt(_checked_question(question)), str, CHAT_TOKENS
    limit = limit if max_new_tokens is None else max_new_tokens
    return Request(prompt, keep, decoding(limit, temperature=temperature, top_p=top_p, seed=seed))


def decoding(max_new_tokens: int, *, temperature: float, top_p: float, seed: int) -> Decoding:
    """Checks the options of decoding; raises ValueError that names the one that is wrong."""
    limit, number = _integer("max_new_tokens", max_new_tokens), _integer("seed", seed)
    if limit < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {limit}")
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"seed must have at most 64 bits, got {number}")
    if not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number of at least 0, got {temperature!r}")
    if not isinstance(top_p, Real) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must be a number in (0, 1], got {top_p!r}")
    if temperature == 0:
        return Decoding(Greedy(), limit, number)
    sampler = TopP(temperature=np.asarray(temperature, np.float32), top_p=np.asarray(top_p, np.float32))
    return Decoding(sampler, limit, number)


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def _checked_question(question: str) -> str:
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


def _said(messages: Sequence[Mapping[str, str]]) -> list[str]:
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
