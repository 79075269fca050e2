"""What a run learns, writes and leaves behind, on one device and on eight."""

import contextlib
import io
import json
import re
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from osprey_jax import Osprey, checkpoint, convert, train, train_config, train_data, train_step
from osprey_jax.batch import Batch
from osprey_jax.config import from_config
from tests.parity import bridge, reference, scenes
from tests.train.runs import (
    FEW,
    SMALL,
    STEPS,
    Command,
    Start,
    learned,
    leaves,
    newest,
    rows,
    steps,
    wait_until,
)

# ml_collections loads a config file by a method that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def test_it_learns_and_measures_what_it_was_not_trained_on(finished: tuple) -> None:
    found = rows(finished[0])
    assert np.mean([row["loss"] for row in found[-10:]]) < 0.6 * found[0]["loss"]
    held_out = {row["step"]: row["held_out_loss"] for row in found if "held_out_loss" in row}
    assert list(held_out) == [25, 50]
    assert held_out[50] < held_out[25] < found[0]["loss"]


def test_progress_in_a_log_is_lines_with_loss_rates_and_time_left(finished: tuple) -> None:
    pattern = r"step (\d+)/50 · loss \d+\.\d{4} · [\d,]+ tokens/s · [\d.]+ samples/s · \d+:\d\d:\d\d left"
    lines = [line for line in finished[2].splitlines() if line.startswith("step ")]
    assert [int(re.fullmatch(pattern, line)[1]) for line in lines] == list(range(10, STEPS + 1, 10))


def test_tensorboard_has_the_metrics_values(finished: tuple) -> None:
    scalars: dict[str, dict[int, float]] = {}
    (path,) = (finished[0] / "tensorboard").iterdir()
    data, place = path.read_bytes(), 0
    while place < len(data):  # records of a length, its checksum, an event, its checksum
        (length,) = struct.unpack_from("<Q", data, place)
        event = Event.FromString(data[place + 12 : place + 12 + length])
        place += 16 + length
        for value in event.summary.value:
            scalars.setdefault(value.tag, {})[event.step] = value.simple_value
    expected = {row["step"]: row["loss"] for row in rows(finished[0])}
    assert scalars["loss"] == {step: expected[step] for step in range(10, STEPS + 1, 10)}
    assert {"grad_norm", "learning_rate", "held_out_loss", "tokens_per_second"} <= scalars.keys()


