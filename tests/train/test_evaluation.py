"""What is measured and shown of data that isn't trained on, while a run goes on."""

import io
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from data_pipelines.shapes import Shapes, short_description
from osprey_jax import Osprey, generate, sharding, train_config, train_data, train_step
from osprey_jax.config import from_config
from osprey_jax.evaluation import REGIONS, Evaluation, Evaluator, tags
from osprey_jax.models import osprey as architecture
from osprey_jax.optim import TrainState, init_state
from osprey_jax.prompt import IGNORE_LABEL, IMAGE_TOKEN_ID
from tests.train.runs import SMALL, Command, Start, learned, rows, steps, wait_until

# ml_collections loads a config file by a method that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def pictures(workdir: Path) -> dict[tuple[str, int], Image.Image]:
    """The pictures in a run's event files, by name and step."""
    found = {}
    for path in (workdir / "tensorboard").iterdir():
        data, place = path.read_bytes(), 0
        while place < len(data):  # records of a length, its checksum, an event, its checksum
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 16 + length
            for value in event.summary.value:
                if value.HasField("image"):
                    picture = Image.open(io.BytesIO(value.image.encoded_image_string))
                    assert picture.size == (value.image.width, value.image.height)
                    found[value.tag, event.step] = picture
    return found


def test_exact_match_is_counted_from_what_the_saved_model_says(finished: tuple) -> None:
    found = {row["step"]: row["exact_match"] for row in rows(finished[0]) if "exact_match" in row}
    assert list(found) == [25, 50]
    osprey = Osprey.load(finished[0] / "checkpoints" / "50")
    source, right, count = Shapes(split="held_out", size=64), 0, 0
    for index in range(REGIONS):
        scene = source.scene(index)
        words = osprey.describe(scene.image, scene.masks)
        for region, said in enumerate(words):
            right += said == f"{short_description(scene, region)}."
        count += len(words)
        if count >= REGIONS:
            break
    assert found[50] == right / count


