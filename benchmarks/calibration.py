"""How far the scores of `Osprey.classify` can be trusted: a model of the demo on scenes it never saw.

    python -m benchmarks.calibration --checkpoint outputs/demo/run/export [--scenes 100]

The labels are all short descriptions that regions of `data_pipelines/shapes` can have, spelt as the model
says them; the question is that of the demo's short level. With all of them every region's truth can be
chosen: a calibrated score of 0.9 is right nine times in ten. With half of them, drawn at random, many a
region's truth is not among them: it should get no label, by a limit on one score or the other. Prints tables
in Markdown.
"""

import argparse
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from data_pipelines.shapes import Scene, Shapes, short_description
from data_pipelines.shapes.drawing import COLOURS, PARTS, SHAPES, TEXTURES
from data_pipelines.shapes.scene import SIZES
from osprey_jax import Osprey
from osprey_jax.prompt import PROTOCOLS
from osprey_jax.vocabulary import Vocabulary

BINS = (0.0, 0.5, 0.8, 0.95, 0.99, 1.0)
"""Bounds of `probability`; each bin has its lower one, the last both."""
THRESHOLDS = (0.5, 0.8, 0.95, 0.99)
MIN_LOGPROBS = (-16, -8, -4, -1, -0.25)


class Scored(NamedTuple):
    """What `classify` said of regions; arrays of a region each."""

    truth: np.ndarray
    label: np.ndarray
    probability: np.ndarray
    logprob: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Where the label is the truth."""
        return self.label == self.truth

    def where(self, chosen: np.ndarray) -> "Scored":
        """Those of the regions that are chosen."""
        return Scored(*(field[chosen] for field in self))


def all_labels() -> list[str]:
    """The short descriptions that can occur, of objects and of parts."""
    objects = (f"{size} {shape}, {texture}" for size in SIZES for shape in SHAPES for texture in TEXTURES)
    things = [*objects, *(f"{part}, plain" for part in PARTS)]
    return [f"a {thing} {colour}" for thing in things for colour in COLOURS]


def classify(osprey: Osprey, scenes: Sequence[Scene], labels: Sequence[str]) -> Scored:
    """Labels all regions of the scenes, each scene alone."""
    known, question = Vocabulary(labels, osprey.tokenizer), PROTOCOLS["demo_short"].question
    truths = [short_description(scene, region) for scene in scenes for region in range(len(scene.masks))]
    found = [
        one for scene in scenes for one in osprey.classify(scene.image, scene.masks, known, question=question)
    ]
    return Scored(np.array(truths), *map(np.array, zip(*found, strict=True)))


def print_bins(scored: Scored) -> None:
    """Reliability by bins of `probability`, and the expected calibration error over them."""
    print("| probability | regions | mean probability | right |\n|---|---|---|---|")
    error, number = 0.0, np.digitize(scored.probability, BINS[1:-1])
    for index, bounds in enumerate(itertools.pairwise(BINS)):
        some = scored.where(number == index)
        if not len(some.truth):
            print(f"| {bounds[0]:g}–{bounds[1]:g} | 0 | | |")
            continue
        mean, right = some.probability.mean(), some.right.mean()
        error += len(some.truth) / len(scored.truth) * abs(mean - right)
        print(f"| {bounds[0]:g}–{bounds[1]:g} | {len(some.truth)} | {mean:.3f} | {right:.1%} |")
    mean, right = scored.probability.mean(), scored.right.mean()
    print(f"| all | {len(scored.truth)} | {mean:.3f} | {right:.1%} |")
    print(f"\nExpected calibration error: {error:.3f}\n")


def print_limits(absent: Scored, present: Scored) -> None:
    """Medians of both scores where the truth is missing and where it isn't, and what limits on them do."""
    print("| median of | truth absent | truth present |\n|---|---|---|")
    print(f"| probability | {np.median(absent.probability):.3f} | {np.median(present.probability):.3f} |")
    print(f"| logprob | {np.median(absent.logprob):.2f} | {np.median(present.logprob):.2f} |")
    print("\n| limit | absent: no label | present: right label | present: wrong label |\n|---|---|---|---|")
    limits = [("none", "probability", 0.0)]
    limits += [(f"threshold {value:g}", "probability", value) for value in THRESHOLDS]
    limits += [(f"min_logprob {value:g}", "logprob", value) for value in MIN_LOGPROBS]
    for name, score, least in limits:
        abstained = (getattr(absent, score) < least).mean()
        kept = getattr(present, score) >= least
        right, wrong = ((kept & these).mean() for these in (present.right, ~present.right))
        print(f"| {name} | {abstained:.1%} | {right:.1%} | {wrong:.1%} |")


def main() -> None:
    """Runs both parts and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", metavar="DIR", required=True)
    parser.add_argument("--scenes", type=int, default=100, metavar="N", help="of 3 to 7 regions each")
    args = parser.parse_args()
    osprey = Osprey.load(args.checkpoint, dtype="float32")
    source = Shapes(split="held_out", size=osprey.config.vision.image_size)
    scenes, labels = [source.scene(index) for index in range(args.scenes)], all_labels()

    scored = classify(osprey, scenes, labels)
    assert set(scored.truth) <= set(labels)
    print(f"{len(scored.truth)} regions of {len(scenes)} held-out scenes; {jax.devices()[0]}\n")
    print(f"All {len(labels)} labels:\n")
    print_bins(scored)

    half = np.random.default_rng(0).choice(labels, len(labels) // 2, replace=False).tolist()
    scored = classify(osprey, scenes, half)
    known = np.isin(scored.truth, half)
    print(f"{len(half)} of them, with the truth of {known.sum()} regions and without that of the others:\n")
    print_limits(scored.where(~known), scored.where(known))


if __name__ == "__main__":
    main()
