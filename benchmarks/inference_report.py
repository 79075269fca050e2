"""The tables of `benchmarks.inference`."""

from collections.abc import Iterable
from typing import Any

PARTS = ("tower", "prefix", "suffix", "decode", "host")


def report(found: dict[str, Any]) -> str:
    """All that was found, for reading."""
    machine = found["machine"]
    texts = [
        f"{machine['device']}, {machine['cores']} cores, Python {machine['python']}, JAX {machine['jax']}, "
        f"commit {machine['commit']}, {machine['date']}; load before each round: "
        + ", ".join(f"{load:.1f}" for load in found["load"]),
        f"Size {found['size']}, {' '.join(filter(None, (found['dtype'], found['quantize'])))}; a prompt of "
        f"{found['places']} places, exactly {found['tokens']} tokens a region, "
        f"{found['different_answers']} different answers; at most {found['peak_memory'] / 2**30:.1f} GiB.",
        f"One region alone: {span(found['one_region']['alone'])} s. That times the number of regions is what "
        f"the engine is compared with. {found['checked']} regions went through it; "
        + ("other answers: " + "; ".join(found["different"]) if found["different"] else "the same tokens")
        + ".",
    ]
    if "torch" in found["one_region"]:
        texts.append(
            f"One region in torch: {span(found['one_region']['torch'])} s, multiplied in the same way, and "
            f"{found['preprocessing']:.3f} s once; the same tokens."
        )
    texts += [_rates(found), _counts(found), _machine(machine), _stages(found)]
    if found["first_answers"]:
        texts.append(_first_answers(found["first_answers"]))
    return "\n\n".join(texts)


def span(values: dict[str, float]) -> str:
    """Median, smallest and largest."""
    return "{} ({} to {})".format(*(_digits(values[name]) for name in ("median", "min", "max")))


def _digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def table(header: str, rows: Iterable[Iterable[Any]]) -> str:
    """Markdown of rows below a header whose columns are parted by commas."""
    columns = header.split(", ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _rates(found: dict[str, Any]) -> str:
    rates = found["rates"]
    least, base = min(rates), rates[min(rates)]["seconds"]["median"]
    rows = []
    for number, row in rates.items():
        more = (row["seconds"]["median"] - base) / (number - least) if number > least else None
        rows.append(
            [
                number,
                span(row["seconds"]),
                "–" if more is None else f"{_digits(more * 1e3)} ms",
                _digits(row["regions_per_s"]),
                _digits(row["tokens_per_s"]),
                *(
                    span(row[name]) if (name := f"times_faster_than_{way}") in row else "–"
                    for way in ("alone", "torch")
                ),
            ]
        )
    header = (
        "regions, seconds, each further one, regions/s, tokens/s, times faster than one by one, than torch"
    )
    return table(header, rows)


def _counts(found: dict[str, Any]) -> str:
    rows = []
    for number, seen in found["counts"].items():
        new = found["programs"][number]
        rows.append(
            [
                number,
                seen["tower_calls"],
                seen["prefix_prefills"],
                f"{seen['suffix_batches']} ({seen['suffix_rows']})",
                seen["decode_steps"],
                f"{seen['row_steps']} ({number * (found['tokens'] - 1)})",
                f"{seen['prefix_cache_bytes'] / 2**20:.3g} MiB",
                f"{seen['own_cache_bytes'] / 2**20:.3g} MiB",
                new["count"],
                f"{new['seconds']:.3g} s",
            ]
        )
    header = (
        "regions, tower calls, prefix prefills, suffix batches (rows), decode steps, row-steps (needed), "
        "prefix cache, rows' caches, programs compiled, first run"
    )
    return table(header, rows)


def _machine(machine: dict[str, Any]) -> str:
    return (
        f"A sum reads {_digits(machine['read_bytes_per_s'] / 1e9)} GB/s of memory, a product copies "
        f"{_digits(machine['copy_bytes_per_s'] / 1e9)} GB/s, matrices are multiplied at "
        f"{_digits(machine['flops_per_s'] / 1e12)} TFLOP/s. A decode step needs at least the time to read "
        "the weights, or these and all caches, or to do the operations that XLA counts:"
    )


def _stages(found: dict[str, Any]) -> str:
    floors = ("seconds", "floor_of_weights", "floor_of_bytes", "floor_of_flops")
    rows = []
    for number, row in found["stages"].items():
        step, estimate = row["step"], row["step"]["estimate"]
        rows.append(
            [
                number,
                *(f"{row['seconds'].get(part, 0.0):.3g} s" for part in PARTS),
                *(f"{_digits(step[name] * 1e3)} ms" if step[name] else "–" for name in floors),
                f"{_digits(estimate['flops'] / 1e9)} GFLOP" if "flops" in estimate else "–",
                f"{estimate['bytes accessed'] / 1e9:.3g} GB" if "bytes accessed" in estimate else "–",
            ]
        )
    header = "regions, " + ", ".join(PARTS) + ", a step, weights, and caches, operations, XLA counts, and"
    return table(header, rows)


def _first_answers(answers: dict[str, dict[str, float]]) -> str:
    rows = [
        [
            name,
            f"{_digits(row['imports'])} s",
            f"{_digits(row['first'])} s",
            f"{row['warm']:.3g} s",
            f"{row['programs']} ({row['from_cache']})",
        ]
        for name, row in answers.items()
    ]
    return table("a process, imports, first answer, warm, programs (from the persistent cache)", rows)
