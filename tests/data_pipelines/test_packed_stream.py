"""Packed rows in the stream: what shares a row, and that workers and interruptions change nothing."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

from data_pipelines.order import group_by_image
from data_pipelines.pipeline import Loader, make_loader
from data_pipelines.records import Record, Turn
from osprey_jax.config import OspreyConfig
from osprey_jax.masks import encode_rle
from osprey_jax.prompt import Tokenizer

Make = Callable[..., Loader]
FULL = encode_rle(np.ones((8, 8), bool))


@dataclasses.dataclass(frozen=True)
class Album:
    """Conversations of one or two turns; `per_image` neighbours are about the same image."""

    name: str
    size: int
    per_image: int = 3
    broken: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        if index in self.broken:
            raise OSError("torn page")
        turns = (Turn("What is <mask><pos>", "red", (0,)), *[Turn("What car", "blue")] * (index % 2))
        image = np.full((8, 8, 3), index // self.per_image, np.uint8)
        return Record(f"{self.name}/{index}", image, (FULL,), turns, "<image>\n")

    def image_key(self, index: int) -> str:
        return f"image {index // self.per_image}"


@pytest.fixture
def make(tokenizer: Tokenizer, config: OspreyConfig) -> Iterator[Make]:
    made: list[Loader] = []

    def make(*sources: Album, **settings: object) -> Loader:
        settings = {
            "batch_size": 2,
            "buckets": ((64, 4),),
            "systems": ("Sys", "Sys is"),
            **settings,
        }
        made.append(make_loader(sources, tokenizer, config, seed=0, **settings))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def number(sample_id: str) -> int:
    return int(sample_id.rpartition("/")[2])


def test_groups_hold_the_samples_of_one_image_of_all_sources_so_many_at_most() -> None:
    sources = [Album("a", 7), Album("b", 4)]
    groups = group_by_image(sources, [0, 1], most=2)
    found = [groups(index, 0) for index in range(len(groups))]
    keys = [{sources[key.source].image_key(key.record) for key in place} for place in found]
    assert all(len(images) == 1 for images in keys)
    members = sorted((key.source, key.record) for place in found for key in place)
    assert members == [(0, index) for index in range(7)] + [(1, index) for index in range(4)]
    # Three and three of image 0, three and one of image 1, one of image 2.
    assert sorted(map(len, found)) == [1, 2, 2, 2, 2, 2]
    assert {key.epoch for key in groups(len(groups) + 1, 0)} == {1}


def test_conversations_of_one_image_share_a_row_and_come_once_an_epoch(make: Make) -> None:
    loader = make(Album("a", 9), Album("b", 9), share_image=6, num_steps=6, batch_size=1, buckets=((99, 6),))
    batches = list(loader)
    for batch, names in batches:
        assert len(names) == 6
        (image,) = {number(name) // 3 for name in names}
        np.testing.assert_allclose(
            batch.images[0, 0, 0, 0, 0] * 0.26862954 + 0.48145466, image / 255, atol=1e-6
        )
        assert (batch.input_ids == -200).sum() == 4  # one image's places
        assert batch.segment_ids.max() == 7
        assert batch.loss_weights.sum() == pytest.approx(6)
        assert batch.masks.levels[0].any(axis=(0, 1, 3, 4)).sum() == 6
    for epoch in (batches[:3], batches[3:]):
        names = [name for _, names in epoch for name in names]
        assert sorted(names) == sorted(f"{source}/{index}" for source in "ab" for index in range(9))


def test_what_does_not_fit_behind_a_prefix_gets_another_row(make: Make) -> None:
    one = make(Album("a", 6, per_image=6), share_image=6, num_steps=3, batch_size=1, buckets=((99, 2),))
    assert [len(names) for _, names in one] == [2, 2, 2]


def test_a_broken_sample_does_not_spoil_its_row(make: Make) -> None:
    loader = make(Album("a", 6, broken=(1,)), share_image=3, num_steps=2, batch_size=1)
    assert sorted(tuple(sorted(names)) for _, names in loader) == [("a/0", "a/2"), ("a/3", "a/4", "a/5")]
    assert loader.skipped == {"torn page": 1}


def test_rows_are_filled_with_as_many_images_as_fit(make: Make) -> None:
    loader = make(Album("a", 30), images_per_row=3, num_steps=5, buckets=((50, 1),))
    for batch, names in loader:
        assert batch.images.shape == (2, 3, 32, 32, 3)
        starts = (batch.positions == 0) & (batch.segment_ids > 0)
        assert starts.sum() == len(names) >= 4
        # Images lie in the order of their places.
        at = [(row, place) for row in range(2) for place in range(3)]
        given = [batch.images[row, place, 0, 0, 0] * 0.26862954 + 0.48145466 for row, place in at]
        inside = [batch.masks.levels[0][row, place].any() for row, place in at]
        assert sum(inside) == len(names)
        shown = sorted(round(255 * value) for value, used in zip(given, inside, strict=True) if used)
        assert shown == sorted(number(name) // 3 for name in names)


PACKED = {"share_image": 3, "images_per_row": 2, "num_steps": 9, "buckets": ((44, 3),)}


def same(found: list, expected: list) -> None:
    assert [names for _, names in found] == [names for _, names in expected]
    for (a, _), (b, _) in zip(found, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_packed_stream_resumes_anywhere_and_with_any_workers(make: Make) -> None:
    source = Album("a", 14, per_image=4, broken=(5,))
    straight = list(make(source, tolerance=0.9, **PACKED))
    assert len({len(names) for _, names in straight}) > 1
    taken = set()
    for stop in range(9):
        first = make(source, tolerance=0.9, **PACKED)
        same(list(itertools.islice(first, stop)), straight[:stop])
        second = make(source, tolerance=0.9, threads=4, workers=2 if stop == 4 else 0, **PACKED)
        second.set_state(first.get_state())
        same(list(second), straight[stop:])
        taken.add(first._at[1])
    # Some stops are amid the sequences of one place.
    assert len(taken) > 1


def test_packing_asks_for_steps_instead_of_epochs(make: Make) -> None:
    with pytest.raises(ValueError, match="give a number of steps instead of epochs"):
        make(Album("a", 9), share_image=2, epochs=1)


def test_another_packing_is_another_stream(make: Make) -> None:
    state = make(Album("a", 9)).get_state()
    with pytest.raises(ValueError, match="images_per_row was 1, is 2"):
        make(Album("a", 9), images_per_row=2).set_state(state)


@dataclasses.dataclass(frozen=True)
class Moved(Album):
    """The same images by other names."""

    def image_key(self, index: int) -> str:
        return f"elsewhere/{999 - index // self.per_image}"


def test_the_names_of_images_decide_nothing(make: Make) -> None:
    orders = [
        [names for _, names in make(kind("a", 12), kind("b", 8), share_image=4, num_steps=5)]
        for kind in (Album, Moved)
    ]
    assert orders[0] == orders[1]


def test_a_stream_goes_on_where_a_broken_sample_was_mended_meanwhile(make: Make) -> None:
    settings = {"share_image": 6, "num_steps": 8, "batch_size": 1, "tolerance": 0.9, "buckets": ((99, 2),)}
    for stop in range(1, 6):
        first = make(Album("a", 12, per_image=6, broken=(1, 2, 3, 4, 7)), **settings)
        list(itertools.islice(first, stop))
        mended = make(Album("a", 12, per_image=6), **settings)
        mended.set_state(first.get_state())
        assert len(list(mended)) == 8 - stop


def test_a_small_set_that_is_half_broken_stops(make: Make) -> None:
    loader = make(Album("a", 40, broken=tuple(range(20))), num_steps=10, batch_size=4)
    with pytest.raises(RuntimeError, match=r"more than 5% of the last 100 samples failed \(6: torn page\)"):
        list(loader)


def test_hosts_and_settings_that_cannot_be_are_refused(make: Make) -> None:
    for settings, message in (
        ({"host": 2, "num_hosts": 2}, "host 2 is none of 2 hosts"),
        ({"batch_size": 0}, "a batch of 0"),
        ({"systems": ()}, "no system texts"),
        ({"loss_per": "word"}, "a loss per 'word', not dialogue or token"),
    ):
        with pytest.raises(ValueError, match=message):
            make(Album("a", 9), **settings)
