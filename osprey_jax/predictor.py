"""`Osprey`: an image, region masks and a question in; words about each region out."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from osprey_jax import checkpoint, engine, segments
from osprey_jax.compilation_cache import use_compilation_cache
from osprey_jax.config import OspreyConfig
from osprey_jax.engine import Asked, Prepared
from osprey_jax.generate import logits, mask_tokens
from osprey_jax.image import ImageLike, load_image, preprocess
from osprey_jax.masks import MaskPyramid, as_masks, mask_pyramid
from osprey_jax.models import osprey as architecture
from osprey_jax.prompt import (
    IMAGE_TOKEN,
    MASK_TOKEN,
    OVERVIEW,
    POSITION_TOKEN,
    PROTOCOLS,
    SYSTEM_INFERENCE,
    Tokenizer,
    conversation,
    region_list,
)
from osprey_jax.prompt_ids import PromptIds
from osprey_jax.recognize import Recognition, recognize
from osprey_jax.request import (
    CHAT_TOKENS,
    Decoding,
    Level,
    Request,
    checked_question,
    decoding,
    request,
    said,
)
from osprey_jax.sam.everything import Options
from osprey_jax.sam.predictor import Sam
from osprey_jax.segments import Segment, Segments
from osprey_jax.sharding import GENERATION_RULES, param_shardings
from osprey_jax.typing import ArrayLike, Float, Params
from osprey_jax.vocabulary import Vocabulary

Masks = ArrayLike | Iterable[ArrayLike]
"""`(R, h, w)`: an array or an iterable of `(h, w)` arrays, bool, 0/1 or 0/255, at the image's own size."""


class Generation(NamedTuple):
    """An answer; `token_ids` ends with `</s>` unless the limit cut it off."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    """Of each token: natural logarithm of the model's probability, before temperature and top-p."""


