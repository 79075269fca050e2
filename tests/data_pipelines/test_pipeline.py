"""The stream of batches: order, mixture, hosts, where it resumes, and what broken samples do to it."""

import collections
import dataclasses
import itertools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from data_pipelines import pipeline
from data_pipelines.pipeline import Loader, make_loader
from data_pipelines.records import Record, Turn
from osprey_jax import sharding
from osprey_jax.batch import Batch, to_device
from osprey_jax.config import OspreyConfig
from osprey_jax.masks import encode_rle
from osprey_jax.prompt import Tokenizer

Make = Callable[..., Loader]


@dataclasses.dataclass(frozen=True)
class Cards:
    """One image of one colour for each index, and from one to three turns about it."""

    name: str
    size: int
    broken: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        if index in self.broken:
            raise OSError("torn card")
        turns = (Turn("What is <mask><pos>", "red", (0,)), *[Turn("What car", "blue")] * (index % 3))
        image, masks = np.full((8, 8, 3), index, np.uint8), (encode_rle(np.ones((8, 8), bool)),)
        return Record(f"{self.name}/{index}", image, masks, turns, "<image>\n")

    def image_key(self, index: int) -> str:
        return f"{self.name}/{index}"


@pytest.fixture
def make(tokenizer: Tokenizer, config: OspreyConfig) -> Iterator[Make]:
    """`make_loader` with what most tests share; ends the loaders' threads and workers."""
    made: list[Loader] = []

    def make(*sources: Cards, **settings: object) -> Loader:
        settings = {"batch_size": 4, "buckets": ((30, 2),), "seed": 0, "systems": ("Sys",), **settings}
        made.append(make_loader(sources, tokenizer, config, **settings))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def ids(batches: Iterable[tuple[Batch, list[str]]]) -> list[str]:
    return [sample_id for _, sample_ids in batches for sample_id in sample_ids]


def cards(name: str, size: int) -> list[str]:
    return [f"{name}/{index}" for index in range(size)]


