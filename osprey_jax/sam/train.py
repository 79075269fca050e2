"""Trains a promptable segmenter from nothing, or from wherever an earlier start got to."""

import contextlib
import dataclasses
import json
import os
import time
import zipfile
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from osprey_jax.sam.config import SamConfig
from osprey_jax.sam.prompts import Examples, draw
from osprey_jax.sam.training import Settings, State, make_state, make_update
from osprey_jax.typing import Params

Scene = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""From a number to an image `(h, w, 3)` uint8 and masks `(R, h, w)` bool of what is in it."""

SAVE_SECONDS = 30.0
"""Between saves: what a crash costs, at most."""
SMOOTHING = 20
"""Steps that the numbers shown are the mean of, about."""


def train(
    config: SamConfig,
    settings: Settings,
    scene: Scene,
    saved: Path,
    *,
    stopped: Callable[[], str | None] = lambda: None,
) -> tuple[int, Params]:
    """Trains until the last step, or until `stopped` gives a reason to stop; returns steps and parameters.

    Step n sees the scenes from n times the batch size on, so that a training that goes on is the one that
    wasn't interrupted.

    Args:
      config: whose encoder's input has the scenes' size.
      settings: which are those of the start before, if there was one.
      scene: the data.
      saved: the file that the state is kept in.
      stopped: asked before each step.

    Raises ValueError where the scenes have another size, or `saved` is damaged or of other settings; OSError
    where it can't be written.
    """
    side, shape = config.encoder.image_size, scene(0)[0].shape
    if shape != (side, side, 3):
        raise ValueError(f"scenes must be ({side}, {side}, 3), as the encoder's input, got {shape}")
    state = make_state(config, settings)
    description = json.dumps({"config": config.to_dict(), "settings": dataclasses.asdict(settings)})
    if saved.exists():
        state = restore(saved, state, description)
    step, update = int(state.step), make_update(config, settings)

    def save() -> None:
        store(saved, state, description)

    with (
        contextlib.closing(ahead(lambda n: examples(scene, settings, n), step, settings.steps)) as batches,
        tqdm(total=settings.steps, initial=step, unit="step", desc="training", smoothing=0.05) as progress,
    ):
        usual: dict[str, float] = {}
        last = time.monotonic()
        while step < settings.steps and not stopped():
            state, numbers = update(state, next(batches))
            for name, value in jax.device_get(numbers).items():
                usual[name] = usual.get(name, float(value)) * (1 - 1 / SMOOTHING) + float(value) / SMOOTHING
            if not np.isfinite(usual["loss"]):
                raise ArithmeticError(f"step {step + 1}: the loss is {usual['loss']}")
            step += 1
            progress.set_postfix(
                loss=f"{usual['loss']:.3f}",
                click=f"{usual['click']:.3f}",
                box=f"{usual['box']:.3f}",
                refresh=False,
            )
            progress.update()
            if time.monotonic() - last > SAVE_SECONDS:
                save()
                last = time.monotonic()
    save()
    return step, state.params


def examples(scene: Scene, settings: Settings, step: int) -> Examples:
    """The batch of a step, which follows from the step and the seed."""
    first = step * settings.batch_size
    scenes = [scene(number) for number in range(first, first + settings.batch_size)]
    rng = np.random.default_rng([settings.seed, step])
    return draw(scenes, rng, mix=settings.mix, max_regions=settings.max_regions)


def ahead(make: Callable[[int], Examples], start: int, stop: int) -> Generator[Examples]:
    """The batches of some steps; a thread makes the next one while one is used."""
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(make, start) if start < stop else None
        for number in range(start + 1, stop + 1):
            assert waiting is not None, "there is one for each number"
            made = waiting.result()
            waiting = thread.submit(make, number) if number < stop else None
            yield made


def store(path: Path, state: State, description: str) -> None:
    """Writes a state to a file that is complete or isn't there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.incomplete")
    arrays: dict[str, Any] = {str(n): np.asarray(leaf) for n, leaf in enumerate(jax.tree.leaves(state))}
    arrays["description"] = np.array(description)
    with partial.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def restore(path: Path, like: State, description: str) -> State:
    """The inverse of `store`, for a state `like` it. Raises ValueError that names the file and its fault."""
    leaves, tree = jax.tree.flatten(like)
    try:
        # Opened here, as NumPy leaves a damaged file open.
        with path.open("rb") as opened, np.load(opened) as file:
            found = str(file["description"])
            if found == description:
                leaves = [jnp.asarray(file[str(number)]) for number in range(len(leaves))]
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged, delete it to begin anew: {error}") from None
    if found != description:
        raise ValueError(f"{path} is of a training with other settings; delete it to begin anew")
    return jax.tree.unflatten(tree, leaves)
