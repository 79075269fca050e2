"""Two updates on every mesh of eight devices: what one device computes, with nothing gathered that is split."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from osprey_jax import sharding, train_config, train_step
from osprey_jax.batch import Batch, to_device
from osprey_jax.checkpoint import flatten
from osprey_jax.config import from_config
from osprey_jax.masks import MaskPyramid
from osprey_jax.models.osprey import Osprey, boxed_params
from osprey_jax.optim import AdamW, TrainState
from osprey_jax.prompt import IGNORE_LABEL, IMAGE_TOKEN_ID
from tests.train.runs import Command

# ml_collections loads a config file by a method that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

DEVICES, ROWS, LENGTH, REGIONS = 8, 8, 24, 3
SHAPES = [
    (data, fsdp, DEVICES // data // fsdp)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if DEVICES % (data * fsdp) == 0
]
SIZES = {
    "model__vision__image_size": 32,
    "model__vision__dims": (8, 8, 8, 8),
    "model__decoder__vocab_size": 64,
    "model__decoder__num_heads": 8,
    "model__decoder__num_kv_heads": 8,
    "model__decoder__head_dim": 4,
    "model__mask_token_id": 64,
    "model__position_token_id": 65,
    "remat": "full",
    "batch_size": ROWS,
}
"""Every split axis divides by eight."""
QUICKLY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Compiling takes longer than running here."""


def configuration(command: Command, shape: tuple[int, int, int]) -> ConfigDict:
    mesh = {f"mesh__{axis}": size for axis, size in zip(sharding.MESH_AXES, shape, strict=True)}
    config, *_ = train_config.parse(command(Path("unused"), **SIZES, **mesh))
    return config


def batch() -> Batch:
    """Rows with an image, some regions, and labels at their ends, of different lengths."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 64, (ROWS, LENGTH)).astype(np.int32)
    ids[:, 1:5] = IMAGE_TOKEN_ID
    ids[:, [6, 9, 12]], ids[:, [7, 10, 13]] = 64, 65
    segments = (np.arange(LENGTH) < rng.integers(18, LENGTH + 1, (ROWS, 1))).astype(np.int32)
    labelled = (np.arange(LENGTH) > 14) & (segments > 0)
    return Batch(
        images=rng.normal(size=(ROWS, 1, 32, 32, 3)).astype(np.float32),
        masks=MaskPyramid(
            levels=tuple(rng.random((ROWS, 1, REGIONS, side, side)) < 0.5 for side in (8, 4, 2, 1)),
            position=rng.random((ROWS, 1, REGIONS, 16, 16)).astype(np.float32),
        ),
        input_ids=ids,
        labels=np.where(labelled, ids, IGNORE_LABEL).astype(np.int32),
        loss_weights=(labelled / labelled.sum(1, keepdims=True)).astype(np.float32),
        positions=np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape),
        segment_ids=segments,
        prefix_segment_ids=np.zeros_like(ids),
    )


def update_on(config: ConfigDict, devices: list[jax.Device]) -> tuple[TrainState, dict, str]:
    """The state after two updates, the numbers of the last, and the compiled program's text."""
    mesh = train_step.make_mesh(config, devices)
    model_config = from_config(config.model.to_dict())
    create, abstract = train_step.make_state(config, model_config, mesh)
    # Large steps, which differences of the gradients would show in.
    adamw = AdamW(peak_learning_rate=1e-2, warmup_steps=0, total_steps=9)
    model = Osprey(model_config, remat=config.remat)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    update = jax.jit(
        train_step.make_update(model, adamw, accumulation=1),
        out_shardings=(places, None),
        compiler_options=QUICKLY,
    )
    with sharding.use_mesh(mesh):
        state, on_devices = create(), to_device(batch(), mesh)
        compiled = update.lower(state, on_devices).compile()
        for _ in range(2):
            state, numbers = compiled(state, on_devices)
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    return state, numbers, compiled.as_text()


@pytest.fixture(scope="module")
def expected(command: Command) -> tuple[TrainState, dict, str]:
    return update_on(configuration(command, (1, 1, 1)), jax.devices()[:1])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_parameters_moments_and_numbers_equal_those_of_one_device(
    shape: tuple[int, int, int], expected: tuple, command: Command
) -> None:
    state, numbers, text = update_on(configuration(command, shape), jax.devices())
    for name, value in expected[1].items():
        assert float(numbers[name]) == pytest.approx(float(value), rel=1e-5), name
    for part in ("mu", "nu", "trained"):
        found, wanted = (flatten(getattr(each, part)) for each in (state, expected[0]))
        for path, leaf in wanted.items():
            # First moments are gradients; the update divides by their roots, and small ones have large errors.
            atol = 1e-5 * np.abs(leaf).max() if part != "trained" else 2e-4
            np.testing.assert_allclose(found[path], leaf, atol=atol, rtol=0, err_msg=f"{part} {path}")
    assert set(gathered(text)) <= set(whole_parameters(configuration(command, shape)))


def gathered(text: str) -> Iterator[int]:
    """Numbers of elements that all-gathers give, those of a few kilobytes left out."""
    for line in re.findall(r" = (.*?) all-gather(?:-start)?\(", text):
        for dims in re.findall(r"\[([\d,]*)\]", line):
            if (size := math.prod(int(size) for size in dims.split(",") if size)) > 128:
                yield size


def whole_parameters(config: ConfigDict) -> Iterator[int]:
    """Numbers of elements of each parameter, of stacked ones those of a layer."""
    boxed = flatten(jax.tree.map(lambda x: x, boxed_params(from_config(config.model.to_dict()))))
    for leaf in boxed.values():
        stacked = "layers" in leaf.names
        yield math.prod(leaf.value.shape[stacked:])
