"""The conversations about rendered scenes: every answer is compared with what is read off the pixels."""

import re

import numpy as np
import pytest

from data_pipelines.records import Record
from data_pipelines.shapes import Shapes, short_description
from osprey_jax.masks import decode_rles
from tests.data_pipelines.scene_reader import (
    INDICES,
    SHAPES,
    by_phrase,
    in_place,
    nearest,
    seen,
    stands,
    turns_of,
    words_of,
)

REGION = "<mask><pos>"
KINDS = {
    "short": "<image>\n\nThis provides an overview of the picture.\n"
    "Please give me a short description of <mask><pos>. Using a short phrase.",
    "detailed": "<image>\n\nThis provides an overview of the picture.\n"
    "Can you give me a detailed description of <mask><pos>?",
    "category": "<image>\nEach time I give you one region. Name the category of what is in it.\n<mask><pos>",
    "classify": "<image>\nThis provides an overview of the picture.\n"
    "What is the category of <mask><pos>? Using only one word or phrase.",
    "part": "<image>\nEach time I give you one region. Name its category; for a part, answer category:part.",
    "referring": "<image>\nEach time I give you one region with one object in it. Tell me its attributes,",
    "yes_no": "<image>\nThis provides an overview of the picture.\nIs <mask><pos> a ",
    "attribute": r"Ther are \d part regions in the picture: region1<mask><pos>.*\. Wh.* single word or ",
    "compare": r"Ther are \d part regions in the picture: region1<mask><pos>.*\. (Which|Is|Do) ",
    "common": r"Ther are \d part regions in the picture: region1<mask><pos>.* have in common\?",
    "relations": r"Ther are \d part regions in the picture: region1<mask><pos>.*\. Where .* in relation to ",
}
"""How the first question of each kind looks: its beginning, or what is found in it."""


def kind_of(record: Record) -> str:
    first = turns_of(record)[0][0]
    found = [kind for kind, look in KINDS.items() if first.startswith(look) or re.search(look, first)]
    assert len(found) == 1, (first, found)
    return found[0]


def conversations(kind: str):
    """Records of one kind: the scene, what is seen, and for each turn the text and the regions by number."""
    for index in INDICES:
        record = Shapes(split="held_out", kinds=(kind,))[index]
        assert kind_of(record) == kind
        scene, things = seen(index)
        assert np.array_equal(record.image, scene.image)
        order = [
            next(i for i, mask in enumerate(scene.masks) if np.array_equal(mask, named))
            for named in decode_rles(record.masks)
        ]
        yield scene, things, order, turns_of(record)


def one_by_one(kind: str):
    for scene, things, order, turns in conversations(kind):
        for (question, answer), region in zip(turns, order, strict=True):
            yield scene, things, region, question, answer


def test_short_descriptions_are_true() -> None:
    for scene, things, region, question, answer in one_by_one("short"):
        assert question.removeprefix("<image>\n\nThis provides an overview of the picture.\n") == (
            "Please give me a short description of <mask><pos>. Using a short phrase."
        )
        assert answer == things[region].phrase == short_description(scene, region)


def test_short_conversations_ask_for_every_region_once_in_shuffled_order() -> None:
    orders = [order for _, _, order, _ in conversations("short")]
    sizes = [len(seen(index)[1]) for index in INDICES]
    assert [sorted(order) for order in orders] == [list(range(size)) for size in sizes]
    assert sum(order == sorted(order) for order in orders) < len(orders) / 3


def test_detailed_descriptions_are_true() -> None:
    whole = re.compile(
        r"A (.+?), ((?:in|on|at) .+) of the picture\.(?: It has (.+)\.)? It is (.+) the (\w+ \w+)\."
    )
    part = re.compile(r"The (\w+) (\w+) of (a \w+ \w+, \w+ \w+), ((?:in|on|at) .+) of the picture\.")
    for scene, things, region, _, answer in one_by_one("detailed"):
        thing = things[region]
        if thing.whole:
            match = part.fullmatch(answer)
            assert match, answer
            assert match.groups()[:3] == (thing.colour, thing.name, thing.whole.phrase)
            assert in_place(thing, match[4])
        else:
            match = whole.fullmatch(answer)
            assert match, answer
            assert f"a {match[1]}" == thing.phrase
            assert in_place(thing, match[2])
            parts = [f"a {other.colour} {other.name}" for other in things if other.whole is thing]
            assert parts == ([match[3]] if match[3] else [])
            other = by_phrase(things, match[5])
            assert other == nearest(things, region)
            assert stands(scene, things, region, match[4], other)


def test_referring_expressions_are_true() -> None:
    for scene, things, region, _, answer in one_by_one("referring"):
        match = re.fullmatch(r"(\w+ \w+) (.+), (.+) the (\w+ \w+)", answer)
        assert match, answer
        assert by_phrase(things, match[1]) == region
        assert in_place(things[region], match[2])
        assert stands(scene, things, region, match[3], by_phrase(things, match[4]))


@pytest.mark.parametrize("kind", ["category", "classify", "part"])
def test_categories_are_true(kind: str) -> None:
    for _, things, region, _, answer in one_by_one(kind):
        thing = things[region]
        assert answer == (f"{thing.whole.name}:{thing.name}" if thing.whole else thing.name)
        assert kind == "part" or not thing.whole


