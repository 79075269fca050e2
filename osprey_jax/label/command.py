"""The command line of `python -m osprey_jax.label`."""

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from osprey_jax.checkpoint import load_quantization
from osprey_jax.command_options import add_options, level_of, question_of, requested
from osprey_jax.directories import as_path
from osprey_jax.label import gallery
from osprey_jax.label import plan as plans
from osprey_jax.label.estimate import estimate
from osprey_jax.label.inputs import Input
from osprey_jax.label.job import Asked, label
from osprey_jax.label.opening import open_input
from osprey_jax.label.output import Note, Output, check_run, read_note, read_run
from osprey_jax.label.setting import model_version, version
from osprey_jax.label.ways import Choice, Way, Words, read_vocabulary
from osprey_jax.predictor import Osprey
from osprey_jax.prompt import PROTOCOLS, Tokenizer
from osprey_jax.request import checked_question

USAGE_ERROR = 2
INTERRUPTED = 130
"""The exit status of what Ctrl-C has ended."""
GIVE_UP_AFTER = 500
FORMAT = 1
"""Of the lines."""
WORDS_ALONE = ("level", "max_new_tokens", "temperature", "top_p", "seed", "stop")
LABELS_ALONE = ("threshold", "min_logprob")
"""Options without a meaning for the other way to answer."""