def assert_same(found: list[tuple[Batch, list[str]]], expected: list[tuple[Batch, list[str]]]) -> None:
    assert [names for _, names in found] == [names for _, names in expected]
    for (a, _), (b, _) in zip(found, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_an_epoch_has_every_sample_once_and_the_next_one_another_order(make: Make) -> None:
    loader = make(Cards("a", 15), Cards("b", 5), epochs=3)
    assert loader.num_steps == 15
    order = ids(loader)
    epochs = [order[:20], order[20:40], order[40:]]
    for epoch in epochs:
        assert sorted(epoch) == sorted(cards("a", 15) + cards("b", 5))
        # Sources are shuffled into one another.
        assert {name[0] for name in epoch[:10]} == {name[0] for name in epoch[10:]} == {"a", "b"}
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_depends_on_the_seed_and_no_epoch_of_one_seed_is_one_of_another(make: Make) -> None:
    runs = [ids(make(Cards("a", 12), seed=seed, epochs=3)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    epochs = [tuple(run[start : start + 12]) for run in runs[1:] for start in (0, 12, 24)]
    assert len(set(epochs)) == 6


def test_sample_ids_name_the_rows(make: Make) -> None:
    for batch, names in make(Cards("a", 12), epochs=1):
        indices = np.array([int(name[2:]) for name in names])
        np.testing.assert_allclose(
            batch.images[:, 0, 0, 0, 0] * 0.26862954 + 0.48145466, indices / 255, atol=1e-6
        )
        assert (batch.segment_ids.sum(axis=1) == 14 + 6 * (indices % 3)).all()


def test_an_epoch_that_does_not_divide_into_batches_is_rounded_up(make: Make) -> None:
    order = ids(make(Cards("a", 10), epochs=1))
    assert len(order) == 12
    assert sorted(order[:10]) == sorted(cards("a", 10))


def test_two_hosts_together_make_the_batches_of_one(make: Make) -> None:
    source = Cards("a", 16)
    one = list(make(source, epochs=2))
    parts = [list(make(source, epochs=2, host=host, num_hosts=2)) for host in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == len(one) == 8
    for (whole, names), (left, left_names), (right, right_names) in zip(one, *parts, strict=True):
        assert left_names + right_names == names
        both = jax.tree.map(lambda a, b: np.concatenate([a, b]), left, right)
        jax.tree.map(np.testing.assert_array_equal, both, whole)


def test_sources_are_drawn_by_their_weights_and_each_goes_through_its_own_epochs(make: Make) -> None:
    loader = make(Cards("a", 6), Cards("b", 100), weights=(0.75, 0.25), num_steps=8)
    order = ids(loader)
    assert collections.Counter(name[0] for name in order) == {"a": 24, "b": 8}
    of_a = [name for name in order if name[0] == "a"]
    epochs = [of_a[start : start + 6] for start in range(0, 24, 6)]
    assert all(sorted(epoch) == cards("a", 6) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_stream_resumed_anywhere_is_the_uninterrupted_one(make: Make) -> None:
    settings = {"systems": ("Sys", "Sys is", "Sys is car"), "epochs": 3, "tolerance": 0.5}
    source = Cards("a", 11, broken=(2, 7))
    straight = list(make(source, **settings))
    for stop in (0, 1, 4, 7):
        first = make(source, **settings)
        assert_same(list(itertools.islice(first, stop)), straight[:stop])
        second = make(source, **settings)
        second.set_state(first.get_state())
        assert_same(list(second), straight[stop:])


def test_a_running_loader_goes_back_to_a_state(make: Make) -> None:
    loader = make(Cards("a", 12))
    next(loader)
    state = loader.get_state()
    expected = list(itertools.islice(loader, 4))
    loader.set_state(state)
    assert_same(list(itertools.islice(loader, 4)), expected)


def test_workers_and_threads_change_nothing_not_even_for_a_stream_resumed_with_others(make: Make) -> None:
    settings = {"systems": ("Sys", "Sys is"), "epochs": 3, "tolerance": 0.5}
    source = Cards("a", 11, broken=(2, 7))
    plain = make(source, threads=0, prefetch=0, **settings)
    expected = list(plain)
    assert_same(list(make(source, threads=4, prefetch=3, **settings)), expected)
    with_workers = make(source, workers=2, **settings)
    assert_same(list(itertools.islice(with_workers, 5)), expected[:5])
    without = make(source, **settings)
    without.set_state(with_workers.get_state())
    assert_same(list(without), expected[5:])
    assert with_workers.skipped + without.skipped == plain.skipped
    assert plain.skipped["torn card"] >= 6


def test_system_texts_are_drawn_anew_in_each_epoch(make: Make) -> None:
    def drawn(**settings: object) -> list[int]:
        """Words of the system text of each card, by number, epoch after epoch."""
        loader = make(Cards("a", 40), systems=("Sys", "Sys is"), batch_size=40, **settings)
        found = []
        for batch, names in loader:
            order = np.argsort([int(name[2:]) for name in names])
            found += [int(row[2] == 7) for row in batch.input_ids[order]]
        return found

    both = drawn(epochs=2)
    assert 10 < sum(both[:40]) < 30
    assert both[:40] != both[40:]
    assert drawn(epochs=1, seed=1) != both[:40]


def test_a_broken_sample_is_skipped_counted_and_named(
    make: Make, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    # The first turns of the others fit, the second ones don't.
    loader = make(Cards("a", 100, broken=(40,)), epochs=1, buckets=((14, 1),))
    loader.report = tmp_path / "skipped.jsonl"
    with caplog.at_level(logging.WARNING):
        order = ids(loader)
    assert len(order) == 100
    assert sorted(order[:99]) == sorted(set(cards("a", 100)) - {"a/40"})
    assert loader.skipped == {"torn card": 1}
    (line,) = loader.report.read_text().splitlines()
    assert json.loads(line) == {"sample_id": "a[40]", "reason": "torn card", "message": "torn card"}
    assert caplog.messages == ["skipped a[40]: torn card"]
    assert loader.dropped_turns >= 33 + 66 - 3
    assert (
        f"1 samples were skipped (1: torn card); {loader.dropped_turns} turns did not fit beside others"
        in loader.left_out()
    )


def test_samples_that_do_not_fit_are_counted_with_their_reason(make: Make) -> None:
    loader = make(Cards("a", 8), buckets=((11, 1),))
    with pytest.raises(RuntimeError, match=r"more than 5% of the last 100 samples failed \(6: the first "):
        next(loader)
    assert loader.skipped == {"the first turn has N tokens, N are allowed": 6}


def test_too_many_failures_among_the_last_ones_stop_the_stream_and_few_do_not(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "WATCHED", 100)
    few = make(Cards("a", 40, broken=(3,)), batch_size=39, num_steps=9)
    assert len(list(few)) == 9
    assert few.skipped["torn card"] > 5
    many = make(Cards("a", 40, broken=(3, 4, 5)), batch_size=37, num_steps=9)
    with pytest.raises(RuntimeError, match=r"\(6: torn card\), the last one a\[[345]\]: torn card"):
        list(many)


def test_a_batch_takes_the_first_bucket_that_holds_it(make: Make) -> None:
    loader = make(Cards("a", 12), batch_size=1, buckets=((14, 1), (20, 2), (28, 2)), epochs=1)
    shapes = {names[0]: (*batch.input_ids.shape, *batch.masks.position.shape[1:3]) for batch, names in loader}
    expected = [(1, 14, 1, 1), (1, 20, 1, 2), (1, 28, 1, 2)]
    assert shapes == {f"a/{index}": expected[index % 3] for index in range(12)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": (1.0,)}, r"weights must be 2 positive numbers.*\(1.0,\)"),
        ({"weights": (1.0, 0.0)}, "weights must be 2 positive numbers"),
        ({"buckets": ()}, "buckets must grow"),
        ({"buckets": ((30, 2), (40, 1))}, "buckets must grow"),
        ({"buckets": ((20, 1), (30, 2)), "num_hosts": 2}, "give one for 2 hosts"),
        ({"num_hosts": 3}, "a batch of 4 doesn't divide over 3 hosts"),
        ({"epochs": 1, "num_steps": 2}, r"epochs \(1\) and num_steps \(2\) exclude each other"),
    ],
)
def test_settings_that_do_not_fit_together_are_errors(
    make: Make, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(Cards("a", 4), Cards("b", 4), **settings)


def test_sources_and_tokenizer_that_do_not_serve_are_errors(
    make: Make, tokenizer: Tokenizer, config: OspreyConfig
) -> None:
    with pytest.raises(ValueError, match="no sources given"):
        make()
    with pytest.raises(ValueError, match="sources without samples: b, c"):
        make(Cards("a", 4), Cards("b", 0), Cards("c", 0))
    other = dataclasses.replace(config, mask_token_id=20)
    with pytest.raises(ValueError, match=r"\(11, 12\) in the tokenizer and \(20, 12\) in the config"):
        make_loader([Cards("a", 4)], tokenizer, other, batch_size=4, buckets=((30, 2),), seed=0)


def test_the_state_of_another_stream_is_refused(make: Make) -> None:
    state = make(Cards("a", 4)).get_state()
    with pytest.raises(ValueError, match="another one: seed was 0, is 1"):
        make(Cards("a", 4), seed=1).set_state(state)
    with pytest.raises(ValueError, match=r"sources was \[\['a', 4\]\], is \[\['a', 5\]\]"):
        make(Cards("a", 5)).set_state(state)


def test_a_batch_is_split_over_data_and_fsdp_and_whole_over_tensor(make: Make) -> None:
    batch, _ = next(make(Cards("a", 8)))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    placed = to_device(batch, mesh)
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    for array in jax.tree.leaves(placed):
        assert array.sharding.spec == PartitionSpec(("data", "fsdp"))
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {1}
    with pytest.raises(ValueError, match=r"a batch of 4 doesn't divide over the mesh.*'fsdp': 4"):
        to_device(batch, sharding.make_mesh(data=2, fsdp=4))


ENDLESS = """
import multiprocessing, os, time
from data_pipelines.workers import end_with_parent

def work():
    end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work, daemon=True).start()
    time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    worker = int(parent.stdout.readline())
    assert is_running(worker)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(worker)
