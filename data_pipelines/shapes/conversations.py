"""Conversations about a scene, of every kind that the real data has.

No adjective starts with a vowel, so that the article in a question tells nothing of the answer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from data_pipelines.records import Turn
from data_pipelines.shapes import words
from data_pipelines.shapes.drawing import COLOURS, PARTS, SHAPES, TEXTURES
from data_pipelines.shapes.scene import SIZES, Scene
from osprey_jax.prompt import IMAGE_TOKEN, OVERVIEW, PROTOCOLS, REGION, region_list

OPENING = f"{IMAGE_TOKEN}\n{OVERVIEW}"
CATEGORY_OPENING = f"{IMAGE_TOKEN}\nEach time I give you one region. Name the category of what is in it.\n"
PART_OPENING = (
    f"{IMAGE_TOKEN}\nEach time I give you one region. Name its category; for a part, answer category:part. "
    f"The categories are {', '.join(SHAPES)}. The parts are {', '.join(PARTS)}.\n"
)
REFERRING_OPENING = (
    f"{IMAGE_TOKEN}\nEach time I give you one region with one object in it. "
    "Tell me its attributes, its position and how it stands to other objects.\n"
)
ONE_PHRASE = " Answer the question using a single word or phrase."

_T = TypeVar("_T")

_QUESTIONS = 3
"""How many questions a conversation asks that could go on for long."""


class Conversation(NamedTuple):
    """An opening, what follows it, and the scene's regions that both are about."""

    opening: str
    opening_regions: tuple[int, ...]
    """As those of the turns: indices into `regions`."""
    turns: tuple[Turn, ...]
    regions: tuple[int, ...]


def _short(scene: Scene, rng: np.random.Generator) -> Conversation:
    order = _shuffled(rng, len(scene.regions))
    return _protocol("demo_short", scene, order, words.short_description)


def _detailed(scene: Scene, rng: np.random.Generator) -> Conversation:
    order = _shuffled(rng, len(scene.regions))[:_QUESTIONS]
    return _protocol("demo_detailed", scene, order, words.detailed_description)


def _classify(scene: Scene, rng: np.random.Generator) -> Conversation:
    return _protocol("lvis_paco", scene, _shuffled(rng, scene.num_objects), words.category)


def _category(scene: Scene, rng: np.random.Generator) -> Conversation:
    order = _shuffled(rng, scene.num_objects)
    return _opened(CATEGORY_OPENING, [(REGION, words.category(scene, region)) for region in order], order)


def _part(scene: Scene, rng: np.random.Generator) -> Conversation:
    order = _shuffled(rng, len(scene.regions))
    return _opened(PART_OPENING, [(REGION, words.category(scene, region)) for region in order], order)


def _referring(scene: Scene, rng: np.random.Generator) -> Conversation:
    order = _shuffled(rng, scene.num_objects)
    turns = [(REGION, words.referring_expression(scene, region)) for region in order]
    return _opened(REFERRING_OPENING, turns, order)


def _yes_no(scene: Scene, rng: np.random.Generator) -> Conversation:
    """Half of the claims are true; half of the others are true of another object where there is one."""
    order = _shuffled(rng, scene.num_objects)
    turns = []
    for region in order:
        attribute, values = _pick(rng, _CLAIMS)
        claims = [(getattr(thing, attribute), thing.name) for thing in scene.regions[: scene.num_objects]]
        (value, name), elsewhere = claims[region], [claim for claim in claims if claim != claims[region]]
        truth = rng.random() < 0.5
        if not truth:
            if elsewhere and rng.random() < 0.5:
                value, name = _pick(rng, elsewhere)
            elif rng.random() < 0.5:
                value = _pick(rng, [other for other in values if other != value])
            else:
                name = _pick(rng, [other for other in SHAPES if other != name])
        turns.append((f"Is {REGION} a {value} {name}?", "Yes" if truth else "No"))
    return _opened(OPENING, turns, order)


_CLAIMS = (("colour", tuple(COLOURS)), ("texture", TEXTURES), ("size", tuple(SIZES)))


def _attribute(scene: Scene, rng: np.random.Generator) -> Conversation:
    order = _shuffled(rng, len(scene.regions))
    asked = []
    for number, region in enumerate(order, 1):
        thing = scene.regions[region]
        asked.append((f"What colour is region{number}?", thing.colour))
        asked.append((f"Where is region{number} in the picture?", words.place(scene, region)))
        if thing.whole is None:
            asked.append((f"What shape is region{number}?", thing.name))
            asked.append((f"What texture does region{number} have?", thing.texture))
            asked.append((f"What size is region{number}?", str(thing.size)))
        else:
            asked.append((f"What part is region{number}?", thing.name))
    asked = [asked[index] for index in _shuffled(rng, len(asked))[: _QUESTIONS + 1]]
    return _listed([(question + ONE_PHRASE, answer) for question, answer in asked], order)


