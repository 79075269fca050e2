"""`inspect`: shows one sample as the model will see it, in words, as a picture or as JSON."""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from data_pipelines import command_line, looking, sample_figure
from data_pipelines.reasons import message
from osprey_jax.masks import rle_area
from osprey_jax.prompt import Tokenizer

_EXAMPLES = """\
examples:
  python -m data_pipelines inspect --source shapes --index 0 --figure sample.png
  python -m data_pipelines inspect --source osprey_short_form --annotations osprey_short_form.json \\
      --images coco/imgs --index 3 --tokenizer checkpoints/osprey
  python -m data_pipelines inspect --source custom --annotations mine.jsonl --index 0 --json

Samples that the source drops have no index. What is drawn anew for each epoch (order, ways to ask) depends on
seed, epoch and index, as in training; unlike there, nothing is split for being too long.

--json prints one object: input_ids (-200 for the image, once), labels (-100 where there is no loss), masks
(COCO RLEs in the order of the prompt; a region named twice is there twice), mask_areas in pixels, mask_shapes
(height, width), text (the whole prompt).
"""


def to_json(sample: looking.Sample) -> str:
    """The sample as one JSON object on one line."""
    masks = [dict(sample.record.masks[region.mask]) for region in sample.regions]
    return json.dumps(
        {
            "input_ids": sample.dialogue.input_ids,
            "labels": sample.dialogue.labels,
            "masks": masks,
            "mask_areas": [rle_area(mask) for mask in masks],
            "mask_shapes": [list(mask["size"]) for mask in masks],
            "text": sample.text,
        }
    )


def to_text(sample: looking.Sample, tokenizer: Tokenizer, *, colour: bool) -> str:
    """The sample for a terminal; without colour, what carries loss stands in double brackets."""
    before, after = ("\033[1;32m", "\033[0m") if colour else ("[[", "]]")
    words = "".join(
        f"{before}{span.text}{after}" if span.has_loss else span.text
        for span in looking.spans(sample.dialogue, tokenizer)
    )
    # A turn ends with </s>, which carries loss: the next one begins on a line of its own.
    words = words.replace(f"</s>{after}", f"</s>{after}\n")
    record, said = sample.record, sample.conversation
    lines = [
        f"{record.sample_id}: {looking.counts(sample.dialogue)} ({before}in this way{after})",
        "",
        words.rstrip("\n"),
        "",
    ]
    width = shutil.get_terminal_size((110, 24)).columns
    for number, (region, area) in enumerate(zip(sample.regions, looking.areas(sample), strict=True), 1):
        line = f"  region {number:<3} {area:<22}  {' '.join(command_line.printable(region.answer).split())}"
        lines.append(line.rstrip() if len(line) < width else f"{line[: width - 2]}…")
    if not sample.regions:
        lines.append("  no regions" if record.image is not None else "  no image")
    if said.dropped_regions:
        why = "their masks are empty or broken"
        lines.append(f"  left out with their turns, for {why}: {said.dropped_regions} regions")
    had = len(record.turns) + len(record.broken_regions) - said.dropped_regions
    if (left := had - len(said.said)) > 0:
        lines.append(f"  not drawn: {left} of {len(record.turns)} turns; at most {record.at_most} are kept")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads."""
    parser.epilog = _EXAMPLES
    command_line.add_source_arguments(parser)
    command_line.add_tokenizer_argument(parser)
    add = parser.add_argument
    add("--index", type=int, required=True, metavar="N", help="which sample, from 0")
    add("--seed", type=int, default=0, help="of what is drawn; default: 0")
    add("--epoch", type=int, default=0, help="of what is drawn; default: 0")
    add("--figure", type=Path, metavar="FILE", help="draws image, masks and words, .png or .jpg")
    add("--json", action="store_true", help="prints one JSON object instead of words; see below")


def run(args: argparse.Namespace) -> int:
    """Shows a sample; returns 1 for one that can't be used.

    Raises ValueError or OSError for what was asked wrongly.
    """
    command_line.check_figure(args.figure)
    if len(args.sources) > 1:
        raise ValueError(f"inspect looks at one --source, got {len(args.sources)}")
    if min(args.seed, args.epoch) < 0:
        raise ValueError(f"--seed and --epoch can't be negative, got {args.seed} and {args.epoch}")
    (source,) = command_line.open_sources(args.sources)
    if not 0 <= args.index < len(source):
        raise ValueError(
            f"no sample {args.index} in {source.name}: --index goes from 0 to {len(source) - 1}"
            f"{command_line.dropped(source)}"
        )
    tokenizer = command_line.open_tokenizer(args.tokenizer)
    try:
        sample = looking.look(source, args.index, tokenizer, seed=args.seed, epoch=args.epoch)
    except Exception as error:
        # As in training, which skips a sample whatever is wrong with it.
        which = f"{source.name}[{args.index}], image {source.image_key(args.index)},"
        print(f"error: {which} can't be used, training skips it: {message(error)}", file=sys.stderr)
        return 1
    if args.figure is not None:
        command_line.save_figure(sample_figure.draw_sample(sample, tokenizer), args.figure)
    if args.json:
        print(to_json(sample))
    else:
        if args.tokenizer is None:
            print(command_line.SMALL_TOKENIZER, file=sys.stderr)
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        command_line.echo(to_text(sample, tokenizer, colour=colour))
    return 0