class Osprey:
    """A model with its tokenizer, ready to answer.

    Methods take an image (a path, a Pillow image or an `(h, w, 3)` uint8 array) and `masks` (see `Masks`) of
    at least one region, which may be empty. They raise ValueError (FileNotFoundError for a path that isn't
    there) that says which of them is wrong and how. Answers are greedy unless `temperature` is above 0; then
    they depend on `seed` and the region's number alone.
    """

    def __init__(
        self,
        config: OspreyConfig,
        params: Params,
        tokenizer: Tokenizer,
        *,
        dtype: str = "float32",
        quantization: str | None = None,
        mesh: Mesh | None = None,
    ):
        """`params` as `models.osprey.init_params` makes them; `dtype` is what is computed in.

        `quantization` names the scheme of quantised `params` (`quantize.SCHEMES`). With a `mesh`
        (`sharding.make_mesh`) parameters and work are split over its devices.
        """
        ids = (tokenizer.mask_id, tokenizer.position_id)
        if ids != (config.mask_token_id, config.position_token_id):
            raise ValueError(
                f"the tokenizer has {MASK_TOKEN} and {POSITION_TOKEN} at {ids}, the model's config at "
                f"{(config.mask_token_id, config.position_token_id)}"
            )
        # The caller's own tree keeps its stacks.
        params = unstacked(jax.tree.map(lambda leaf: leaf, params))
        how: dict[str, Any] = {
            "scan_layers": False,
            "scan_blocks": not _blocks_apart(),
            "quantization": quantization,
        }
        places = None
        if mesh is not None:
            places = param_shardings(architecture.boxed_params(config, **how), mesh, GENERATION_RULES)
        params = jax.device_put(params, places)
        self.config, self.tokenizer = config, tokenizer
        self._ids = PromptIds(tokenizer, config.vision.num_image_tokens)
        self.network = engine.Network(architecture.Osprey(config, jnp.dtype(dtype), **how), params, mesh)

    @classmethod
    def load(
        cls,
        directory: Path | str,
        dtype: str | None = None,
        *,
        quantize: str | None = None,
        mesh: Mesh | None = None,
    ) -> "Osprey":
        """Loads a checkpoint made by `convert_torch_ckpt.py` or by training.

        What is compiled from then on is kept for other processes: see `compilation_cache`.

        Args:
          directory: the checkpoint.
          dtype: "float32" or "bfloat16", of parameters and arithmetic; the extractor is float32 in both. By
            default bfloat16 on accelerators and float32 on CPU.
          quantize: low precision of the decoder's matrices: "int8" (weights), "int8_dynamic" (weights and
            activations) or "int4" (weights, in groups); they are quantised while they are read. A quantised
            checkpoint needs no such choice.
          mesh: devices to split parameters and work over (`sharding.make_mesh`): rows of a batch over `data`,
            heads and widths over `fsdp` and `tensor`. Each reads its own part of the parameters.
        """
        use_compilation_cache()
        if dtype is None:
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
        config = checkpoint.load_config(directory)
        tokenizer = Tokenizer.load(directory)
        quantization = checkpoint.load_quantization(directory, quantize)
        wanted, originals = (engine.placed_params(config, dtype, name, mesh) for name in (quantization, None))
        unquantized = None if quantization is None else originals
        params = unstacked(checkpoint.load_params(directory, wanted, unquantized=unquantized))
        return cls(config, params, tokenizer, dtype=dtype, quantization=quantization, mesh=mesh)

    @property
    def params(self) -> Params:
        """The parameters, each layer of the decoder apart, and on CPU each block of the tower."""
        return self.network.params

    def prepare(self, image: ImageLike, masks: Masks) -> Prepared:
        """An image and its regions as the network takes them: NumPy alone, fit for threads."""
        picture = load_image(image)
        regions = as_masks(masks, picture.shape[:2])
        vision, size = self.config.vision, self.config.extractor.position_size
        pyramid = mask_pyramid(regions, level_sizes=vision.level_sizes, position_size=size)
        return Prepared(preprocess(picture, size=vision.image_size), pyramid)

    def describe(
        self,
        image: ImageLike,
        masks: Masks,
        level: Level = "short",
        *,
        question: str | Sequence[str] | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> list[str]:
        """Says in words what each region is, one text per mask.

        Args:
          image: the picture.
          masks: the regions.
          level: "short" or "detailed": the original demo's question, and the part of its answer that is kept.
          question: asked instead, with `<region>` where the region is meant; the answer is given whole.
            A list has one for each region.
          max_new_tokens: limit of an answer; by default `request.ANSWER_TOKENS` or `CHAT_TOKENS`.
          temperature: 0 for greedy answers.
          top_p: sampling is from the likeliest tokens that reach this probability.
          seed: of sampling.
          stop: texts before which an answer ends.
        """
        asked = request(
            level,
            question=question,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
        )
        return list(self.describe_each(image, masks, asked))

    def describe_each(self, image: ImageLike, masks: Masks, asked: Request) -> Iterator[str]:
        """`describe`, each text as soon as it is there: for the command's progress bar."""
        for generation in self._generate(self.prepare(image, masks), asked):
            yield asked.keep(generation.text)

    def describe_many(
        self,
        items: Iterable[tuple[ImageLike, Masks]],
        level: Level = "short",
        *,
        question: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Iterator[list[str]]:
        """`describe` of many images with their masks: yields one list for each, in their order.

        Regions of several images are answered together (`engine.WINDOW_IMAGES`); a thread takes the next
        ones from `items`. What is wrong with an item, or raised by `items`, is raised when those before it
        have been yielded; the message of a wrong item has its number, from 0.
        """
        if isinstance(question, list | tuple):
            raise ValueError("describe_many asks one question of all regions, got a list of them")
        asked = request(
            level,
            question=question,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
        )

        def many() -> Iterator[list[str]]:
            for window in engine.windows(self._numbered(items)):
                for generations in self.answer(window, asked):
                    yield [asked.keep(generation.text) for generation in generations]

        return many()

    def _numbered(self, items: Iterable[tuple[ImageLike, Masks]]) -> Iterator[Prepared]:
        for number, item in enumerate(items):
            try:
                image, masks = item
            except (TypeError, ValueError):
                raise ValueError(f"item {number} must be an image and its masks, got {item!r:.80}") from None
            try:
                yield self.prepare(image, masks)
            except (ValueError, OSError) as error:
                raise type(error)(f"item {number}: {error}") from error

    def describe_point(
        self, sam: Sam, image: ImageLike, point: Sequence[float], level: Level = "short", **how: Any
    ) -> Segment:
        """Says what is at a point: the mask that SAM finds there, and words about it.

        `point` is x and y in pixels of the image; `level` and `how` (question, max_new_tokens, …) are those
        of `describe`.
        """
        return self._describe_one(segments.at_points(sam, image, [point]), request(level, **how))

    def describe_box(
        self, sam: Sam, image: ImageLike, box: Sequence[float], level: Level = "short", **how: Any
    ) -> Segment:
        """`describe_point` with a box around what is meant: x0, y0, x1 and y1 in pixels of the image."""
        return self._describe_one(segments.in_boxes(sam, image, [box]), request(level, **how))

    def describe_everything(
        self,
        sam: Sam,
        image: ImageLike,
        level: Level = "short",
        *,
        options: Options | None = None,
        **how: Any,
    ) -> list[Segment]:
        """Finds everything in an image and says what it is; what lies inside of something else says so.

        `options` are those of SAM's automatic mask generator, by default the original's. Candidates are
        judged on masks at most `segments.MAX_HEIGHT` high, as in the original's demo.
        """
        found = segments.everything(sam, image, options or Options())
        return list(self.describe_segments(found, request(level, **how)))

    def _describe_one(self, found: Segments, asked: Request) -> Segment:
        [segment] = self.describe_segments(found, asked)
        return segment

    def describe_segments(self, found: Segments, asked: Request) -> Iterator[Segment]:
        """Says what each segment is, as soon as its words are there; masks don't leave the device."""
        if not found.segments:
            return
        vision, size = self.config.vision, self.config.extractor.position_size
        masks = found.pyramid(level_sizes=vision.level_sizes, position_size=size)
        if self.network.mesh is not None:  # which SAM's one device isn't
            masks = jax.device_get(masks)
        prepared = Prepared(preprocess(found.image, size=vision.image_size), masks, len(found.segments))
        generations = self._generate(prepared, asked)
        for segment, generation in zip(found.segments, generations, strict=True):
            yield segment._replace(text=asked.keep(generation.text))

    def answer(self, prepared: Sequence[Prepared], asked: Request) -> list[list[Generation]]:
        """Answers about the regions of some images at once; batches are formed among these images alone."""
        rules, stop = self._rules(asked.decoding), asked.decoding.stop
        jobs = [self._ids.asked(one, asked.prompts) for one in prepared]
        answers = engine.answer(self.network, jobs, rules)
        return [[self._generation(one, stop) for one in regions] for regions in answers]

    def generate(
        self,
        image: ImageLike,
        masks: Masks,
        prompt: str | Sequence[str],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> list[Generation]:
        """Answers a complete prompt, template included, once for each mask; or a prompt of its own for each.

        A prompt holds one `<image>` and, behind it, one `<mask><pos>`, which stands for the region. Prompts
        of one image must be equal up to the image's end; as far as they are equal, they are computed once.
        """
        how = decoding(max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
        prompts = tuple(prompt) if isinstance(prompt, list | tuple) else (prompt,)
        return list(self._generate(self.prepare(image, masks), Request(prompts, str, how)))

    def _generate(self, prepared: Prepared, asked: Request) -> Iterator[Generation]:
        job, rules = self._ids.asked(prepared, asked.prompts), self._rules(asked.decoding)
        for one in engine.stream(self.network, job, rules):
            yield self._generation(one, asked.decoding.stop)

    def classify(
        self,
        image: ImageLike,
        masks: Masks,
        labels: Sequence[str] | Vocabulary,
        *,
        question: str | None = None,
        threshold: float = 0.0,
        min_logprob: float = -math.inf,
    ) -> list[Recognition]:
        """Chooses one of `labels` for each region; a `Vocabulary` has been prepared for many images.

        `threshold` and `min_logprob` bound what `Recognition` has; below them a region gets no label. Where
        a region may be none of the labels, `min_logprob` is what tells. The question, unless given, is that
        of the original's LVIS evaluation; labels should be spelt as the model answers it.
        """
        known = labels if isinstance(labels, Vocabulary) else Vocabulary(labels, self.tokenizer)
        limits = {"threshold": threshold, "min_logprob": min_logprob}
        [found] = self.recognize([self.prepare(image, masks)], known, question=question, **limits)
        return found

    def recognize(
        self, prepared: Sequence[Prepared], labels: Vocabulary, *, question: str | None, **limits: float
    ) -> list[list[Recognition]]:
        """`classify`, with its `limits`, of some images; batches are formed among these images alone."""
        prompt = PROTOCOLS["lvis_paco"].prompt(None if question is None else checked_question(question))
        return recognize(
            self.network, [self._ids.asked(one, (prompt,)) for one in prepared], labels, **limits
        )

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
        stop: str | Sequence[str] = (),
    ) -> str:
        """The next answer of a conversation about all regions, which its messages call region1, region2, ….

        `messages` alternate {"role": "user", "content": …} and {"role": "assistant", "content": …}, first and
        last the user's. As in the conversation data, `<` and `>` are taken out of what they say.
        """
        how = decoding(max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
        texts, prepared = said(messages), self.prepare(image, masks)
        texts[0] = f"{IMAGE_TOKEN}\n{OVERVIEW}{region_list(prepared.regions)}{texts[0]}"
        turns = list(zip(texts[::2], [*texts[1::2], None], strict=True))
        return self.complete(prepared, conversation(turns, system=SYSTEM_INFERENCE), how)

    def complete(self, prepared: Prepared, prompt: str, how: Decoding) -> str:
        """One answer to a complete prompt that names all of an image's regions, or none, in their order."""
        ids = self._ids.expand(prompt, regions=prepared.regions)
        job = Asked(prepared, ids[:-1], [ids[-1:]], in_prefix=True)
        [answer] = engine.stream(self.network, job, self._rules(how))
        return self._generation(answer, how.stop).text

    def logits(self, image: ImageLike, masks: Masks, prompt: str) -> Float[np.ndarray, "T V"]:
        """Float32 next-token logits over the whole sequence; the image takes `num_image_tokens` places of it.

        `prompt` holds one `<image>` and one `<mask><pos>` for each mask, in the masks' order.
        """
        prepared = self.prepare(image, masks)
        ids = self._ids.expand(prompt, regions=prepared.regions)
        # Padding is on the right, so causality alone keeps it out.
        padded, _ = engine.padded([ids], engine.PREFIX_STEP, self.tokenizer.pad_id)
        found = self.network.run(logits, *_batch_of_one(prepared), padded)
        return np.asarray(found[0, : len(ids)])

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids of a prompt, BOS first, -200 for `<image>`."""
        return self._ids.tokenize(prompt)

    def embed(self, image: ImageLike, masks: Masks) -> Float[np.ndarray, "R D"]:
        """Float32 mask tokens, one for each region: for retrieval and deduplication."""
        prepared = self.prepare(image, masks)
        tokens = self.network.run(mask_tokens, *_batch_of_one(prepared))
        return np.asarray(tokens[0, : prepared.regions])

    def _rules(self, how: Decoding) -> engine.Rules:
        def kept(ids: list[int]) -> int | None:
            def stopped(size: int) -> bool:
                text = self.tokenizer.decode(ids[:size])
                return any(stop in text for stop in how.stop)

            return next(filter(stopped, range(1, len(ids) + 1))) if stopped(len(ids)) else None

        return engine.Rules(
            sampler=how.sampler,
            limit=how.limit,
            seed=how.seed,
            eos_id=self.tokenizer.eos_id,
            pad_id=self.tokenizer.pad_id,
            stop=kept if how.stop else None,
        )

    def _generation(self, answer: engine.Answer, stop: tuple[str, ...]) -> Generation:
        text = self.tokenizer.decode(answer.token_ids)
        end = min((place for place in map(text.find, stop) if place >= 0), default=None)
        return Generation(text[:end], answer.token_ids, answer.logprobs)


def _blocks_apart() -> bool:
    """Whether the tower's blocks are: elsewhere than on CPU they would compile longer for little."""
    return jax.default_backend() == "cpu"


def unstacked(params: Params) -> Params:
    """The parameters as generation takes them here, whose stacks are taken out of `params`."""
    return architecture.unstack_params(params, blocks=_blocks_apart())


def _batch_of_one(prepared: Prepared) -> tuple[np.ndarray, MaskPyramid]:
    """An image and its regions, these padded to a power of two, with a batch axis."""
    count = 1 << (prepared.regions - 1).bit_length()
    return prepared.pixels[None], engine.stacked([prepared.masks], 0, count)
