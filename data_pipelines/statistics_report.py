"""What was found of samples, told in words, bars and JSON."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines import histograms
from data_pipelines.sample_sizes import Bucket, Found, Tally, padding, use_of


def histograms_of(found: Found) -> list[histograms.Histogram]:
    """Of lengths, numbers of regions and areas."""
    return [
        histograms.of_integers(found.lengths, title="Sequence length", axis="tokens, image included"),
        histograms.of_integers(found.regions, title="Regions of a sample", axis="regions named"),
        histograms.of_shares(found.masks, title="Mask area", axis="% of the image, log scale"),
    ]


def to_json(found: Found, buckets: Sequence[Bucket]) -> str:
    """All that is told, as one JSON object on one line."""
    values: tuple[Sequence[float], ...] = (found.lengths, found.regions, found.masks)
    length, regions, area = (
        {**_summary(counted), "edges": histogram.edges, "counts": histogram.counts}
        for counted, histogram in zip(values, histograms_of(found), strict=True)
    )
    told: dict[str, Any] = {
        "sources": [
            {
                "name": tally.name,
                "size": tally.size,
                "dropped": tally.dropped,
                "drawn": tally.drawn,
                "kept": tally.drawn - tally.skipped.total(),
                "skipped": dict(tally.skipped),
            }
            for tally in found.tallies
        ],
        "length": length,
        "tokens_with_loss": _summary(found.with_loss),
        "regions": regions,
        "mask_area": area,
        "empty_masks": {"named": len(found.areas) - len(found.masks), "left_out": found.dropped_regions},
    }
    if buckets:
        uses, too_large = use_of(found, buckets)
        told["buckets"] = [
            {
                "bucket": use.bucket,
                "samples": use.samples,
                "share": use.samples / len(found.lengths),
                "token_padding": use.padding[0],
                "region_padding": use.padding[1],
            }
            for use in uses
        ]
        told["too_large"] = {"samples": too_large, "without_a_turn_that_fits": found.unfit}
    return json.dumps(told)


def _summary(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    p50, p90, p99 = (float(p) for p in np.percentile(values, (50, 90, 99), method="inverted_cdf"))
    return {"mean": float(np.mean(values)), "median": p50, "p90": p90, "p99": p99, "max": float(max(values))}


def to_text(found: Found, buckets: Sequence[Bucket], *, width: int, blocks: bool) -> str:
    """All that is told, in words and bars; `blocks` as in `histograms.to_text`."""
    lengths, regions, areas = (
        histograms.to_text(histogram, width=width, blocks=blocks) for histogram in histograms_of(found)
    )
    paragraphs = [
        "\n".join(source_lines(found.tallies)),
        f"{lengths}\n  {_percentiles(found.lengths)}",
        f"{regions}\n  {_percentiles(found.regions)}",
        areas if found.masks else "no masks",
        "\n".join(_remarks(found)),
    ]
    if buckets:
        paragraphs.append("\n".join(_bucket_lines(found, buckets)))
    return "\n\n".join(paragraphs)


def _percentiles(values: Sequence[int]) -> str:
    return ", ".join(f"{name} {value:,.{int(name == 'mean')}f}" for name, value in _summary(values).items())


def source_lines(tallies: Sequence[Tally]) -> Iterator[str]:
    """How many samples each source has, and what became of those that were drawn."""
    for tally in tallies:
        dropped = ", ".join(f"{count:,} × {reason}" for reason, count in tally.dropped.items())
        dropped = f" (besides those dropped: {dropped})" if dropped else ""
        skipped = tally.skipped.total()
        yield (
            f"{tally.name}: {tally.size:,} samples{dropped}; {tally.drawn:,} looked at, "
            f"{tally.drawn - skipped:,} kept, {skipped:,} skipped"
        )
        for reason, count in tally.skipped.most_common():
            yield f"  {count:,} × {reason}"
            yield f"    as in {tally.examples[reason]}"


def _remarks(found: Found) -> Iterator[str]:
    share = sum(found.with_loss) / sum(found.lengths)
    yield f"{np.mean(found.with_loss):,.1f} tokens of a sample carry loss, {share:.1%} of its length"
    if empty := len(found.areas) - len(found.masks):
        yield f"empty masks that stay, for others are named with them: {empty:,} of {len(found.areas):,}"
    if found.dropped_regions:
        yield f"regions left out with their turns, for their masks are empty: {found.dropped_regions:,}"


def _bucket_lines(found: Found, buckets: Sequence[Bucket]) -> Iterator[str]:
    uses, too_large = use_of(found, buckets)
    total = len(found.lengths)

    def line(name: str, samples: int, waste: tuple[float, float]) -> str:
        return f"{name:<12} {samples:>8,} {samples / total:>7.1%} {waste[0]:>18.1%} {waste[1]:>11.1%}"

    yield f"{'bucket':<12} {'samples':>8} {'share':>7} {'padding of tokens':>18} {'of regions':>11}"
    yield from (line("x".join(map(str, use.bucket)), use.samples, use.padding) for use in uses)
    if len(uses) > 1:
        yield line("together", sum(use.samples for use in uses), padding(uses))
    unfit = f", but of {found.unfit:,} no turn fits" if found.unfit else ""
    share = f"{too_large:,} samples ({too_large / total:.1%})"
    yield f"{share} don't fit the largest: they are split by turns{unfit}"
