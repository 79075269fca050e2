"""Samples per second that one core makes, here and in the loop that torch's libraries suggest, interleaved.

    python -m benchmarks.data [--samples 60] [--core 1]

A sample is a JPEG of 640 x 480, seven regions as polygons, and a conversation about them. Here it becomes
what the loader collates: `segmentation_rle`, then `transforms.encode`, tokens and labels included. The other
loop is transformers' CLIP image processor (Pillow's), torch's `interpolate` to the square, pycocotools'
`merge` and `decode` of polygons, and `interpolate` of the masks to the four levels and to 112; it makes no
tokens. Both must give the same pixels and masks before anything is timed. Pictures and regions are drawn from
a seed: noise of all scales over coloured polygons, about 85 KB each, for it is detail that takes time to
decode.

Prints each side's median and what its steps take, in the process's time, so that neighbours on the core count
for little. The steps here are timed one by one, in turns of their own.
"""

import argparse
import collections
import dataclasses
import io
import math
import os
import statistics
import sys
import time
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil

from data_pipelines.records import Record, Turn
from data_pipelines.transforms import encode, encode_text
from osprey_jax.config import osprey_7b
from osprey_jax.image import MEAN, STD, load_image, preprocess
from osprey_jax.masks import MaskPyramid, decode_rles, mask_pyramid, segmentation_rle
from osprey_jax.prompt import REGION, SYSTEM_TRAINING, Tokenizer

WIDTH, HEIGHT, REGIONS = 640, 480, 7
CONFIG = osprey_7b()
SIZE, POSITION = CONFIG.vision.image_size, CONFIG.extractor.position_size
LIMITS: dict[str, Any] = {
    "length": 2048,
    "regions": REGIONS,
    "system": SYSTEM_TRAINING,
    "loss_per": "dialogue",
    "part": 0,
}
PROCESSOR = CLIPImageProcessorPil(
    size={"shortest_edge": SIZE},
    resample=Image.Resampling.BICUBIC,
    do_center_crop=False,
    image_mean=MEAN.tolist(),
    image_std=STD.tolist(),
)
BICUBIC = "  (Pillow's bicubic alone)"
NAMES = ("a dog", "the wheel", "a wooden bench", "a person in red", "the left window", "a tree", "the road")


@dataclasses.dataclass(frozen=True)
class Sample:
    """What lies on the disk: a file's bytes, and COCO's polygons of each region."""

    jpeg: bytes
    segmentations: list[list[list[float]]]

    def record(self) -> Record:
        """As a source would give it."""
        turns = [
            Turn(f"What is {REGION}? Answer in a short phrase.", name, (i,)) for i, name in enumerate(NAMES)
        ]
        return Record(
            sample_id="benchmark",
            image=self.jpeg,
            masks=tuple(segmentation_rle(polygons, HEIGHT, WIDTH) for polygons in self.segmentations),
            turns=tuple(turns),
            opening="<image>\nThis provides an overview of the picture.\n",
        )


class Laps:
    """Seconds of named steps, each from where the one before it ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = collections.defaultdict(list)
        self.start()

    def start(self) -> None:
        """Begins a sample's first step."""
        self._last = time.process_time()

    def end(self, step: str) -> None:
        """Ends a step and begins the next."""
        now = time.process_time()
        self.seconds[step].append(now - self._last)
        self._last = time.process_time()


