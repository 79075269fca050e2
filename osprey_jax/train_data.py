"""The data of a training: sources by name, a tokenizer, and loaders of what is trained on and what isn't."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from data_pipelines import catalog
from data_pipelines.pipeline import Loader, make_loader
from data_pipelines.records import Source
from data_pipelines.shapes.source import Shapes
from data_pipelines.shapes.tokenizer import train_tokenizer
from osprey_jax.config import OspreyConfig
from osprey_jax.prompt import SYSTEM_INFERENCE, SYSTEM_TRAINING, Tokenizer

SYSTEMS = {"training": SYSTEM_TRAINING, "inference": SYSTEM_INFERENCE}


class HeldOut(NamedTuple):
    """A source that isn't trained on, and its first batches as training would have them."""

    name: str
    """As the configuration has it."""
    source: Source
    loader: Loader


class Data(NamedTuple):
    """The data of a run."""

    training: Loader
    held_out: tuple[HeldOut, ...]
    tokenizer: Tokenizer
    steps: int


def make_data(
    config: ConfigDict,
    model_config: OspreyConfig,
    origin: Path | None = None,
    *,
    report: Callable[[str], None] = print,
) -> Data:
    """Sources, tokenizer and loaders; raises ValueError for what isn't there or doesn't fit the model.

    `origin` has the tokenizer where the configuration names none; `report` is told what sources leave out.
    """
    settings = config.data
    if unknown := [name for name in settings.systems if name not in SYSTEMS]:
        raise ValueError(
            f"config.data.systems names {', '.join(unknown)}; there is {', '.join(SYSTEMS)} in this version"
        )
    if shared := {*settings.sources} & {*settings.held_out} - {"shapes"}:
        raise ValueError(f"config.data.held_out names what is trained on: {', '.join(sorted(shared))}")
    if len({*settings.held_out}) < len(settings.held_out):
        raise ValueError(f"config.data.held_out names a source twice: {', '.join(settings.held_out)}")
    if lacking := catalog.missing([*settings.sources, *settings.held_out], settings.root):
        listed = "".join(f"\n- {line}" for line in lacking)
        raise ValueError(f"data is missing under config.data.root, which is {settings.root!r}:{listed}")
    if directory := settings.tokenizer or origin:
        tokenizer = Tokenizer.load(directory)
    else:
        with tempfile.TemporaryDirectory() as directory:
            train_tokenizer(directory)
            tokenizer = Tokenizer.load(directory)

    def source(name: str, split: str) -> Source:
        if name == "shapes":
            return Shapes(size=config.model.vision.image_size, split=split)
        return catalog.open_from_root(name, settings.root)

    def loader(sources: Sequence[Source], **options: Any) -> Loader:
        for each in sources:
            if each.dropped:
                reasons = ", ".join(f"{count} {reason}" for reason, count in each.dropped.items())
                report(f"{each.name}: {len(each)} samples; left out are {reasons}")
        return make_loader(
            sources,
            tokenizer,
            model_config,
            batch_size=config.batch_size,
            buckets=settings.buckets,
            seed=config.seed,
            share_image=settings.share_image,
            images_per_row=settings.images_per_row,
            systems=[SYSTEMS[name] for name in settings.systems],
            loss_per=settings.loss_per,
            tolerance=settings.tolerance,
            host=jax.process_index(),
            num_hosts=jax.process_count(),
            **options,
        )

    ends = {"num_steps": config.steps} if config.steps else {"epochs": config.epochs}
    ahead = {key: settings[key] for key in ("workers", "threads", "prefetch")}
    sources = [source(name, "train") for name in settings.sources]
    training = loader(sources, weights=settings.weights or None, **ends, **ahead)
    assert training.num_steps is not None
    held_out = tuple(
        HeldOut(name, one, loader([one], num_steps=config.eval_batches, threads=1, prefetch=1))
        for name, one in ((name, source(name, "held_out")) for name in settings.held_out)
    )
    return Data(training, held_out, tokenizer, training.num_steps)