_EXAMPLE = """\
examples:
  python -m osprey_jax.label --checkpoint checkpoints/osprey --images coco/val2017 \\
      --masks annotations/instances_val2017.json --output words --dry-run
  python -m osprey_jax.label --checkpoint checkpoints/osprey --images coco/val2017 \\
      --masks annotations/instances_val2017.json --output words --gallery
  python -m osprey_jax.label --checkpoint checkpoints/osprey --images coco/val2017 \\
      --masks annotations/instances_val2017.json --output names --labels names.txt --min-logprob -4
The first tells how long the second will take; the third chooses among names of your own. Killed wherever it
may be, the same command goes on, and the files become the same, byte for byte, as without.

--images: a directory, a .tar of images, or a directory of .tar shards.
--masks, one of:
  instances.json        COCO json (polygons or RLEs)
  panoptic.json [DIR]   COCO panoptic json and the directory of its PNGs; default: panoptic/ beside it
  regions.jsonl …, DIR  JSON lines, files or a directory of them. A region is {"image": "a.jpg", "region": 7,
                        "label": "cup", "segmentation": RLE or polygons}, of which region and label may be
                        missing; an image is {"image": "a.jpg", "annotations": [{"segmentation": …}, …]}. What
                        this command and `describe` write is such: regions can be asked about again
  DIR or .tar of .json  SA-1B's: one for each image, with "image": {"file_name": …} and "annotations"
  DIR or .tar of .png   of a.jpg the label map a.png, a region for each value but 0 (in colours, for each
                        panoptic id R + 256 G + 65536 B but 0), or the masks a/….png or a_….png
--data: a directory that `python -m data_pipelines prepare` wrote, which has images and masks.

In the output, labels-00000-of-00004.jsonl has a line for each region: image (and record, its number in
--data), region (its id or label map's value, or the number from 1), label (category or mask file, if there is
one), box (x0, y0, x1, y1; the last two exclusive), area, segmentation (COCO RLE), question, text, logprob
(natural logarithm of the answer's probability), logprobs (of each token, the end included), model and prompt
(short names of their versions). Images and regions that can't be used are in skipped-00000-of-00004.jsonl,
with the reason. run.json has the setting; with another one the output is refused. It is what lines depend on:
question, decoding, checkpoint, and masks: .json and .jsonl files by what is in them, PNGs and SA-1B's files
by names and sizes, in a bucket by names alone. Where all of it lies and when it was written doesn't count, so
a copy will do. What isn't noticed: other images of the same names, and masks changed within the same sizes.

With --labels, text is one of the file's labels (one a line, in UTF-8; empty lines don't count; spelt as the
model would say it), or null below --threshold or --min-logprob. Instead of logprobs there is probability: the
label's, where those of all labels sum to one, so that it says little where no label fits. logprob, as
without, is the answer's among all that the model may say: low where no label fits.

Several hosts write one output: each runs the command with its own --host 0/4, 1/4, ….
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 after an error in what it was given."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m osprey_jax.label",
        description="Says in words what all regions of a data set's images are.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="made by convert_torch_ckpt.py or training")
    add("--images", metavar="PATH", help="with --masks; see below")
    add("--masks", nargs="+", default=(), metavar="PATH")
    add("--data", metavar="DIR", help="instead of the two: a prepared directory")
    add("--output", metavar="DIR", help="is made, or gone on with; not needed for --dry-run")
    add("--shards", type=int, metavar="N", help="files of output; default: one for 5,000 images")
    add("--host", metavar="I/N", help="this is host I (from 0) of N; default: as JAX knows it, or 0/1")
    add_options(parser)
    add("--labels", metavar="FILE", help="each region gets one of these labels, instead of words; see below")
    add(
        "--threshold",
        type=float,
        default=0.0,
        metavar="P",
        help="no label below this probability; default: 0",
    )
    add(
        "--min-logprob",
        type=float,
        default=-math.inf,
        metavar="L",
        help="nor below this logprob; default: -inf",
    )
    add(
        "--give-up-after",
        type=int,
        default=GIVE_UP_AFTER,
        metavar="N",
        help=f"images that fail one after another; default: {GIVE_UP_AFTER}",
    )
    add(
        "--dry-run",
        action="store_true",
        help="describes a sample, writes nothing, tells time and size of what is left to do",
    )
    add(
        "--gallery",
        nargs="?",
        const="",
        metavar="FILE",
        help="at the end, a page of some images with their words; default: gallery.html in the output",
    )
    return parser


def _run(args: argparse.Namespace) -> None:
    if args.labels is None:
        _refuse(args, LABELS_ALONE, "without")
    else:
        _refuse(args, WORDS_ALONE, "with")
    host, hosts = _host(args.host)
    if args.output is None and not args.dry_run:
        raise ValueError("where to? give --output, or --dry-run")
    if args.give_up_after < 1:
        raise ValueError(f"--give-up-after must be at least 1, got {args.give_up_after}")
    scheme = load_quantization(args.checkpoint, args.quantize)
    if args.data is not None and (args.images is not None or args.masks):
        raise ValueError("give --data, or --images with --masks, not both")
    way, question, setting = _words(args) if args.labels is None else _choice(args)
    usual = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    setting |= {"dtype": args.dtype or usual, "quantize": scheme}
    data = open_input(images=args.images, masks=args.masks, data=args.data)
    for sentence in data.left_out:
        print(f"warning: {sentence}", file=sys.stderr)
    output = None if args.output is None else as_path(args.output)
    plan = _plan(args.shards, data, output, hosts)
    model = model_version(args.checkpoint)
    asked = Asked(way, question, {"model": model, "prompt": version(setting)})
    run = {
        "setting": {
            "format": FORMAT,
            "images": len(data),
            "regions": data.fingerprint,
            "units": [plans.UNIT_IMAGES, plans.UNIT_REGIONS],
            "shards": plan.shards,
            "model": model,
            "prompt": setting,
        },
        "of": {name: getattr(args, name) for name in ("checkpoint", "images", "masks", "data", "labels")},
        "prompt": asked.versions["prompt"],
    }
    if output is not None:
        check_run(output, run)
    if args.dry_run:
        todo = _todo(plan, output)
        told = "nothing is left to do"
        print(estimate(_load(args), data, plan, asked, todo=todo, hosts=hosts) if todo else told)
        return
    assert output is not None, "seen above"
    _check_writable(output)
    page = None if args.gallery is None else as_path(args.gallery or output / "gallery.html")
    if page is not None:
        gallery.check_page(page, output)
    # A model that can't be loaded leaves nothing behind; one is needed unless a run is complete.
    osprey = _load(args) if read_run(output) is None else None
    shards = {shard: len(plan.units(shard)) for shard in plan.shards_of(host, hosts)}
    with Output(args.output, run, shards, plan.shards) as out:
        if any(out.notes[shard].units < units for shard, units in shards.items()):
            osprey = _load(args) if osprey is None else osprey
            label(osprey, data, plan, out, asked, give_up_after=args.give_up_after)
        else:
            out.declare()
        notes = list(out.notes.values())
    print(_summary(notes, args.output), file=sys.stderr)
    if page is not None:
        gallery.write_gallery(page, output, data)
        print(f"gallery in {args.gallery or page}", file=sys.stderr)


def _todo(plan: plans.Plan, output: Path | None) -> list[int]:
    """The units that aren't written, of all hosts."""
    done = [0 if output is None else read_note(output, shard).units for shard in range(plan.shards)]
    return [unit for shard, units in enumerate(done) for unit in plan.units(shard)[units:]]


