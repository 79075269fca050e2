"""What is drawn of a record: order, number and wording; and what empty masks do to it."""

import collections

import numpy as np
import pytest

from data_pipelines.conversation import converse, draws
from data_pipelines.paraphrases import PHRASES
from data_pipelines.records import Record, Turn
from osprey_jax.masks import encode_rle

FULL, EMPTY = (encode_rle(np.full((4, 6), value)) for value in (True, False))
OPENING = "<image>\nLook.\n"


def record(*turns: Turn, masks: tuple = (FULL,) * 9, **values: object) -> Record:
    return Record("cards/1", None, masks, turns, **{"opening": OPENING, **values})


def name(number: int) -> Turn:
    return Turn("<mask><pos>", f"thing {number}", (number,))


def rng(epoch: int = 0) -> np.random.Generator:
    return draws(7, "cards", epoch, 3)


def test_dialogues_keep_their_turns_and_begin_with_the_opening() -> None:
    said = converse(record(Turn("A?  ", "a"), Turn("B? ", "b")), rng())
    # The original strips what it puts the image in front of, and nothing else.
    assert said.turns == (("<image>\nLook.\nA?", "a"), ("B? ", "b"))
    assert said.part(1, 2).turns == (("<image>\nLook.\nB?", "b"),)


def test_an_image_that_a_first_question_names_itself_is_taken_out() -> None:
    said = converse(record(Turn("Is <image> old?", "a"), Turn("Is <image> new?", "b")), rng())
    assert said.turns[0][0] == "<image>\nLook.\nIs  old?"


def test_regions_are_those_of_the_opening_and_then_of_each_turn() -> None:
    said = converse(
        record(
            Turn("1 or <mask><pos>?", "a", (4,)),
            Turn("2?", "b"),
            opening="<image>\n<mask><pos>,<mask><pos>. ",
            opening_regions=(2, 0),
        ),
        rng(),
    )
    assert said.regions == ((2, 0, 4), ())
    assert said.part(1, 2).regions == ((2, 0),)


def test_free_turns_are_shuffled_and_so_many_are_kept() -> None:
    whole = record(*map(name, range(9)), at_most=4)
    seen = collections.Counter()
    for epoch in range(300):
        said = converse(whole, rng(epoch))
        assert len(said.turns) == 4
        assert said.turns[0][0] == OPENING + "<mask><pos>"
        assert [question for question, _ in said.turns[1:]] == ["<mask><pos>"] * 3
        answers = [answer for _, answer in said.turns]
        assert answers == [f"thing {region}" for (region,) in said.regions]
        seen.update(said.regions)
    assert set(seen.values()) <= set(range(90, 180))  # each has 4/9 of 300
    assert len(seen) == 9


def test_the_same_sample_of_the_same_epoch_is_the_same_and_the_next_epoch_s_is_another() -> None:
    whole = record(*map(name, range(9)), at_most=9)
    first, again, later = (converse(whole, rng(epoch)).regions for epoch in (0, 0, 1))
    assert first == again != later
    assert sorted(first) == sorted(later)


@pytest.mark.parametrize("pool", ["short", "detailed", "why", "lead_in"])
def test_a_phrase_is_drawn_from_its_pool_and_its_slot_filled(pool: str) -> None:
    asked = Turn(
        " Quickly.", "red", () if pool == "why" else (5,), pool, "" if pool == "why" else "<mask><pos>"
    )
    drawn = {converse(record(asked), rng(epoch)).turns[0][0] for epoch in range(400)}
    slot = "" if pool == "why" else "<mask><pos>"
    assert drawn == {f"{OPENING}{phrase.format(slot)} Quickly." for phrase in PHRASES[pool]}


def test_an_empty_region_goes_with_its_turn_where_the_turn_is_its_own() -> None:
    masks = (FULL, EMPTY, EMPTY, EMPTY)
    both = Turn("<mask><pos> or <mask><pos>?", "b", (0, 2))
    turns = (name(0), name(1), both, name(2), name(3))
    said = converse(record(*turns, masks=masks, opening=OPENING + "<mask><pos>", opening_regions=(3,)), rng())
    # The second has a turn to itself; the third is named twice, the fourth by the opening, too.
    assert [answer for _, answer in said.turns] == ["thing 0", "b", "thing 2", "thing 3"]
    assert said.regions == ((3, 0), (0, 2), (2,), (3,))
    assert said.dropped_regions == 1


def test_empty_regions_don_t_count_among_those_that_are_kept() -> None:
    masks = (EMPTY,) * 6 + (FULL,) * 3
    said = converse(
        record(*map(name, range(9)), masks=masks, at_most=3, broken_regions=("one", "another")), rng()
    )
    assert sorted(said.regions) == [(6,), (7,), (8,)]
    assert said.dropped_regions == 8


def test_nothing_but_empty_regions_is_an_error() -> None:
    with pytest.raises(ValueError, match="every mask is empty"):
        converse(record(name(0), name(1), masks=(EMPTY, EMPTY), at_most=3), rng())


def test_another_source_of_the_same_seed_draws_otherwise() -> None:
    assert draws(7, "cards", 0, 3).integers(1 << 60) != draws(7, "dice", 0, 3).integers(1 << 60)
