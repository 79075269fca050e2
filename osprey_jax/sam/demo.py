"""Trains a small promptable segmenter on rendered scenes, from nothing, and lets Osprey say what it finds.

    python -m osprey_jax.sam.demo [--output outputs/demo-sam] [--osprey outputs/demo/run/export]

Osprey is the one that `python -m osprey_jax.demo` trains. Writes into the output directory: `checkpoint/`,
which `osprey_jax.sam.Sam.load` reads; `points.png`, `boxes.png` and `everything.png`, scenes with what was
found in them and Osprey's words; `metrics.json`. Prints a table of how well masks fit. An interrupted demo
goes on where it was. Exit status: 0 if the segmenter learned, 1 if it didn't or was stopped, 2 where it can't
begin.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from data_pipelines.shapes import Scene, Shapes, short_description
from osprey_jax.answers import sheet
from osprey_jax.compilation_cache import use_compilation_cache
from osprey_jax.figure import draw_regions, draw_words
from osprey_jax.masks import decode_rles
from osprey_jax.predictor import Osprey
from osprey_jax.sam import files
from osprey_jax.sam.config import SamConfig, tiny
from osprey_jax.sam.evaluation import Row, Score, Truth, evaluate, summarise
from osprey_jax.sam.predictor import Sam
from osprey_jax.sam.prompts import box_of, pixel_of
from osprey_jax.sam.train import train
from osprey_jax.sam.training import Settings
from osprey_jax.segments import Segment
from osprey_jax.train import stop_signals

REGIONS = 600
"""Held-out regions that are clicked on and boxed, at least."""
CLICK, BOX = 0.85, 0.9
"""The least mean IoUs with them."""
TRIED = 4
"""Scenes among which one that has a part is searched."""
PICTURES = 6
LEAST_OVERLAP = 0.5
"""IoU from which on a segment is compared with a region's words."""
ENLARGED = 8
"""Times that scenes are in pictures."""


def train_checkpoint(
    directory: Path, saved: Path, config: SamConfig, settings: Settings
) -> tuple[str | None, float]:
    """Makes a checkpoint of a trained segmenter; returns what stopped it, if anything did, and seconds."""
    start = time.monotonic()
    source = Shapes(split="train", size=config.encoder.image_size)

    def scene(number: int) -> tuple[np.ndarray, np.ndarray]:
        """Every other one has a part, mostly, for there are few."""
        tried = (source.scene(TRIED * number + more) for more in range(TRIED if number % 2 else 1))
        drawn = next(tried)
        while len(drawn.masks) == drawn.num_objects:
            if (another := next(tried, None)) is None:
                break
            drawn = another
        return drawn.image, drawn.masks

    with stop_signals() as stopped:
        step, params = train(config, settings, scene, saved, stopped=stopped)
        if step < settings.steps:
            why = stopped()
            return f"stopped by {why} after step {step}; the same command goes on from there", 0.0
    files.save(directory, [params], config)
    return None, time.monotonic() - start


def truths(source: Shapes, *, regions: int) -> Iterator[Truth]:
    """Scenes until at least so many regions are there."""
    for number in range(len(source)):
        if regions <= 0:
            return
        scene = source.scene(number)
        yield Truth(scene.image, scene.masks, [region.whole is not None for region in scene.regions])
        regions -= len(scene.masks)