def _check_writable(output: Path) -> None:
    """Raises ValueError where a directory can't be made or changed, before a model is loaded for it."""
    if "://" in str(output):
        return
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {output}: {there} is no directory that you may write in")


def _summary(notes: Sequence[Note], output: str) -> str:
    regions, described, skipped, images = (
        sum(getattr(note, name) for note in notes)
        for name in ("regions", "described", "skipped", "skipped_images")
    )
    told = f"{regions:,} regions of {described:,} images described in {output}"
    if not skipped:
        return told
    parts = [
        f"{count:,} {kind}{'s' if count > 1 else ''}"
        for count, kind in ((images, "image"), (skipped - images, "region"))
        if count
    ]
    return f"{told}; {' and '.join(parts)} skipped (skipped-….jsonl says why)"


def _refuse(args: argparse.Namespace, names: Sequence[str], how: str) -> None:
    usual = _parser().get_default
    if given := [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) != usual(name)]:
        raise ValueError(f"{', '.join(given)} can't be given {how} --labels")


def _words(args: argparse.Namespace) -> tuple[Way, str, dict[str, Any]]:
    """The way to answer, the question, and what answers depend on beside the model and its precision."""
    asked = requested(args)
    setting = {
        "text": asked.prompts[0],
        "level": None if args.question else level_of(args),
        "max_new_tokens": asked.decoding.limit,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "stop": args.stop,
    }
    return Words(asked), question_of(args), setting


def _choice(args: argparse.Namespace) -> tuple[Way, str, dict[str, Any]]:
    """As `_words`, where regions get labels."""
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold is a probability, from 0 to 1, not {args.threshold}")
    if not args.min_logprob <= 0:
        raise ValueError(f"--min-logprob is a probability's logarithm, 0 at most, not {args.min_logprob}")
    protocol = PROTOCOLS["lvis_paco"]
    prompt = protocol.prompt(None if args.question is None else checked_question(args.question))
    question = args.question or protocol.question
    assert question is not None, "this protocol has a question"
    vocabulary = read_vocabulary(as_path(args.labels), Tokenizer.load(args.checkpoint))
    setting = {
        "text": prompt,
        "labels": {"count": len(vocabulary.labels), "version": version(vocabulary.labels)},
        "threshold": args.threshold,
        "min_logprob": None if args.min_logprob == -math.inf else args.min_logprob,
    }
    limits = {"threshold": args.threshold, "min_logprob": args.min_logprob}
    return Choice(vocabulary, args.question, limits), question, setting


def _load(args: argparse.Namespace) -> Osprey:
    return Osprey.load(args.checkpoint, dtype=args.dtype, quantize=args.quantize)


def _host(given: str | None) -> tuple[int, int]:
    if given is None:
        return jax.process_index(), jax.process_count()
    match = re.fullmatch("([0-9]+)/([0-9]+)", given)
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(f"--host is I/N with I from 0 to N - 1, such as 0/4, not {given}")
    return int(match[1]), int(match[2])


def _plan(shards: int | None, data: Input, output: Path | None, hosts: int) -> plans.Plan:
    if shards is None:
        then = read_run(output) if output is not None else None
        found = then.get("setting", {}).get("shards") if then else None
        shards = found if isinstance(found, int) else plans.usual_shards(len(data), hosts)
    if shards < hosts:
        raise ValueError(f"{shards} shards are too few for {hosts} hosts: give --shards {hosts} or more")
    return plans.make_plan(len(data), data.counts, shards)
