"""What low precision costs, against float32, on one checkpoint: a row for bfloat16 and each quantisation.

    python -m benchmarks.precision --checkpoint D [--image photo.jpg | --shapes 4] [--tokens 32]
    python -m benchmarks.precision --random small

Asks the demo's short question about random ellipses of the image (a synthetic one by default) or about the
regions of N held-out scenes of `data_pipelines/shapes`, and compares with float32: logits over the prompt
with float32's answer behind it, the likeliest token at each place of that answer (given the same beginning),
and the answers that each gives on its own. Prints a table in Markdown; a logit error is a region's largest
one over its largest logit. Quantised models compute in float32 otherwise; MiB are those of all parameters in
memory, with half a byte for four bits.
"""

import argparse
import tempfile
from collections.abc import Sequence

import jax
import numpy as np

from benchmarks.synthetic import SIZES, ellipses, load_tokenizer, random_params, synthetic_image
from data_pipelines.shapes import Shapes
from osprey_jax import Osprey
from osprey_jax.checkpoint import save_params
from osprey_jax.image import load_image
from osprey_jax.predictor import Generation
from osprey_jax.prompt import PROTOCOLS
from osprey_jax.quantize import SCHEMES

PROMPT = PROTOCOLS["demo_short"].prompt()
Asked = Sequence[tuple[np.ndarray, np.ndarray]]
"""Images with their masks."""


def held_out(size: int, count: int) -> Asked:
    """Images and masks of so many scenes that no training has seen."""
    source = Shapes(split="held_out", size=size)
    return [(scene.image, scene.masks) for scene in map(source.scene, range(count))]


def answer(osprey: Osprey, asked: Asked, tokens: int) -> list[Generation]:
    """Answers about all regions."""
    return [
        one for image, masks in asked for one in osprey.generate(image, masks, PROMPT, max_new_tokens=tokens)
    ]


def logits(osprey: Osprey, asked: Asked, answers: Sequence[Generation]) -> list[np.ndarray]:
    """Logits over the prompt and each answer's text, whose ids may not be the answer's."""
    regions = [(image, mask[None]) for image, masks in asked for mask in masks]
    return [osprey.logits(*each, f"{PROMPT} {one.text}") for each, one in zip(regions, answers, strict=True)]


def mebibytes(osprey: Osprey) -> float:
    """What the parameters take."""
    leaves = jax.tree.leaves(osprey.params)
    return sum(x.size * (0.5 if x.dtype == "int4" else x.dtype.itemsize) for x in leaves) / 2**20


def main() -> None:
    """Runs the comparison and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--checkpoint", metavar="DIR")
    weights.add_argument("--random", choices=SIZES, help="random weights of this size instead")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--image")
    source.add_argument("--shapes", type=int, metavar="N", help="ask about N held-out scenes")
    parser.add_argument("--regions", type=int, default=16, help="ellipses of the image")
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    if args.checkpoint:
        compare(args.checkpoint, args)
        return
    with tempfile.TemporaryDirectory() as directory:
        config, tokenizer = SIZES[args.random], load_tokenizer(None)
        params = random_params(config, "float32", eos_id=tokenizer.eos_id, quantization=None)
        save_params(f"{directory}/random", params, config, tokenizer)
        del params
        compare(f"{directory}/random", args)


def compare(checkpoint: str, args: argparse.Namespace) -> None:
    """Compares all precisions of a checkpoint; prints the table."""
    whole = Osprey.load(checkpoint, dtype="float32")
    if args.shapes:
        asked = held_out(whole.config.vision.image_size, args.shapes)
    else:
        rng = np.random.default_rng(0)
        image = load_image(args.image) if args.image else synthetic_image(rng)
        asked = [(image, ellipses(rng, args.regions, *image.shape[:2]))]
    answers = answer(whole, asked, args.tokens)
    exact = logits(whole, asked, answers)
    prompt = len(whole.tokenize(PROMPT))
    tails = [len(whole.tokenize(f"{PROMPT} {one.text}")) - prompt + 1 for one in answers]
    places, words = sum(tails), sum(len(one.token_ids) for one in answers)

    print(f"{len(answers)} regions, {words} tokens answered, {places} places compared; {jax.devices()[0]}\n")
    print("| | MiB | logit error, median | worst | same likeliest token | equal answers |")
    print("|---|---|---|---|---|---|")
    print(f"| float32 | {mebibytes(whole):.1f} | | | | |")
    for name in ("bfloat16", *SCHEMES):
        quantization = name if name in SCHEMES else None
        dtype = "float32" if quantization else name
        rounded = Osprey.load(checkpoint, dtype=dtype, quantize=quantization)
        found = logits(rounded, asked, answers)
        errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, exact, strict=True)]
        same = sum(
            int((a[-tail:].argmax(-1) == b[-tail:].argmax(-1)).sum())
            for a, b, tail in zip(found, exact, tails, strict=True)
        )
        own = answer(rounded, asked, args.tokens)
        equal = sum(a.token_ids == b.token_ids for a, b in zip(own, answers, strict=True))
        print(
            f"| {name} | {mebibytes(rounded):.1f} | {np.median(errors):.1e} | {max(errors):.1e} "
            f"| {same} of {places} = {same / places:.1%} | {equal} of {len(answers)} |"
        )


if __name__ == "__main__":
    main()