def make_sample(rng: np.random.Generator) -> Sample:
    """Draws a picture and the regions that can be seen in it."""
    outlines = [outline(rng) for _ in range(REGIONS)]
    picture = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize((WIDTH, HEIGHT))
    draw = ImageDraw.Draw(picture)
    for points in outlines:
        draw.polygon(points, fill=tuple(rng.integers(0, 256, 3).tolist()))
    pixels = np.array(picture, np.float32)
    for scale in (40, 20, 10, 5, 2, 1):
        noise = Image.fromarray(rng.normal(size=(HEIGHT // scale, WIDTH // scale)).astype(np.float32))
        pixels += np.float32(4 + 2 * math.sqrt(scale)) * np.asarray(noise.resize((WIDTH, HEIGHT)))[:, :, None]
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    polygons = [[round(value, 2) for point in points for value in point] for points in outlines]
    return Sample(file.getvalue(), [[polygon] for polygon in polygons])


def outline(rng: np.random.Generator) -> list[tuple[float, float]]:
    """A region of 20 to 60 points around a random place, clipped at the picture's edges."""
    angles = np.linspace(0, 2 * np.pi, rng.integers(20, 61), endpoint=False)
    radii = rng.uniform(20, 150) * (1 + 0.3 * np.sin(3 * angles + rng.uniform(0, 6)))
    radii *= rng.uniform(0.9, 1.1, angles.shape)
    x = (rng.uniform(60, WIDTH - 60) + radii * np.cos(angles)).clip(0, WIDTH)
    y = (rng.uniform(60, HEIGHT - 60) + radii * np.sin(angles)).clip(0, HEIGHT)
    return list(zip(x.tolist(), y.tolist(), strict=True))


def torch_loop(sample: Sample, laps: Laps) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Pixels (3, S, S), levels (R, Y, X) and position (R, P, P), by transformers, torch and pycocotools."""

    def resized(x: torch.Tensor, side: int) -> torch.Tensor:
        return F.interpolate(x[None], size=(side, side), mode="bilinear", align_corners=False)[0]

    laps.start()
    image = Image.open(io.BytesIO(sample.jpeg)).convert("RGB")
    laps.end("JPEG to pixels")
    pixels = PROCESSOR.preprocess(image, return_tensors="pt")["pixel_values"][0]
    laps.end("image processor")
    pixels = resized(pixels, SIZE)
    laps.end("interpolate to the square")
    rles = [coco_mask.merge(coco_mask.frPyObjects(s, HEIGHT, WIDTH)) for s in sample.segmentations]
    laps.end("polygons to RLE")
    masks = torch.Tensor(np.array([coco_mask.decode(rle) for rle in rles]))
    laps.end("RLE to masks")
    levels = [resized(masks, side) > 0 for side in CONFIG.vision.level_sizes]
    position = resized(masks, POSITION)
    laps.end("masks to pyramid")
    return pixels, levels, position


def our_steps(
    sample: Sample, tokenizer: Tokenizer, rng: np.random.Generator, laps: Laps
) -> tuple[np.ndarray, MaskPyramid]:
    """What `encode` does, one step after another, and Pillow's bicubic once more for itself."""
    laps.start()
    pixels = load_image(Image.open(io.BytesIO(sample.jpeg)))
    laps.end("JPEG to pixels")
    image = preprocess(pixels, size=SIZE)
    laps.end("preprocess")
    Image.fromarray(pixels).resize((SIZE * WIDTH // HEIGHT, SIZE), Image.Resampling.BICUBIC)
    laps.end(BICUBIC)
    record = sample.record()
    laps.end("polygons to RLE")
    masks = decode_rles(record.masks)
    laps.end("RLE to masks")
    pyramid = mask_pyramid(masks, level_sizes=CONFIG.vision.level_sizes, position_size=POSITION)
    laps.end("masks to pyramid")
    encode_text(record, tokenizer, CONFIG, rng=rng, **LIMITS)
    laps.end("conversation to tokens, labels")
    return image, pyramid


def difference(sample: Sample, tokenizer: Tokenizer) -> str | None:
    """Says where both sides disagree about a sample."""
    pixels, levels, position = torch_loop(sample, Laps())
    image, pyramid = our_steps(sample, tokenizer, np.random.default_rng(0), Laps())
    example = encode(sample.record(), tokenizer, CONFIG, rng=np.random.default_rng(0), **LIMITS)
    assert example.image is not None
    if (worst := np.abs(example.image - pixels.permute(1, 2, 0).numpy()).max()) > 1.5e-6:
        return f"pixels differ by {worst}"
    for mine, theirs in zip(example.masks.levels, levels, strict=True):
        if not np.array_equal(mine, theirs.numpy()):
            return f"masks of the level {theirs.shape[-1]} differ"
    if (worst := np.abs(np.asarray(example.masks.position) - position.numpy()).max()) > 1e-6:
        return f"position masks differ by {worst}"
    same = np.array_equal(image, example.image) and np.array_equal(pyramid.position, example.masks.position)
    return None if same else "the steps don't make what encode makes"


def print_steps(title: str, laps: Laps) -> None:
    """A table of medians in milliseconds."""
    print(f"\n{title}, ms")
    for step, seconds in laps.seconds.items():
        print(f"  {step:35}{1e3 * statistics.median(seconds):6.2f}")


def main() -> int:
    """Runs both sides in turns and prints what they took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=60, help="how many, all different")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="where both sides run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)

    with TemporaryDirectory() as directory:
        # Of 32,000 pieces, as Vicuna's.
        model = resources.files("mistral_common") / "data" / "tokenizer.model.v1"
        Path(directory, "tokenizer.model").write_bytes(model.read_bytes())
        tokenizer = Tokenizer.load(directory)
    rng = np.random.default_rng(args.seed)
    samples = [make_sample(rng) for _ in range(args.samples)]
    for sample in samples[:3]:  # which also warms both up
        if message := difference(sample, tokenizer):
            print(f"error: {message}", file=sys.stderr)
            return 1

    theirs, ours = Laps(), Laps()
    seconds: dict[str, list[float]] = {"here": [], "torch": []}

    def here(sample: Sample) -> None:
        encode(sample.record(), tokenizer, CONFIG, rng=rng, **LIMITS)

    turns = (("here", here), ("torch", lambda sample: torch_loop(sample, theirs)))
    for number, sample in enumerate(samples):
        for name, run in turns if number % 2 else reversed(turns):
            start = time.process_time()
            run(sample)
            seconds[name].append(time.process_time() - start)
        our_steps(sample, tokenizer, rng, ours)

    size = statistics.mean(len(sample.jpeg) for sample in samples) / 1000
    print(f"{args.samples} samples: JPEGs of {WIDTH} x {HEIGHT}, {size:.0f} KB, {REGIONS} regions; one core")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:6}{1e3 * median:6.1f} ms a sample, {1 / median:4.0f} samples/s")
    ratios = [b / a for a, b in zip(seconds["here"], seconds["torch"], strict=True)]
    print(f"ratio {statistics.median(ratios):6.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")
    print_steps("here", ours)
    print_steps("torch, transformers, pycocotools", theirs)
    medians = {step: statistics.median(values) for step, values in ours.seconds.items()}
    pillow = medians["JPEG to pixels"] + medians[BICUBIC]
    share = pillow / (sum(medians.values()) - medians[BICUBIC])
    print(f"\nbound by Pillow's decoder and bicubic: {1e3 * pillow:.1f} ms, {share:.0%} of the steps here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
