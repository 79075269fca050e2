"""The training stages of Osprey-7B compiled for slices and cards that needn't be here: what each takes.

    pip install libtpu; pip install --no-deps jax-cuda12-pjrt==VERSION_OF_JAX
    python -m benchmarks.topologies [--rows v4-32:stage3 h200:stage1 ...] [--output table.md]

Each row runs the command that users run, `python -m osprey_jax.train --config=… --compile_topology=…`, with
the configuration for that hardware. Exit status 1 if one doesn't fit or fails.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

CONFIGS = {"v4-32": "tpu_v4", "v5e-64": "tpu_v5e", "v5p-32": "tpu_v5p", "v6e-16": "tpu_v6e", "h200": "h200"}
ROWS = [f"{name}:stage{number}" for name in CONFIGS for number in (1, 2, 3)]
KINDS = ("parameters", "optimizer", "batch", "activations", "temporaries", "program")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
HEAD = (
    "slice, stage",
    "batch",
    *KINDS,
    "all",
    "of",
    "TFLOP/chip",
    *COLLECTIVES,
    "largest gather",
    "compiled in",
)


def measured(row: str) -> tuple[list[str], int]:
    """The row's cells, and the command's exit status."""
    name, _, stage = row.partition(":")
    command = [sys.executable, "-m", "osprey_jax.train", f"--config=configs/{CONFIGS[name]}.py:{stage}"]
    command.append(f"--compile_topology={name}")
    environment = {"JAX_PLATFORMS": "cpu", "XLA_CLIENT_MEM_FRACTION": "0.95", **os.environ}
    begin = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(f"$ {' '.join(command[1:])}\n{done.stdout}({time.monotonic() - begin:.0f} s)\n", file=sys.stderr)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)

    def found(pattern: str) -> str:
        match = re.search(pattern, done.stdout, re.MULTILINE)
        return match[1] if match else "–"

    sent = [found(rf"^ +{kind} .* ([\d.]+) GiB a chip") for kind in COLLECTIVES]
    cells = [
        f"{name}, {stage}",
        found(r"batch (\d+)$"),
        *(found(rf"^ +{kind} +([\d.]+) GiB") for kind in KINDS),
        found(r"fits?: ([\d.]+) of"),
        found(r"fits?: [\d.]+ of ([\d.]+) GiB"),
        found(r"included: ([\d,.]+) a chip"),
        *sent,
        found(r"^ +all-gather .*largest +([\d.]+ MiB)"),
        found(r"^compiled in (\d+ s)"),
    ]
    return cells, done.returncode


def main() -> int:
    """Prints the table as it grows; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="NAME:STAGE")
    parser.add_argument("--output", type=Path, help="a file for the table, which grows row by row")
    args = parser.parse_args()
    lines = [" | ".join(HEAD), " | ".join("---" for _ in HEAD)]
    status = 0
    for row in args.rows:
        cells, failed = measured(row)
        status |= failed
        lines.append(" | ".join(cells))
        table = "".join(f"| {line} |\n" for line in lines)
        if args.output:
            args.output.write_text(table)
    print(table, end="")
    return min(status, 1)


if __name__ == "__main__":
    sys.exit(main())
