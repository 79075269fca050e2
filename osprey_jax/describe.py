"""Describes regions of an image: `python -m osprey_jax.describe --checkpoint D --image I --masks M`.

With `--sam` regions needn't be given: SAM makes masks of points, boxes or everything.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from osprey_jax import figure, segments
from osprey_jax.command_options import add_options, question_of, requested
from osprey_jax.image import load_image
from osprey_jax.masks import decode_rles, encode_rle
from osprey_jax.predictor import Osprey
from osprey_jax.region_files import Regions, read_regions
from osprey_jax.region_lines import encode, mask_box, region_line
from osprey_jax.request import Request
from osprey_jax.sam.everything import Options
from osprey_jax.sam.predictor import Sam
from osprey_jax.segments import segment_line

USAGE_ERROR = 2
_FEW = 3
"""Up to so many regions need no progress bar."""

_EXAMPLE = """\
examples:
  python -m osprey_jax.describe --checkpoint checkpoints/osprey --image photo.jpg \\
      --masks annotations.json --output words.jsonl --figure photo_regions.png
  python -m osprey_jax.describe --checkpoint checkpoints/osprey --image photo.jpg \\
      --sam checkpoints/sam --point 320,240 --figure there.png
  python -m osprey_jax.describe --checkpoint checkpoints/osprey --image photo.jpg \\
      --sam checkpoints/sam --everything --output all.jsonl --figure all.png

masks, one of:
  annotations.json    COCO json (polygons or RLEs); of several images, the one with the image's file name
  rles.json           a list of RLEs, or of objects with a segmentation
  labels.png          a label map: one region for each value but 0; or a single mask of 0 and 255
  a.png b.png, dir/   several masks of 0 and 255 (or 0 and 1)
Masks have the image's own size. Annotations that can't be read are named and left out.
Without masks, SAM makes them: at points, in boxes, or of everything (convert_torch_ckpt.py --sam makes its
checkpoint).

Each line of the output is a JSON object: image, region (the annotation's id, the label map's value, or the
number from 1), label (category or mask file, if there is one), box (x0, y0, x1, y1; the last two exclusive),
area, segmentation (COCO RLE), question, text; with SAM also prompt (the point or box), predicted_iou, and of
everything stability_score and part_of (the region that it lies in, or null).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 after an error in what it was given."""
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.sam is None) != (args.masks is not None):
        parser.error("--point, --box and --everything need --sam, and --masks doesn't go with it")
    try:
        _run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m osprey_jax.describe",
        description="Says in words what the masked regions of an image are.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="made by convert_torch_ckpt.py or training",
    )
    add("--image", type=Path, required=True, metavar="FILE")
    regions = parser.add_mutually_exclusive_group(required=True)
    regions.add_argument(
        "--masks", type=Path, nargs="+", metavar="PATH", help="a file, or several PNGs; see below"
    )
    regions.add_argument(
        "--point",
        type=_numbers("X,Y"),
        action="append",
        metavar="X,Y",
        help="what is there, in pixels of the image; may be repeated",
    )
    regions.add_argument(
        "--box",
        type=_numbers("X0,Y0,X1,Y1"),
        action="append",
        metavar="X0,Y0,X1,Y1",
        help="what it is around, in pixels of the image; may be repeated",
    )
    regions.add_argument("--everything", action="store_true", help="all that SAM finds by itself")
    add(
        "--sam",
        type=Path,
        metavar="DIR",
        help="SAM's checkpoint, for --point, --box and --everything; it computes in float32",
    )
    add_options(parser)
    automatic = parser.add_argument_group("with --everything, as in the original's automatic mask generator")
    for field in dataclasses.fields(Options):
        name = f"--{field.name.replace('_', '-')}"
        automatic.add_argument(name, type=type(field.default), help=f"default: {field.default:.4g}")
    add("--output", type=Path, metavar="FILE", help="JSON lines; without it, a table is printed")
    add("--figure", type=Path, metavar="FILE", help="draws the regions and their words, .png or .jpg")
    return parser


def _numbers(form: str) -> Callable[[str], list[float]]:
    """Reads numbers with commas between them, as many as `form` has."""

    def read(text: str) -> list[float]:
        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != len(form.split(",")):
            raise argparse.ArgumentTypeError(f"must be {form}, got {text!r}")
        return numbers

    return read


def _run(args: argparse.Namespace) -> None:
    asked = requested(args)
    given = [] if args.sam else args.masks
    inputs = [args.image, *given]
    _check_target(args.output, inputs)
    _check_target(args.figure, [*inputs, args.output])
    if args.figure is not None and args.figure.suffix.lower() not in figure.FORMATS:
        raise ValueError(f"a figure is one of {', '.join(figure.FORMATS)}, not {args.figure}")
    options = _everything_options(args)
    for directory in (args.checkpoint, args.sam):
        if directory is not None and not directory.is_dir():
            raise ValueError(f"no checkpoint directory {directory}")
    image = load_image(args.image)
    if args.sam:
        lines, masks = _segmented(args, image, options, asked)
    else:
        lines, masks = _annotated(args, image, asked)
    if args.output is None:
        _print_table(lines)
    else:
        with _replacing(args.output) as partial:
            partial.write_bytes(b"".join(map(encode, lines)))
        print(f"{len(lines)} regions in {args.output}", file=sys.stderr)
    if args.figure is not None:
        texts = [
            line["text"] + (f" [part of {whole}]" if (whole := line.get("part_of")) else "") for line in lines
        ]
        picture = figure.draw_regions(image, masks, texts) if lines else Image.fromarray(image)
        with _replacing(args.figure) as partial:
            picture.save(partial, format=figure.FORMATS[args.figure.suffix.lower()], quality=92)
        print(f"figure in {args.figure}", file=sys.stderr)


def _everything_options(args: argparse.Namespace) -> Options:
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Options)}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not args.everything:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} goes with --everything only")
    return Options(**given)


def _annotated(
    args: argparse.Namespace, image: np.ndarray, asked: Request
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Lines of the regions in files, and their masks."""
    regions = read_regions(args.masks, (image.shape[0], image.shape[1]), image_name=args.image.name)
    _report_skipped(args.masks[0], regions)
    osprey = Osprey.load(args.checkpoint, dtype=args.dtype, quantize=args.quantize)
    count = len(regions.masks)
    answers = osprey.describe_each(image, regions.masks, asked)
    texts = list(tqdm(answers, total=count, unit="region", disable=count <= _FEW))
    return _lines(args.image, regions, question_of(args), texts), regions.masks


