"""What a model in training makes of data that it isn't trained on: losses, exact matches and pictures."""

import contextlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from data_pipelines.shapes import Shapes
from osprey_jax import answers, predictor, sharding
from osprey_jax.batch import Batch, to_device
from osprey_jax.lora import merge_adapters
from osprey_jax.models.osprey import Osprey, boxed_params
from osprey_jax.optim import TrainState
from osprey_jax.train_data import Data
from osprey_jax.train_step import make_loss_sums
from osprey_jax.typing import Array, Params

REGIONS = 64
"""Regions of `shapes` that are described at least."""


class Evaluation(NamedTuple):
    """Numbers and pictures by the names that TensorBoard shows."""

    numbers: dict[str, float]
    """`held_out_loss`; of several sources also each one's, `held_out_loss/NAME`; of shapes `exact_match`."""
    pictures: dict[str, Image.Image]
    """`held_out/NAME`, a sheet of samples of each source about which anything can be asked."""


class Evaluator:
    """Evaluates the states of one run, each on the same samples; a state is only read.

    Words need a copy of the parameters in the dtype that is computed in, which is there while they are made.
    They are left out of runs of several processes and on meshes over which the decoder's heads, widths or
    vocabulary don't divide as generation wants it (`sharding.GENERATION_RULES`).
    """

    def __init__(
        self, model: Osprey, data: Data, mesh: Mesh, config: ConfigDict, *, report: Callable[[str], None]
    ):
        """Reads the held-out batches, `config.eval_batches` of each source, and keeps them.

        `report` is told why there are no words where there are none. Raises FailingSamples.
        """
        self._model_config, self._tokenizer, self._lora = model.config, data.tokenizer, model.lora
        self._dtype, self._mesh, self._samples = config.dtype, mesh, config.eval_samples
        self._sums = jax.jit(make_loss_sums(model))
        names = tags([each.name for each in data.held_out])
        self._batches: dict[str, list[Batch]] = {}
        for name, each in zip(names, data.held_out, strict=True):
            with contextlib.closing(each.loader):
                self._batches[name] = [batch for batch, _ in each.loader]
        self._scenes: dict[str, Shapes] = {}
        self._questions: dict[str, list[answers.Asked]] = {}
        if not self._samples:
            return
        if reason := _why_no_words(model, mesh):
            report(f"evaluation: losses alone, for {reason}")
            return
        for name, each in zip(names, data.held_out, strict=True):
            if isinstance(each.source, Shapes):
                self._scenes[name] = each.source
            else:
                self._questions[name] = answers.some_questions(model.config, each.source, count=self._samples)

    def __call__(self, state: TrainState) -> Evaluation:
        """The numbers of this state, and what it says."""
        found = Evaluation(self._losses(state), {})
        if self._scenes or any(self._questions.values()):
            # A new thread is in no `use_mesh`, so its programs are those of every other use of the model.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(self._add_words, state, found).result()
        return found

    def _add_words(self, state: TrainState, found: Evaluation) -> None:
        osprey = self._osprey(state)
        for name, source in self._scenes.items():
            described = list(answers.describe_scenes(osprey, source, regions=REGIONS))
            found.numbers["exact_match"] = answers.exact_match(described)
            found.pictures[f"held_out/{name}"] = answers.draw_scenes(described[: self._samples])
        for name, questions in self._questions.items():
            if questions:
                answered = [(asked, answers.answer(osprey, asked)) for asked in questions]
                found.pictures[f"held_out/{name}"] = answers.draw_answers(answered)

    def _losses(self, state: TrainState) -> dict[str, float]:
        """Sums over batches are divided once, so that the whole is the mean over all there is."""
        sums = {
            name: [self._sums(state.trained, state.frozen, to_device(batch, self._mesh)) for batch in batches]
            for name, batches in self._batches.items()
        }
        found = {"held_out_loss": _mean([pair for pairs in sums.values() for pair in pairs])}
        if len(sums) > 1:
            found |= {f"held_out_loss/{name}": _mean(pairs) for name, pairs in sums.items()}
        return {name: value.item() for name, value in jax.device_get(found).items()}

    def _osprey(self, state: TrainState) -> predictor.Osprey:
        params = (
            state.params
            if self._lora is None
            else merge_adapters(state.params, self._lora, dtype=self._dtype)
        )
        params, mesh = _generation_params(params, dtype=self._dtype), None
        if self._mesh.size > 1:
            mesh = self._mesh
        else:
            params = jax.device_put(params, self._mesh.devices.item())
        return predictor.Osprey(self._model_config, params, self._tokenizer, dtype=self._dtype, mesh=mesh)


def tags(names: Sequence[str]) -> list[str]:
    """A part of a TensorBoard tag for each source, whose name may be a path; no two are the same."""
    found: list[str] = []
    for name in names:
        tag = re.sub(r"[^\w.-]+", "_", name).strip("_")
        while tag in found:
            tag += "_"
        found.append(tag)
    return found


def _mean(sums: Sequence[tuple[Array, Array]]) -> Array:
    totals, weights = zip(*sums, strict=True)
    return sum(totals) / sum(weights)


@partial(jax.jit, static_argnames="dtype")
def _generation_params(params: Params, *, dtype: str) -> Params:
    """The parameters as generation takes them, of one dtype but for the extractor, as `Osprey.load` does it.

    Casts and unstacks in one program, so that no third copy is there in between.
    """
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), dict(params))
    cast["extractor"] = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params["extractor"])
    return predictor.unstacked(cast)


def _why_no_words(model: Osprey, mesh: Mesh) -> str | None:
    """What keeps words from being generated on this mesh, if anything."""
    if jax.process_count() > 1:
        return "words are generated by a single process"
    if mesh.size > 1:
        try:
            sharding.param_shardings(boxed_params(model.config), mesh, sharding.GENERATION_RULES)
        except ValueError as error:
            return f"words can't be generated on this mesh: {error}"
    return None