def _compare(scene: Scene, rng: np.random.Generator) -> Conversation:
    """The answer is drawn first and then two objects that it fits: yes and no are equally frequent."""
    order = _shuffled(rng, scene.num_objects)
    turns = []
    for index in _shuffled(rng, len(_COMPARISONS)):
        question, (yes, no), holds = _COMPARISONS[index]
        facts = {pair: holds(scene, order[pair[0]], order[pair[1]]) for pair in _pairs(len(order))}
        truth = rng.random() < 0.5
        fitting = [pair for pair, fact in facts.items() if fact is truth]
        if fitting and (not truth) in facts.values():
            first, second = (f"region{at + 1}" for at in _pick(rng, fitting))
            question, answer = (text.format(first, second) for text in (question, yes if truth else no))
            turns.append((question, answer))
    return _listed(turns[:_QUESTIONS], order)


def _alike(field: str) -> Callable[[Scene, int, int], bool]:
    return lambda scene, first, second: words.alike(scene.regions[first], scene.regions[second], field)


_YES_NO = ("Yes", "No")
_COMPARISONS: Sequence[tuple[str, tuple[str, str], Callable[[Scene, int, int], bool | None]]] = (
    ("Which is larger, {0} or {1}?", ("{0}", "{1}"), words.is_larger),
    ("Is {} larger than {}?", _YES_NO, words.is_larger),
    ("Is {} in front of {}?", _YES_NO, words.is_in_front),
    ("Is {} left of {}?", _YES_NO, lambda scene, a, b: words.is_before(scene, a, b, axis=1)),
    ("Is {} right of {}?", _YES_NO, lambda scene, a, b: words.is_before(scene, b, a, axis=1)),
    ("Is {} above {}?", _YES_NO, lambda scene, a, b: words.is_before(scene, a, b, axis=0)),
    ("Is {} below {}?", _YES_NO, lambda scene, a, b: words.is_before(scene, b, a, axis=0)),
    *(
        (f"Do {{}} and {{}} have the same {word}?", _YES_NO, _alike(field))
        for word, field in (("colour", "colour"), ("texture", "texture"), ("size", "size"), ("shape", "name"))
    ),
)
"""Questions about two objects, the answers where they hold and where they don't, and whether they do."""


def _common(scene: Scene, rng: np.random.Generator) -> Conversation:
    order = _shuffled(rng, scene.num_objects)
    turns = []
    for first, second in _some_pairs(rng, len(order)):
        answer = words.common(scene.regions[order[first]], scene.regions[order[second]])
        turns.append((f"What do region{first + 1} and region{second + 1} have in common?", answer))
    return _listed(turns, order)


def _relations(scene: Scene, rng: np.random.Generator) -> Conversation:
    order = _shuffled(rng, scene.num_objects)
    turns = []
    for first, second in _some_pairs(rng, len(order)):
        relation = words.relation(scene, order[first], order[second])
        question = f"Where is region{first + 1} in relation to region{second + 1}?"
        turns.append((question, f"Region{first + 1} is {relation} region{second + 1}."))
    return _listed(turns, order)


KINDS: Mapping[str, tuple[float, Callable[[Scene, np.random.Generator], Conversation]]] = {
    "short": (0.9, _short),
    "detailed": (0.01, _detailed),
    "category": (0.01, _category),
    "classify": (0.01, _classify),
    "part": (0.01, _part),
    "referring": (0.01, _referring),
    "yes_no": (0.01, _yes_no),
    "attribute": (0.01, _attribute),
    "compare": (0.01, _compare),
    "common": (0.01, _common),
    "relations": (0.01, _relations),
}
"""How often each kind is drawn, and what makes a conversation of it."""


def converse(scene: Scene, rng: np.random.Generator, *, kinds: Sequence[str]) -> Conversation:
    """A conversation about a scene, of one of these kinds by their weights."""
    weights = np.cumsum([KINDS[kind][0] for kind in kinds])
    kind = kinds[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]
    return KINDS[kind][1](scene, rng)


def _protocol(
    name: str, scene: Scene, order: Sequence[int], answer: Callable[[Scene, int], str]
) -> Conversation:
    """A protocol's question, literally, for one region after the other."""
    protocol = PROTOCOLS[name]
    assert protocol.question is not None
    return _opened(protocol.opening, [(protocol.question, answer(scene, region)) for region in order], order)


def _listed(turns: Sequence[tuple[str, str]], order: Sequence[int]) -> Conversation:
    """Questions that call the regions region1, region2 and so on, after a list of them."""
    opening = OPENING + region_list(len(order))
    asked = tuple(Turn(question, answer) for question, answer in turns)
    return Conversation(opening, tuple(range(len(order))), asked, tuple(order))


def _opened(opening: str, turns: Sequence[tuple[str, str]], order: Sequence[int]) -> Conversation:
    """Each question names the next region."""
    asked = tuple(Turn(question, answer, (index,)) for index, (question, answer) in enumerate(turns))
    return Conversation(opening, (), asked, tuple(order))


def _shuffled(rng: np.random.Generator, count: int) -> list[int]:
    return [int(index) for index in rng.permutation(count)]


def _pick(rng: np.random.Generator, values: Sequence[_T]) -> _T:
    return values[int(rng.integers(len(values)))]


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(first, second) for first in range(count) for second in range(count) if first != second]


def _some_pairs(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    pairs = _pairs(count)
    return [pairs[index] for index in _shuffled(rng, len(pairs))[:_QUESTIONS]]
