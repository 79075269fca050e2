"""What bfloat16 costs: logit error and agreement of greedy tokens against float32, on one checkpoint.

    python benchmarks/precision.py --checkpoint D [--image photo.jpg] [--regions 16] [--tokens 32]

Answers the demo's short question about random ellipses of the image (a synthetic one by default) in both
dtypes, and compares: logits over the prompt with the float32 answer's text behind it, the likeliest token at
each place of that text (bfloat16 given the same beginning), and the answers that each dtype gives on its own.
"""

import argparse

import numpy as np

from osprey_jax import Osprey
from osprey_jax.image import load_image
from osprey_jax.prompt import PROTOCOLS


def synthetic_image(rng: np.random.Generator) -> np.ndarray:
    """A `(480, 640, 3)` uint8 picture of blurred blocks and noise."""
    blocks = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((80, 80, 1)))
    return np.clip(blocks + rng.normal(0, 12, blocks.shape), 0, 255).astype(np.uint8)


def ellipses(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Random ellipses as `(count, height, width)` bool masks."""
    rows, columns = np.mgrid[:height, :width]
    y, x = rng.uniform(0.1, 0.9, (2, count)) * np.array([[height], [width]])
    b, a = rng.uniform(0.03, 0.3, (2, count)) * np.array([[height], [width]])
    return np.stack([((rows - y[i]) / b[i]) ** 2 + ((columns - x[i]) / a[i]) ** 2 < 1 for i in range(count)])


def main() -> None:
    """Runs the comparison and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--image")
    parser.add_argument("--regions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    image = load_image(args.image) if args.image else synthetic_image(rng)
    masks = ellipses(rng, args.regions, *image.shape[:2])
    prompt = PROTOCOLS["demo_short"].prompt()
    whole, half = (Osprey.load(args.checkpoint, dtype=dtype) for dtype in ("float32", "bfloat16"))
    answers = [o.generate(image, masks, prompt, max_new_tokens=args.tokens) for o in (whole, half)]

    errors, places, same_choice, own_prefix, own_total = [], 0, 0, 0, 0
    for mask, exact, rounded in zip(masks, *answers, strict=True):
        # The text's ids may not be the answer's, so both dtypes are compared on the text.
        asked = prompt + " " + exact.text
        exact_logits, rounded_logits = (o.logits(image, mask[None], asked) for o in (whole, half))
        errors.append(np.abs(rounded_logits - exact_logits).max() / np.abs(exact_logits).max())
        tail = len(whole.tokenize(asked)) - len(whole.tokenize(prompt)) + 1
        same_choice += int((exact_logits[-tail:].argmax(-1) == rounded_logits[-tail:].argmax(-1)).sum())
        places += tail
        pairs = zip(exact.token_ids, rounded.token_ids, strict=False)
        own_prefix += next((i for i, (a, b) in enumerate(pairs) if a != b), len(exact.token_ids))
        own_total += len(exact.token_ids)
    equal = sum(a.token_ids == b.token_ids for a, b in zip(*answers, strict=True))
    print(f"largest logit error / largest logit   median {np.median(errors):.1e}, worst {max(errors):.1e}")
    print(f"same likeliest token, same beginning  {same_choice} of {places} = {same_choice / places:.1%}")
    print(f"equal answers                         {equal} of {len(masks)}")
    print(f"tokens before the answers part        {own_prefix} of {own_total} = {own_prefix / own_total:.1%}")


if __name__ == "__main__":
    main()
