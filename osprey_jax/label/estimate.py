"""How long the whole work will take and how large its output will be, from a sample."""

import time
from collections.abc import Sequence

from osprey_jax.label.inputs import Input
from osprey_jax.label.job import Asked, NothingWorks, Unit, run_units, to_part
from osprey_jax.label.plan import Plan
from osprey_jax.label.ways import Answerer

SAMPLE = 4
"""Units, spread over all of them."""


def estimate(
    osprey: Answerer, data: Input, plan: Plan, asked: Asked, *, todo: Sequence[int], hosts: int
) -> str:
    """Describes a sample of the units `todo` twice, for programs are compiled the first time.

    Returns what follows for all of these units, in lines.
    """
    count = min(SAMPLE, len(todo))
    units = [todo[(2 * place + 1) * len(todo) // (2 * count)] for place in range(count)]
    parts = []
    first = ""

    def keep(unit: Unit) -> None:
        nonlocal first
        part = to_part(unit, asked)
        parts.append(part)
        if part.skipped and not first:
            first = part.skipped_lines.decode().splitlines()[0]

    start = time.monotonic()
    run_units(osprey, data, plan, units, asked.way, keep)
    cold = time.monotonic() - start
    parts.clear()
    start = time.monotonic()
    run_units(osprey, data, plan, units, asked.way, keep)
    seconds = time.monotonic() - start
    images, regions = sum(part.images for part in parts), sum(part.regions for part in parts)
    skipped = sum(part.skipped for part in parts)
    if not regions:
        raise NothingWorks(f"nothing of the sample, {images} images, can be described; {first}")
    size = sum(len(part.lines) + len(part.skipped_lines) for part in parts)
    left = sum(len(plan.images(unit)) for unit in todo)
    scale = left / images
    if data.counts is not None and (known := sum(_regions(data, plan.images(unit)) for unit in units)):
        scale = sum(_regions(data, plan.images(unit)) for unit in todo) / known
    which = f"all: about {regions * scale:,.0f} regions of {left:,} images"
    if left < len(data):
        which = f"left: about {regions * scale:,.0f} regions of {left:,} of the {len(data):,} images"
    each = f" on each of {hosts} hosts" if hosts > 1 else ""
    lines = [
        f"sample: {regions:,} regions of {images:,} images in {seconds:.1f} s, "
        f"{regions / seconds:.1f} regions/s; {max(cold - seconds, 0):.0f} s more for the first time",
        which,
        f"time: about {duration(seconds * scale / hosts + max(cold - seconds, 0))}{each}",
        f"output: about {size * scale / 1e6:,.1f} MB in {plan.shards} shards",
    ]
    if skipped:
        lines.insert(1, f"skipped: {skipped} in the sample; the first: {first}")
    return "\n".join(lines)


def _regions(data: Input, images: range) -> int:
    assert data.counts is not None, "asked only where they are known"
    return int(data.counts[images.start : images.stop].sum())


def duration(seconds: float) -> str:
    """Seconds as one reads them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
