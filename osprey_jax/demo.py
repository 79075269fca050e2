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
from PIL import Image
from tqdm import tqdm

from data_pipelines.conversation import converse
from data_pipelines.shapes import Scene, Shapes, short_description
from data_pipelines.shapes.conversations import KINDS, ONE_PHRASE
from osprey_jax import train
from osprey_jax.figure import draw_regions
from osprey_jax.masks import decode_rles
from osprey_jax.predictor import Osprey
from osprey_jax.prompt import IMAGE_TOKEN, OVERVIEW, SYSTEM_INFERENCE, conversation, region_list

REGIONS = 500
"""Held-out regions that are described."""
LEARNED, AT_MOST_PERMUTED = 0.9, 0.4
"""The least exact match, and the most that may be left of it with the masks of an image exchanged."""
PICTURES = 6
LONGEST = 48
"""Tokens of the answers in the table."""
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "tiny.py"


class Described(NamedTuple):
    """A scene and, for each of its regions, the truth and the model's words."""

    scene: Scene
    truths: list[str]
    answers: list[str]
    exchanged: list[str]
    """Words for the mask of the image's next region."""


class Row(NamedTuple):
    """A question of a held-out conversation of some kind."""

    kind: str
    question: str
    answer: str
    truth: str


def describe_scenes(osprey: Osprey, source: Shapes, *, regions: int) -> list[Described]:
    """Short descriptions of scenes, until at least so many regions are described."""
    results: list[Described] = []
    with tqdm(total=regions, unit="region", desc="describing") as progress:
        for index in range(len(source)):
            scene = source.scene(index)
            turned = np.roll(scene.masks, -1, axis=0)
            results.append(
                Described(
                    scene,
                    [f"{short_description(scene, region)}." for region in range(len(scene.masks))],
                    osprey.describe(scene.image, scene.masks),
                    osprey.describe(scene.image, turned),
                )
            )
            progress.update(min(len(scene.masks), regions - progress.n))
            if progress.n >= regions:
                break
    return results


def answer_records(osprey: Osprey, *, size: int) -> Iterator[Row]:
    """The first question of a held-out conversation of each kind."""
    for kind in KINDS:
        record = Shapes(split="held_out", seed=1, size=size, kinds=(kind,))[0]
        said = converse(record, np.random.default_rng(0))
        question, truth = said.turns[0]
        assert isinstance(record.image, np.ndarray), "scenes are rendered, not read from files"
        masks = decode_rles([record.masks[region] for region in said.regions[0]])
        opening = f"{IMAGE_TOKEN}\n{OVERVIEW}{region_list(len(masks))}"
        if question.startswith(opening):
            asked = {"role": "user", "content": question.removeprefix(opening)}
            answer = osprey.chat(record.image, masks, [asked], max_new_tokens=LONGEST)
        else:
            prompt = conversation([(question, None)], system=SYSTEM_INFERENCE)
            answer = osprey.generate(record.image, masks, prompt, max_new_tokens=LONGEST)[0].text
        shown = question.removeprefix(opening).rpartition("\n")[2].removesuffix(ONE_PHRASE)
        yield Row(kind, shown.strip(" ."), answer, truth)


def share_equal(pairs: Sequence[tuple[str, str]]) -> float:
    """How many of the pairs are equal, as a share."""
    return sum(first == second for first, second in pairs) / len(pairs)


def draw_scenes(described: Sequence[Described]) -> Image.Image:
    """Scenes with their regions and the model's words, three in a row; a wrong answer has its truth along."""
    pictures = []
    for scene, truths, answers, _ in described:
        words = [a if a == t else f"{a} [truth: {t}]" for t, a in zip(truths, answers, strict=True)]
        times = max(1, round(480 / len(scene.image)))
        image, masks = (
            x.repeat(times, axis=-2).repeat(times, axis=-1)
            for x in (scene.image.transpose(2, 0, 1), scene.masks)
        )
        pictures.append(draw_regions(image.transpose(1, 2, 0), masks, words, tint=0))
    columns = min(3, len(pictures))
    width = max(picture.width for picture in pictures)
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (width * columns, sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            sheet.paste(picture, (column * width, sum(heights[:number])))
    return sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)


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
    described = describe_scenes(osprey, source, regions=REGIONS)
    triples = [triple for item in described for triple in zip(*item[1:], strict=True)][:REGIONS]
    print_table(list(answer_records(osprey, size=source.size)))
    draw_scenes(described[:PICTURES]).save(args.output / "regions.png")
    metrics = {
        "exact_match": share_equal([(truth, answer) for truth, answer, _ in triples]),
        "exact_match_permuted": share_equal([(truth, exchanged) for truth, _, exchanged in triples]),
        "regions": len(triples),
        "seconds": round(time.monotonic() - start, 1),
    }
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(
        f"{metrics['exact_match']:.1%} of {len(triples)} held-out regions described exactly; with the masks "
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