def score(sam: Sam, source: Shapes) -> list[Score]:
    """Clicks and boxes on held-out scenes."""
    scores: list[Score] = []
    with tqdm(total=REGIONS, unit="region", desc="clicking") as progress:
        for some in evaluate(sam, truths(source, regions=REGIONS), seed=0):
            scores += some
            progress.update(min(len(some) // 2, REGIONS - progress.n))
    return scores


def print_table(rows: Sequence[Row]) -> None:
    """Mean IoUs in columns."""
    print(f"{'prompt':<8}{'of':<24}{'count':>6}  {'mean IoU':>9}  {'best of 3':>9}  {'single':>7}")
    for row in rows:
        more = f"  {row.best:>9.3f}  {row.single:>7.3f}" if row.prompt == "click" else ""
        print(f"{row.prompt:<8}{row.kind:<24}{row.regions:>6}  {row.iou:>9.3f}{more}")


def draw_examples(sam: Sam, osprey: Osprey, source: Shapes, output: Path) -> dict[str, float]:
    """Draws scenes with segments and Osprey's words; returns the shares of words that are true.

    For everything, also how many of the scenes' regions were found, and how many segments are no region.
    """
    scenes = [source.scene(number) for number in range(PICTURES)]
    kinds: dict[str, list[list[Segment]]] = {"points": [], "boxes": [], "everything": []}
    for number, scene in enumerate(tqdm(scenes, unit="scene", desc="describing")):
        rng = np.random.default_rng(number)
        points = [pixel_of(mask, rng).tolist() for mask in scene.masks]
        boxes = [box_of(mask).tolist() for mask in scene.masks]
        kinds["points"].append([osprey.describe_point(sam, scene.image, point) for point in points])
        kinds["boxes"].append([osprey.describe_box(sam, scene.image, box) for box in boxes])
        kinds["everything"].append(osprey.describe_everything(sam, scene.image))
    told: dict[str, float] = {}
    for name, each in kinds.items():
        pairs = list(zip(scenes, each, strict=True))
        sheet([draw_segments(scene, segments) for scene, segments in pairs]).save(output / f"{name}.png")
        matches = [(match(scene, segment), segment, scene) for scene, found in pairs for segment in found]
        true = [
            segment.text == words(scene, region) for region, segment, scene in matches if region is not None
        ]
        told[f"{name}_words"] = sum(true) / max(1, len(matches))
        if name == "everything":
            told["everything_regions"] = float(sum(len(scene.masks) for scene in scenes))
            told["everything_found"] = float(len({(id(s), r) for r, _, s in matches if r is not None}))
            told["everything_other"] = float(sum(region is None for region, _, _ in matches))
    return told


def words(scene: Scene, region: int) -> str:
    """What Osprey should say of a region."""
    return f"{short_description(scene, region)}."


def match(scene: Scene, segment: Segment) -> int | None:
    """The region that a segment overlaps most with, if that is enough."""
    [mask] = decode_rles([segment.segmentation])
    both, either = (scene.masks & mask).sum((1, 2)), (scene.masks | mask).sum((1, 2))
    overlap = both / either
    return int(overlap.argmax()) if overlap.max() >= LEAST_OVERLAP else None


def draw_segments(scene: Scene, segments: Sequence[Segment]) -> Image.Image:
    """A scene with segments, the prompts that led to them and the words; wrong ones with the truth."""
    texts = []
    for segment in segments:
        region = match(scene, segment)
        truth = "nothing" if region is None else words(scene, region)
        texts.append(segment.text if segment.text == truth else f"{segment.text} [truth: {truth}]")
    side = len(scene.image) * ENLARGED
    picture = Image.fromarray(scene.image).resize((side, side), Image.Resampling.NEAREST)
    masks = decode_rles([segment.segmentation for segment in segments])
    masks = masks.repeat(ENLARGED, axis=-2).repeat(ENLARGED, axis=-1) if segments else masks
    draw = ImageDraw.Draw(picture)
    for segment in segments:
        if "box" in segment.prompt:
            draw.rectangle([ENLARGED * x for x in segment.prompt["box"]], outline="white", width=3)
        else:
            x, y = (ENLARGED * (place + 0.5) for place in segment.prompt["point"])
            draw.ellipse([x - 8, y - 8, x + 8, y + 8], fill="white", outline="black", width=3)
    if not segments:
        return draw_words(np.asarray(picture), masks, ["nothing was found"])
    return draw_regions(np.asarray(picture), masks, texts, tint=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = functools.partial(parser.add_argument, type=Path, metavar="DIR")
    add("--output", default=Path("outputs/demo-sam"), help="default: outputs/demo-sam")
    add("--osprey", default=Path("outputs/demo/run/export"), help="default: outputs/demo/run/export")
    args = parser.parse_args(argv)
    start = time.monotonic()
    if not args.osprey.is_dir():
        print(f"error: no checkpoint {args.osprey}; `make demo` makes one", file=sys.stderr)
        return 2
    use_compilation_cache()
    config, settings, checkpoint = tiny(), Settings(), args.output / "checkpoint"
    training = 0.0
    try:
        if not checkpoint.is_dir():
            saved = args.output / "training.npz"
            why, training = train_checkpoint(checkpoint, saved, config, settings)
            if why:
                print(why)
                return 1
        sam = Sam.load(checkpoint)
        osprey = Osprey.load(args.osprey, dtype="float32")
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2

    source = Shapes(split="held_out", seed=1, size=config.encoder.image_size)
    scores = score(sam, source)
    rows = summarise(scores)
    print_table(rows)
    told = draw_examples(sam, osprey, source, args.output)
    click, box = (row for row in rows if row.kind == "all")
    metrics = {
        "click_iou": click.iou,
        "click_best_of_3_iou": click.best,
        "click_single_iou": click.single,
        "box_iou": box.iou,
        "regions": click.regions,
        **told,
        "kinds": [row._asdict() for row in rows],
        "training_seconds": round(training, 1),
        "seconds": round(time.monotonic() - start, 1),
    }
    (args.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(
        f"mean IoU on {click.regions} held-out regions: {click.iou:.3f} for a click, {box.iou:.3f} for a "
        f"box; {metrics['seconds']:.0f} s\n"
        f"see points.png, boxes.png, everything.png and metrics.json in {args.output}"
    )
    if click.iou < CLICK or box.iou < BOX:
        print(
            f"error: it did not learn: at least {CLICK} and {BOX} were expected",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
