"""Trains a small Osprey on rendered scenes, from nothing, and shows what it says of scenes it never saw.

    python -m osprey_jax.demo [--output outputs/demo] [--config configs/tiny.py]

Writes into the output directory: `run/`, the training run with the model in `run/export`; `regions.png`,
scenes with their masks and the model's words; `metrics.json`. Prints a table of questions, answers and
truths. An interrupted demo goes on where it was. Exit status: 0 if the model learned, 1 if it didn't, 2 where
it can't begin.
"""

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipelines.shapes import Shapes
from data_pipelines.shapes.conversations import KINDS, ONE_PHRASE
from osprey_jax import train
from osprey_jax.answers import answer, describe_scenes, draw_scenes, first_question, share_equal
from osprey_jax.predictor import Osprey

REGIONS = 500
"""Held-out regions that are described."""
LEARNED, AT_MOST_PERMUTED = 0.9, 0.4
"""The least exact match, and the most that may be left of it with the masks of an image exchanged."""
PICTURES = 6
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "tiny.py"


class Row(NamedTuple):
    """A question of a held-out conversation of some kind."""

    kind: str
    question: str
    answer: str
    truth: str


def answer_records(osprey: Osprey, *, size: int) -> Iterator[Row]:
    """The first question of a held-out conversation of each kind."""
    for kind in KINDS:
        record = Shapes(split="held_out", seed=1, size=size, kinds=(kind,))[0]
        asked = first_question(osprey.config, record, np.random.default_rng(0))
        shown = asked.question.removesuffix(ONE_PHRASE)
        yield Row(kind, shown.strip(" ."), answer(osprey, asked), asked.truth)


def print_table(rows: Sequence[Row]) -> None:
    """Questions, answers and truths in columns; a tick where the answer is the truth."""
    table = [
        ("kind", "question", "answer", "truth", ""),
        *(
            (*(textwrap.shorten(cell, 100) for cell in row), "✓" if row.answer == row.truth else "✗")
            for row in rows
        ),
    ]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for row in table:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[4])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="default: outputs/demo")
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: configs/tiny.py")
    args = parser.parse_args(argv)
    start = time.monotonic()
    run = args.output / "run"
    if status := train.main([f"--config={args.config}", f"--workdir={run}"]):
        return status
    if not (run / "export").is_dir():
        return 1  # stopped on the way, as training has said

    osprey = Osprey.load(run / "export", dtype="float32")
    source = Shapes(split="held_out", size=osprey.config.vision.image_size)
    described, exchanged = [], []
    with tqdm(total=REGIONS, unit="region", desc="describing") as progress:
        for item in describe_scenes(osprey, source, regions=REGIONS):
            described.append(item)
            exchanged += osprey.describe(item.scene.image, np.roll(item.scene.masks, -1, axis=0))
            progress.update(min(len(item.truths), REGIONS - progress.n))
    truths = [truth for item in described for truth in item.truths][:REGIONS]
    answers = [said for item in described for said in item.answers][:REGIONS]
    print_table(list(answer_records(osprey, size=source.size)))
    draw_scenes(described[:PICTURES]).save(args.output / "regions.png")
    metrics = {
        "exact_match": share_equal(truths, answers),
        "exact_match_permuted": share_equal(truths, exchanged[:REGIONS]),
        "regions": len(truths),
        "seconds": round(time.monotonic() - start, 1),
    }
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(
        f"{metrics['exact_match']:.1%} of {len(truths)} held-out regions described exactly; with the masks "
        f"of each image exchanged {metrics['exact_match_permuted']:.1%}; {metrics['seconds']:.0f} s\n"
        f"see {args.output / 'regions.png'} and {args.output / 'metrics.json'}"
    )
    if metrics["exact_match"] < LEARNED or metrics["exact_match_permuted"] > AT_MOST_PERMUTED:
        print(
            f"error: it did not learn: at least {LEARNED:.0%} and at most {AT_MOST_PERMUTED:.0%} were "
            "expected",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