def test_claims_are_confirmed_where_true_and_denied_where_not() -> None:
    for _, things, region, question, answer in one_by_one("yes_no"):
        claim = set(question.partition(f"{REGION} a ")[2].rstrip("?").split())
        assert len(claim) == 2
        assert answer == ("Yes" if claim <= words_of(things[region]) else "No")


def test_many_false_claims_are_true_of_another_object() -> None:
    """Else a look at the whole picture would do, without the region."""
    elsewhere = []
    for index in range(120):
        words = [
            {thing.size, thing.texture, thing.colour, thing.name} for thing in Shapes().scene(index).regions
        ]
        for question, answer in turns_of(Shapes(kinds=("yes_no",))[index]):
            if answer == "No":
                claim = set(question.partition(f"{REGION} a ")[2].rstrip("?").split())
                elsewhere.append(any(claim <= said for said in words))
    assert 0.45 < np.mean(elsewhere) < 0.75


def asked(question: str, order: list[int]) -> tuple[str, list[int]]:
    """A question without the list of regions, and which regions it names."""
    text = question.rpartition(f"{REGION}. ")[2]
    return re.sub(r"region\d", "region", text), [order[int(at) - 1] for at in re.findall(r"region(\d)", text)]


def test_answers_about_attributes_are_true() -> None:
    for _, things, order, turns in conversations("attribute"):
        for question, answer in turns:
            text, (region,) = asked(question, order)
            text, thing = (
                text.removesuffix(" Answer the question using a single word or phrase."),
                things[region],
            )
            if text == "Where is region in the picture?":
                assert in_place(thing, answer)
            elif text == "What part is region?":
                assert (answer, thing.whole is None) == (thing.name, False)
            else:
                words = {
                    "What colour is region?": thing.colour,
                    "What shape is region?": thing.name,
                    "What texture does region have?": thing.texture,
                    "What size is region?": thing.size,
                }
                assert answer == words[text]
                assert thing.whole is None or "colour" in text


def test_comparisons_are_true() -> None:
    for scene, things, order, turns in conversations("compare"):
        for question, answer in turns:
            text, (first, second) = asked(question, order)
            a, b = things[first], things[second]
            if "larger" in text:
                assert {a.size, b.size} == {"small", "large"}
                truth = a.size == "large"
            elif match := re.fullmatch(r"Do region and region have the same (\w+)\?", text):
                attribute = {"shape": "name"}.get(match[1], match[1])
                truth = getattr(a, attribute) == getattr(b, attribute)
            else:
                match = re.fullmatch(r"Is region (.+) region\?", text)
                assert match, text
                truth = stands(scene, things, first, match[1], second)
            if text == "Which is larger, region or region?":
                assert answer == f"region{order.index(first if truth else second) + 1}"
            else:
                assert answer == ("Yes" if truth else "No"), question


def test_what_regions_have_in_common_is_named_completely() -> None:
    for _, things, order, turns in conversations("common"):
        for question, answer in turns:
            text, (first, second) = asked(question, order)
            assert text == "What do region and region have in common?"
            shared = words_of(things[first]) & words_of(things[second])
            said = answer.removeprefix("Both are ").rstrip(".")
            said = re.sub(rf"\b({'|'.join(SHAPES)})s\b", r"\1", said.replace(",", "").replace(" and ", " "))
            assert set(said.split()) == (shared or {"They", "have", "nothing", "in", "common"})


def test_relations_are_true() -> None:
    for scene, things, order, turns in conversations("relations"):
        for question, answer in turns:
            text, (first, second) = asked(question, order)
            assert text == "Where is region in relation to region?"
            match = re.fullmatch(r"Region(\d) is (.+) region(\d)\.", answer)
            assert match, answer
            assert [order[int(match[1]) - 1], order[int(match[3]) - 1]] == [first, second]
            assert stands(scene, things, first, match[2], second)


def test_no_word_of_a_question_tells_yes_from_no() -> None:
    truths: dict[str, list[bool]] = {}
    for record in map(Shapes(kinds=("yes_no", "compare")).__getitem__, range(1300)):
        for question, answer in turns_of(record):
            if answer in ("Yes", "No"):
                text = asked(question, [0] * 9)[0]
                for word in {"any", *re.findall(r"\w+", text.rpartition(REGION)[2] or text)}:
                    truths.setdefault(word, []).append(answer == "Yes")
    # How far from a half, in standard deviations of a fair coin.
    signs = {word: (np.mean(says) - 0.5) * 2 * len(says) ** 0.5 for word, says in truths.items()}
    assert len(truths["any"]) > 4000
    assert len(signs) > 25
    assert all(abs(sign) < 3 for sign in signs.values()), signs


def test_every_kind_occurs_and_short_ones_dominate() -> None:
    kinds = [kind_of(Shapes()[index]) for index in range(1000)]
    assert set(kinds) == set(KINDS)
    assert 0.87 < kinds.count("short") / len(kinds) < 0.93


def test_masks_belong_to_the_placeholders_in_order_of_appearance() -> None:
    for record in map(Shapes().__getitem__, range(60)):
        text = "".join(question + answer for question, answer in turns_of(record))
        assert turns_of(record)[0][0].startswith("<image>\n")
        assert (text.count("<image>"), text.count(REGION)) == (1, len(record.masks))
        assert text.count("<mask>") == text.count("<pos>") == text.count(REGION)