def test_the_same_command_after_the_end_changes_nothing(
    finished: tuple, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, out, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    assert train.main(command(workdir)) == 0
    assert capsys.readouterr().out == out
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_the_exported_model_and_every_checkpoint_load(finished: tuple) -> None:
    workdir = finished[0]
    image, masks = scenes.picture(64, 64), scenes.region_masks(64, 64)[:2]
    names = ("export", "checkpoints/50", "checkpoints/45")
    exported, last, before = (Osprey.load(workdir / name).embed(image, masks) for name in names)
    np.testing.assert_array_equal(exported, last)
    assert not np.array_equal(exported, before)


def test_the_trained_model_has_the_same_logits_in_torch(finished: tuple, tmp_path: Path) -> None:
    export = finished[0] / "export"
    convert.to_torch(export, tmp_path / "torch")
    config = checkpoint.load_config(export)
    sizes = reference.ReferenceConfig(
        image_size=64, depths=config.vision.depths, dims=config.vision.dims, extractor_dim=16,
        position_size=16, vocab_size=512, dim=32, ffn_dim=32, num_layers=2, num_heads=2, num_kv_heads=2,
    )  # fmt: skip
    twin = reference.OspreyReference(sizes, seed=3)
    twin.load_release_state_dict(reference.read_shards(tmp_path / "torch"))
    ours = Osprey.load(export)
    image, masks = scenes.picture(64, 96), scenes.region_masks(64, 96)
    prompt = "<image>\nThis provides an overview of the picture. USER: " + "<mask><pos> and " * len(masks)
    found = ours.logits(image, masks, prompt)
    expected = twin.logits(image, masks, ours.tokenize(prompt)).numpy()
    assert bridge.largest_difference(found, expected) <= bridge.FORWARD


def test_losses_on_eight_devices_equal_those_on_one(
    finished: tuple, command: Command, start: Start, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    sizes = {"mesh__data": 0, "mesh__fsdp": 2, "mesh__tensor": 2, "accumulation": 2}
    process = start(command(workdir, **sizes), devices=8)
    wait_until(lambda: steps(workdir) >= 5, process)
    process.kill()
    _, err = process.communicate()
    assert "cpu devices {'data': 2, 'fsdp': 2, 'tensor': 2}" in err
    for row, other in zip(learned(workdir)[:5], learned(finished[0])[:5], strict=True):
        # Sums of another order differ by a few 1e-7 in a step, and each step builds on the ones before.
        assert row == pytest.approx(other, rel=2e-5)


def test_the_state_is_created_where_it_belongs(command: Command, tmp_path: Path) -> None:
    config, *_ = train_config.parse(command(tmp_path, mesh__data=2, mesh__fsdp=2, mesh__tensor=2))
    mesh = train_step.make_mesh(config)
    create, abstract = train_step.make_state(config, from_config(config.model.to_dict()), mesh)
    state = create()
    found, expected = (
        jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree) for tree in (state, abstract)
    )
    assert found == expected
    kernel = state.mu["decoder"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.shape == (2, 32, 32)
    assert kernel.addressable_shards[0].data.shape == (2, 16, 16)


class Poisoned:
    """A loader whose third batch has images that are none."""

    def __init__(self, loader: object):
        self._loader, self._place = loader, 0
        self.sample_ids: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def __next__(self) -> tuple[Batch, list[str]]:
        batch, sample_ids = next(self._loader)
        self._place += 1
        if self._place == 3:
            self.sample_ids = sample_ids
            batch = batch.replace(images=np.full_like(batch.images, np.nan))
        return batch, sample_ids


@pytest.fixture(scope="module")
def poisoned(
    command: Command, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Poisoned, int, str]:
    """A run of which little is trained, stopped by its third step: arguments, loader, exit status, stderr."""
    arguments = command(tmp_path_factory.mktemp("poisoned") / "run", **FEW, steps=9, checkpoint_every=1)
    loaders, make_data = [], train.make_data

    def make_poisoned(*args: object, **options: object) -> train_data.Data:
        data = make_data(*args, **options)
        loaders.append(Poisoned(data.training))
        return data._replace(training=loaders[0])

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as err:
        patch.setattr(train, "make_data", make_poisoned)
        status = train.main(arguments)
    return arguments, loaders[0], status, err.getvalue()


def test_a_loss_that_is_no_number_stops_with_the_samples_and_is_not_saved(poisoned: tuple) -> None:
    arguments, loader, status, err = poisoned
    assert status == 1
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: step 3: loss is nan and grad_norm is nan; samples of the batch: ")
    assert error.endswith(", ".join(loader.sample_ids))
    assert len(loader.sample_ids) == SMALL["batch_size"]
    workdir = train_config.parse(arguments).workdir
    assert newest(workdir) == 2
    assert [row["step"] for row in rows(workdir)] == [1, 2]


def test_frozen_parts_are_unchanged_and_have_no_optimizer_state(poisoned: tuple) -> None:
    config, workdir, *_ = train_config.parse(poisoned[0])
    create, _ = train_step.make_state(
        config, from_config(config.model.to_dict()), train_step.make_mesh(config)
    )
    first = {k: np.asarray(v) for k, v in checkpoint.flatten(create().params).items()}
    last = leaves(workdir / "checkpoints" / "2" / "params")
    projector = {f"projector/{name}/{kind}" for name in ("fc1", "fc2") for kind in ("kernel", "bias")}
    assert {path for path in first if not np.array_equal(first[path], last[path])} == projector
    assert {path for path, leaf in last.items() if leaf.dtype == np.float32} == projector
    moments = leaves(workdir / "checkpoints" / "2" / "optimizer")
    assert moments.keys() - {"log_norm"} == {
        f"{moment}/{path}" for moment in ("mu", "nu") for path in projector
    }


def test_a_run_begins_with_the_parameters_sizes_and_tokenizer_of_a_checkpoint(
    finished: tuple, command: Command, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(finished[0] / "export", start)
    own = {"steps": 1, "init_from": start, "model.decoder.dim": 64, "data.tokenizer": ""}
    assert train.main(command(tmp_path / "run", **{**FEW, **own})) == 0
    found, expected = (leaves(path / "params") for path in (tmp_path / "run" / "export", start))
    assert found.keys() == expected.keys()
    # The first update of a warm-up has a rate of 0.
    for path, leaf in expected.items():
        as_trained = leaf if path.startswith("projector/") else leaf.astype(found[path].dtype)
        np.testing.assert_array_equal(found[path], as_trained, err_msg=path)
    assert checkpoint.load_config(tmp_path / "run" / "export") == checkpoint.load_config(start)
    assert (tmp_path / "run/export/tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    # From then on it isn't needed any more.
    shutil.rmtree(start)
    assert train.main(command(tmp_path / "run", **{**FEW, **own})) == 0
    learning = json.loads((tmp_path / "run/train_config.json").read_text())
    assert learning["model"]["decoder"]["dim"] == SMALL["model.decoder.dim"]
