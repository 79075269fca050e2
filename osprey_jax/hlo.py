"""What a compiled program's text says of the bytes that devices send each other."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(rf" = (.*?) ({'|'.join(_COLLECTIVES)})(-start)?\(")
_CHANNEL = re.compile(r"channel_id=\d+")
_CALL = re.compile(r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+).*body=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"= [su]\d+\[\][^ ]* constant\((\d+)\)")
_ARRAY = re.compile(r"(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """Operations of one kind in one run of a program."""

    runs: int
    bytes: int
    """Of their results, on one device."""
    largest: int
    """Bytes of the largest single result."""


def collectives(text: str) -> Mapping[str, Collective]:
    """What each kind of collective moves, operations in loops counted as often as they run.

    `text` is optimised HLO (`Compiled.as_text()`).
    """
    bodies: dict[str, list[str]] = defaultdict(list)
    entry = name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    # A collective that runs beside other work stands in the text once for each part of that work.
    once = {
        (channel or number): (times, kind, size)
        for number, (channel, times, kind, size) in enumerate(_walk(bodies, entry, 1))
    }
    for times, kind, size in once.values():
        totals = found[kind]
        totals[0] += times
        totals[1] += times * size
        totals[2] = max(totals[2], size)
    return {kind: Collective(*found[kind]) for kind in _COLLECTIVES if kind in found}


def _walk(
    bodies: Mapping[str, list[str]], name: str, times: int
) -> Iterator[tuple[str | None, int, str, int]]:
    """Each collective below a computation: its channel, how often it runs, kind and result's bytes."""
    for line in bodies[name]:
        if match := _OPERATION.search(line):
            channel = _CHANNEL.search(line)
            # All of them but this one start as (operands, results, …).
            both = bool(match[3]) and match[2] != "all-reduce"
            yield channel and channel[0], times, match[2], _bytes(_second(match[1]) if both else match[1])
        if match := _WHILE.search(line):
            known = _TRIPS.search(line)
            trips = int(known[1]) if known else _trips(bodies[match[1]])
            yield from _walk(bodies, match[2], times * trips)
            continue
        called = _CALL.findall(line)
        if match := _BRANCHES.search(line):
            called += [part.strip().removeprefix("%") for part in match[1].split(",")]
        for each in called:
            yield from _walk(bodies, each, times)


def _trips(condition: list[str]) -> int:
    """How often a counted loop runs: it compares its counter with a constant."""
    constants = [int(number) for line in condition for number in _CONSTANT.findall(line)]
    return max(constants, default=1)


def _second(shape: str) -> str:
    """Of a tuple's parts, which may be tuples."""
    parts, depth = [""], 0
    # Commas in brackets part dimensions, in braces those of a layout.
    for letter in shape:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 1:
            parts.append("")
        else:
            parts[-1] += letter
    return parts[1] if len(parts) > 1 else shape


def _bytes(shape: str) -> int:
    """Of an array, or of all arrays of a tuple."""
    total = 0
    for name, bits, dims in _ARRAY.findall(shape):
        count = math.prod(int(size) for size in dims.split(",") if size)
        total += count if name == "pred" else count * int(bits) // 8
    return total
