"""`stats`: tells how long samples are, how many regions they name, and what buckets of them waste."""

import argparse
import shutil
import sys
from pathlib import Path

from data_pipelines import command_line, histograms, sample_sizes, statistics_report

_EXAMPLES = """\
examples:
  python -m data_pipelines stats --source shapes --samples 200
  python -m data_pipelines stats --buckets 1408x16,2048x32 --figure lengths.png \\
      --tokenizer checkpoints/osprey \\
      --source osprey_short_form --annotations osprey_short_form.json --images coco/imgs \\
      --source vg --annotations vg_train_with_mask.json --images vg/image

Of several sources together the samples are drawn, so each counts by its size, as in training without weights.
Images are looked for but not decoded: `kept` samples may still have a damaged one.

A bucket is a length in tokens, image included, and a number of regions: what sequences are padded to. A
sequence alone takes the smallest bucket that holds it; of a batch all take the one that holds every one, so
padding is more where several are in a batch, and less where packing fills rows up.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads."""
    parser.epilog = _EXAMPLES
    command_line.add_source_arguments(parser)
    command_line.add_tokenizer_argument(parser)
    add = parser.add_argument
    add("--samples", type=int, default=1000, metavar="N", help="how many to look at, drawn; default: 1000")
    add("--seed", type=int, default=0, help="of what is drawn; default: 0")
    add("--buckets", metavar="LxR,LxR", help='tells what these waste, as in "1408x16,2048x32"')
    add("--figure", type=Path, metavar="FILE", help="draws the histograms, .png or .jpg")
    add("--json", action="store_true", help="prints one JSON object instead of words")


def run(args: argparse.Namespace) -> int:
    """Tells about samples; returns 1 where none can be used.

    Raises ValueError or OSError for what was asked wrongly.
    """
    buckets = sample_sizes.parse_buckets(args.buckets) if args.buckets is not None else ()
    command_line.check_figure(args.figure)
    if args.samples < 1 or args.seed < 0:
        raise ValueError(
            f"--samples must be positive and --seed not negative, got {args.samples} and {args.seed}"
        )
    sources = command_line.open_sources(args.sources)
    tokenizer = command_line.open_tokenizer(args.tokenizer)
    largest = buckets[-1] if buckets else None
    found = sample_sizes.measure(sources, tokenizer, samples=args.samples, seed=args.seed, largest=largest)
    if not found.lengths:
        for line in statistics_report.source_lines(found.tallies):
            print(line, file=sys.stderr)
        print("error: none of the samples can be used", file=sys.stderr)
        return 1
    if args.figure is not None:
        marks = [[(float(b[axis]), f"{b[axis]:,}") for b in buckets] for axis in (0, 1)] + [[]]
        names = [tally.name for tally in found.tallies]
        heading = ", ".join(names) if len(names) <= 10 else f"{len(names)} sources"
        heading = f"{heading}: {len(found.lengths):,} samples"
        picture = histograms.draw(statistics_report.histograms_of(found), marks=marks, heading=heading)
        command_line.save_figure(picture, args.figure)
    if args.tokenizer is None:
        print(command_line.SMALL_TOKENIZER, file=sys.stderr)
    if args.json:
        print(statistics_report.to_json(found, buckets))
    else:
        blocks = "utf" in (sys.stdout.encoding or "").lower()
        width = shutil.get_terminal_size((100, 24)).columns
        command_line.echo(statistics_report.to_text(found, buckets, width=min(width, 120), blocks=blocks))
    return 0