def _segmented(
    args: argparse.Namespace, image: np.ndarray, options: Options, asked: Request
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Lines of the regions that SAM finds, and their masks."""
    sam = Sam.load(args.sam)
    if args.everything:
        with tqdm(total=options.points, unit="point", desc="finding everything") as bar:
            found = segments.everything(sam, image, options, progress=bar.update)
    elif args.point:
        found = segments.at_points(sam, image, args.point)
    else:
        found = segments.in_boxes(sam, image, args.box)
    count = len(found.segments)
    if not count:
        print(
            "warning: nothing was found; lower --pred-iou-thresh or --stability-score-thresh to find more",
            file=sys.stderr,
        )
        return [], np.zeros((0, *image.shape[:2]), bool)
    osprey = Osprey.load(args.checkpoint, dtype=args.dtype, quantize=args.quantize)
    words = osprey.describe_segments(found, asked)
    described = list(tqdm(words, total=count, unit="region", desc="describing", disable=count <= _FEW))
    question = question_of(args)
    lines = [
        segment_line(os.fspath(args.image), segment, number=number, question=question)
        for number, segment in enumerate(described, 1)
    ]
    return lines, decode_rles([segment.segmentation for segment in described])


def _check_target(path: Path | None, others: Sequence[Path | None]) -> None:
    """Finds out before the work that a file can be written, and that it takes the place of nothing in use."""
    if path is None:
        return
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise ValueError(f"cannot write {path}: it is not a file")
    if not target.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no directory {target.parent}")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"cannot write {path}: no permission to write in {target.parent}")
    if target in [other.resolve() for other in others if other is not None]:
        raise ValueError(f"cannot write {path}: it is the path of another file of this command")


def _report_skipped(path: Path, regions: Regions) -> None:
    if skipped := regions.skipped:
        total = len(skipped) + len(regions.ids)
        print(f"warning: {path}: {len(skipped)} of {total} annotations are left out", file=sys.stderr)
        for reason in skipped:
            print(f"  {reason}", file=sys.stderr)


def _lines(image: Path, regions: Regions, question: str, texts: Sequence[str]) -> list[dict[str, Any]]:
    return [
        region_line(
            {"image": os.fspath(image)},
            region=name,
            label=label,
            box=mask_box(mask),
            area=int(mask.sum()),
            segmentation=encode_rle(mask),
            question=question,
            answer={"text": text},
        )
        for mask, name, label, text in zip(regions.masks, regions.ids, regions.labels, texts, strict=True)
    ]


def _print_table(records: Sequence[dict[str, Any]]) -> None:
    label = "label" if any("label" in record for record in records) else ""
    nested = "part of" if any(record.get("part_of") for record in records) else ""
    rows = [("#", "region", label, "box", "area", nested)]
    for number, record in enumerate(records, 1):
        box = " ".join(map(str, record["box"])) if record["area"] else "(empty mask)"
        named = (str(number), str(record["region"]), record.get("label", ""))
        rows.append((*named, box, str(record["area"]), str(record.get("part_of") or "")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    margin = sum(width + 2 for width in widths if width)
    room = max(shutil.get_terminal_size((120, 24)).columns - margin, 30)
    encoding = sys.stdout.encoding or "utf-8"
    for row, text in zip(rows, ["text", *(record["text"] for record in records)], strict=True):
        cells = "".join(f"{cell:<{width}}  " for cell, width in zip(row, widths, strict=True) if width)
        line = cells + f"\n{' ' * margin}".join(textwrap.wrap(text, room))
        print(line.rstrip().encode(encoding, "replace").decode(encoding))


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Gives a file to write, which becomes `path` when the block ends and vanishes when it raises.

    A link stays one and what it points to is replaced.
    """
    target = path.resolve()
    partial = target.with_name(f".{target.name}.incomplete")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