def test_every_evaluation_leaves_a_picture_of_four_scenes(finished: tuple) -> None:
    found = pictures(finished[0])
    assert found.keys() == {("held_out/shapes", 25), ("held_out/shapes", 50)}
    for picture in found.values():
        # Two in a row of about 1,000 pixels each with their words below, at half their size.
        assert 900 < picture.width < 1300
        assert 1000 < picture.height < 1500
        for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
            left, top = (place * side // 2 for place, side in zip(corner, picture.size, strict=True))
            quarter = picture.crop((left, top, left + picture.width // 2, top + picture.height // 2))
            assert np.asarray(quarter).std() > 20


def test_the_losses_are_those_of_a_run_without_evaluation(
    finished: tuple, command: Command, start: Start, tmp_path: Path
) -> None:
    process = start(command(tmp_path / "run", eval_every=0))
    wait_until(lambda: steps(tmp_path / "run") >= 30, process)
    process.kill()
    process.communicate()
    of_evaluation = {"held_out_loss", "exact_match"}
    expected = [{k: v for k, v in row.items() if k not in of_evaluation} for row in learned(finished[0])[:30]]
    assert learned(tmp_path / "run")[:30] == expected


QUESTIONS = ("What is <region1>?", "Which is left of the other, <region1> or <region2>?", "What is this?")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of one's own: of scenes with questions about one region, about two and about none."""
    root = tmp_path_factory.mktemp("data")
    source = Shapes(seed=5, size=64)
    for name, first in (("some.jsonl", 0), ("more.jsonl", 20)):
        lines = []
        for index in range(first, first + 12):
            scene = source.scene(index)
            Image.fromarray(scene.image).save(root / f"{index}.png")
            ys, xs = zip(*(np.nonzero(mask) for mask in scene.masks[:2]), strict=True)
            boxes = [
                [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]
                for x, y in zip(xs, ys, strict=True)
            ]
            said = [QUESTIONS[index % len(QUESTIONS)], short_description(scene, 0)]
            turns = [{"from": who, "value": text} for who, text in zip(("human", "gpt"), said, strict=True)]
            regions = [{"box": box} for box in boxes]
            line = {"image": f"{index}.png", "regions": regions, "conversations": turns}
            lines.append(json.dumps(line))
        (root / name).write_text("\n".join(lines) + "\n")
    return root


NAMES = ("custom:some.jsonl", "custom:more.jsonl")


class Run:
    """An evaluator of two sources beside a run, and states to evaluate."""

    def __init__(self, command: Command, root: Path, **overrides: object):
        own = {"data__held_out": NAMES, "data__root": root, "data__buckets": ((400, 8),), "batch_size": 4}
        self.config, *_ = train_config.parse(command(root / "run", **{**own, **overrides}))
        self.model_config = from_config(self.config.model.to_dict())
        self.mesh = train_step.make_mesh(self.config)
        self.model = architecture.Osprey(self.model_config, jnp.dtype(self.config.dtype))
        self.said: list[str] = []
        self.evaluator = Evaluator(self.model, self.data(), self.mesh, self.config, report=self.said.append)

    def data(self) -> train_data.Data:
        return train_data.make_data(self.config, self.model_config)

    def state(self, seed: int) -> TrainState:
        params = architecture.init_params(self.model_config, jax.random.key(seed))
        places = sharding.param_shardings(architecture.boxed_params(self.model_config), self.mesh)
        return init_state(jax.device_put(params, places), (".*",), frozen_dtype="float32")

    def evaluate(self, seed: int) -> Evaluation:
        state = self.state(seed)
        with sharding.use_mesh(self.mesh):
            return self.evaluator(state)


@pytest.fixture(scope="module")
def run(command: Command, root: Path) -> Run:
    return Run(command, root)


@pytest.fixture(scope="module")
def evaluated(run: Run) -> Evaluation:
    return run.evaluate(seed=1)


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Grows with each program that is compiled, or read from a cache of compiled ones."""
    found: list[str] = []

    def listen(event: str, *_: object, **__: object) -> None:
        found.extend([event] if event.endswith("backend_compile_duration") else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def cross_entropies(run: Run, params: dict, number: int) -> list[float]:
    """The mean loss of each dialogue of a source's first batches, from a whole sequence's logits in NumPy."""
    osprey = Osprey(run.model_config, params, run.data().tokenizer)
    found = []
    for batch, _ in run.data().held_out[number].loader:
        for row in range(len(batch.input_ids)):
            ids, labels = batch.input_ids[row], batch.labels[row]
            one = jax.tree.map(lambda x: x[row : row + 1, 0], (batch.images, batch.masks))  # noqa: B023
            logits = np.asarray(osprey.network.run(generate.logits, *one, ids[None])[0], np.float64)
            places = [t for t in range(1, len(ids)) if labels[t] != IGNORE_LABEL]
            losses = [np.logaddexp.reduce(logits[t - 1]) - logits[t - 1, labels[t]] for t in places]
            found.append(float(np.mean(losses)))
            assert (ids == IMAGE_TOKEN_ID).sum() == run.model_config.vision.num_image_tokens
    return found


def test_losses_by_source_are_the_means_over_its_dialogues(run: Run, evaluated: Evaluation) -> None:
    params = run.state(seed=1).params
    by_source = [cross_entropies(run, params, number) for number in range(2)]
    assert [len(losses) for losses in by_source] == [SMALL["eval_batches"] * 4] * 2
    expected = {
        "held_out_loss": np.mean(by_source),
        "held_out_loss/custom_some.jsonl": np.mean(by_source[0]),
        "held_out_loss/custom_more.jsonl": np.mean(by_source[1]),
    }
    # Float32 sums in another order.
    assert evaluated.numbers == pytest.approx(expected, rel=1e-5)
    assert len(set(evaluated.numbers.values())) == 3


def test_an_evaluation_is_repeated_to_the_bit_and_compiles_nothing(
    run: Run, evaluated: Evaluation, compiled: list[str]
) -> None:
    state = run.state(seed=1)
    compiled.clear()
    with sharding.use_mesh(run.mesh):
        again = run.evaluator(state)
    assert compiled == []
    assert again.numbers == evaluated.numbers
    for name, picture in evaluated.pictures.items():
        np.testing.assert_array_equal(np.asarray(again.pictures[name]), np.asarray(picture))


def test_questions_about_any_number_of_regions_are_shown_with_truth(evaluated: Evaluation) -> None:
    assert evaluated.pictures.keys() == {"held_out/custom_some.jsonl", "held_out/custom_more.jsonl"}
    for picture in evaluated.pictures.values():
        assert 900 < picture.width < 1300


def test_words_are_left_out_where_the_mesh_does_not_divide_them(command: Command, root: Path) -> None:
    run = Run(command, root, mesh__fsdp=2, mesh__tensor=2, eval_batches=1)
    (told,) = run.said
    assert told.startswith("evaluation: losses alone, for words can't be generated on this mesh: parameter ")
    assert "doesn't divide over {'data': 1, 'fsdp': 2, 'tensor': 2}" in told


def test_every_source_has_a_tag_of_its_own() -> None:
    assert tags(["shapes", "custom:my/a b.jsonl", "/data/prepared/vg/", "custom:my:a b.jsonl"]) == [
        "shapes",
        "custom_my_a_b.jsonl",
        "data_prepared_vg",
        "custom_my_a_b.jsonl_",
    ]


def test_nothing_is_generated_where_no_samples_are_wanted(command: Command, root: Path) -> None:
    run = Run(command, root, eval_samples=0, eval_batches=1)
    numbers, shown = run.evaluate(seed=1)
    assert not shown
    assert all(math.isfinite(value) for value in numbers.values())
