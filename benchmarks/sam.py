"""SAM's image encoder and mask decoder, here and in transformers' torch model, interleaved; then everything.

    python -m benchmarks.sam [--rounds 5] [--points 1024] [--batch 64] [--threads 2] [--everything photo.jpg]
    python -m benchmarks.sam --no-torch --dtype bfloat16 --everything photo.jpg               # on a GPU

ViT-B at full size with the same random weights on both sides, torch with its scaled-dot-product attention.
Embeddings, masks' logits and IoUs must agree before anything is timed. Then each round times the encoding of
one image and the decoding of all points, three masks each, in batches of the same size, on both sides, first
one, then the other. `--everything` finds everything in a photograph with the original's defaults, but for
`--pred-iou-thresh` and `--stability-score-thresh`, which random weights would not reach.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from osprey_jax.image import load_image
from osprey_jax.sam.config import vit_b
from osprey_jax.sam.everything import Options, find
from osprey_jax.sam.network import init_params
from osprey_jax.sam.predictor import Embedding, Sam
from osprey_jax.sam.prompt_encoder import FOREGROUND, PADDING
from osprey_jax.sam.transforms import preprocess

TOLERANCE = 1e-3
"""Of the reference's range, within which both sides must agree."""


class Torch:
    """The torch model, and ours with its weights."""

    def __init__(self, threads: int):
        import torch
        import transformers

        from osprey_jax.convert_sam import convert

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.torch = torch
        self.model = transformers.SamModel(transformers.SamConfig()).eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "rel_pos" in name or name.endswith("pos_embed"):
                    parameter.normal_(0, 0.02)
        with tempfile.TemporaryDirectory() as directory:
            self.model.save_pretrained(f"{directory}/torch")
            convert(f"{directory}/torch", f"{directory}/ours")
            self.ours = Sam.load(f"{directory}/ours")

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        with self.torch.inference_mode():
            found = self.model.vision_encoder(self.torch.from_numpy(pixels).permute(2, 0, 1)[None])
        return found.last_hidden_state[0].permute(1, 2, 0).numpy()

    def decode(self, features: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        given = self.torch.from_numpy(points)[None, :, None]
        with self.torch.inference_mode():
            found = self.model(
                image_embeddings=self.torch.from_numpy(features).permute(2, 0, 1)[None],
                input_points=given,
                input_labels=self.torch.ones(given.shape[:3], dtype=self.torch.int32),
                multimask_output=True,
            )
        return found.pred_masks[0].numpy(), found.iou_scores[0].numpy()


def decode(sam: Sam, embedding: Embedding, points: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Three masks for each point, in one batch."""
    places = np.pad(points[:, None], ((0, 0), (0, 1), (0, 0)))
    kinds = np.tile(np.array([FOREGROUND, PADDING], np.int32), (len(points), 1))
    return jax.block_until_ready(sam.decode(embedding, places, kinds, multimask=True))


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def agrees(name: str, ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Says by how much both sides differ, and whether that is little enough."""
    difference = float(np.abs(np.asarray(ours) - theirs).max() / np.ptp(theirs))
    print(f"{name}: the largest difference is {difference:.1e} of the range")
    return difference <= TOLERANCE


def main() -> int:
    """Runs all and prints what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--points", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64, help="points that are decoded at a time")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--no-torch", action="store_true", help="our side alone")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of ours")
    parser.add_argument("--everything", type=Path, metavar="FILE", help="a photograph")
    parser.add_argument("--pred-iou-thresh", type=float, default=0.0)
    parser.add_argument("--stability-score-thresh", type=float, default=0.0)
    args = parser.parse_args()
    if not args.no_torch and args.dtype != "float32":
        parser.error("torch computes in float32; --dtype goes with --no-torch")

    reference = None if args.no_torch else Torch(args.threads)
    config = vit_b()
    sam = (
        reference.ours if reference else Sam(config, init_params(config, jax.random.key(0)), dtype=args.dtype)
    )
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    pixels = preprocess(image, side=1024)
    points = rng.uniform(0, 1024, (args.points, 2)).astype(np.float32)
    batches = np.split(points, range(args.batch, args.points, args.batch))
    embedding = sam.encode(image)
    first = decode(sam, embedding, batches[0])
    if reference:
        features = reference.encode(pixels)
        masks, ious = reference.decode(features, batches[0])
        if not all([
            agrees("embedding", embedding.features, features),
            agrees("logits", first[0], masks),
            agrees("expected IoUs", first[1], ious),
        ]):  # fmt: skip
            return 1

    def encode_here() -> None:
        jax.block_until_ready(sam.encode(image).features)

    def decode_here() -> None:
        for batch in batches:
            decode(sam, embedding, batch)

    steps: dict[str, dict[str, Callable[[], object]]] = {
        "encoder": {"here": encode_here},
        "decoder": {"here": decode_here},
    }
    if reference:
        steps["encoder"]["torch"] = lambda: reference.encode(pixels)
        steps["decoder"]["torch"] = lambda: [reference.decode(features, batch) for batch in batches]
    print(
        f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, JAX {jax.__version__}, "
        f"{args.dtype}, {commit()}"
    )
    print(f"decoder: {args.points} points in batches of {args.batch}, {args.rounds} rounds")
    for name, sides in steps.items():
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(args.rounds):
            order = list(sides) if number % 2 else list(reversed(sides))
            for side in order:
                seconds[side].append(timed(sides[side]))
        told = ", ".join(f"{side} {statistics.median(times):.3g} s" for side, times in seconds.items())
        if reference:
            ratios = [a / b for a, b in zip(seconds["here"], seconds["torch"], strict=True)]
            told += f", ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name}: {told}", flush=True)
    if args.everything:
        time_everything(sam, args)
    return 0


def time_everything(sam: Sam, args: argparse.Namespace) -> None:
    """Everything in a photograph, twice: compiling and compiled."""
    photo = load_image(args.everything)
    options = Options(
        pred_iou_thresh=args.pred_iou_thresh, stability_score_thresh=args.stability_score_thresh
    )
    for run in ("with compilation", "compiled"):
        start = time.perf_counter()
        found = find(sam, photo, options)
        seconds = time.perf_counter() - start
        print(
            f"everything in {photo.shape[1]} x {photo.shape[0]}, {run}: {seconds:.3g} s, "
            f"{len(found.records)} masks"
        )


def commit() -> str:
    """Of the code."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return f"commit {git.stdout.strip()}, {time.strftime('%Y-%m-%d')}"


if __name__ == "__main__":
    sys.exit(main())
