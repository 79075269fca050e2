"""A large ArrayRecord from a synthetic source: time to build, speed and memory of reading at random.

    python -m benchmarks.array_record [--records 1000000] [--workers 2] [--directory DIR]

Builds with `prepare`'s code, every check included. Then fresh processes, as a training worker would be,
read records at random through `Stored` with one and with eight threads and tell their memory: all of it,
and what of that is their own, without the pages of files that processes share. Before each of them the
system is asked to drop the files from its cache, so that the first reads go to the disk. Files are removed
unless a directory is named.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from data_pipelines import builder
from data_pipelines.records import Record, Turn
from data_pipelines.stored import Stored
from osprey_jax.masks import encode_rle

SIZE = (48, 48)
READS = 20_000
_PICTURES = 64


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """Records of about 2 kB images, three regions and three turns, from a few pictures made beforehand."""

    count: int
    pictures: tuple[bytes, ...]

    name: ClassVar = "synthetic"
    dropped: ClassVar = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        masks = tuple({"size": list(SIZE), "counts": _MASKS[(index + k) % len(_MASKS)]} for k in range(3))
        return Record(
            sample_id=f"synthetic/{index}",
            # What follows the end of a JPEG is not read, and makes each file another one.
            image=self.pictures[index % _PICTURES] + index.to_bytes(8, "little"),
            masks=masks,
            turns=tuple(
                Turn(f"What is <mask><pos>, of the {index}th sample?", f"Thing {index * k}.", (k,))
                for k in range(3)
            ),
            opening="<image>\n",
            at_most=20,
        )

    def image_key(self, index: int) -> str:
        return f"synthetic/{index}"


def synthetic(count: int) -> Synthetic:
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(_PICTURES):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (*SIZE, 3), np.uint8)).save(buffer, "JPEG", quality=60)
        pictures.append(buffer.getvalue())
    return Synthetic(count, tuple(pictures))


def _runs() -> list[str]:
    rng = np.random.default_rng(1)
    rles = []
    for _ in range(16):
        mask = np.zeros(SIZE, bool)
        y, x = rng.integers(0, 24, 2)
        mask[y : y + 20, x : x + 20] = True
        rles.append(encode_rle(mask)["counts"])
    return rles


_MASKS = _runs()


def forget_pages(directory: Path) -> None:
    """Asks the system to drop the files from its cache."""
    for path in directory.glob("*.array_record*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory() -> dict[str, float]:
    """MB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {key: int(values[key].split()[0]) / 1024 for key in ("VmHWM", "VmRSS", "RssAnon")}


def read(directory: str, threads: int) -> dict[str, float]:
    """What a process that does nothing else sees."""
    before = memory()
    start = time.perf_counter()
    stored = Stored(directory)
    opened = time.perf_counter() - start
    stored[0]
    rng = random.Random(threads)

    def latency(index: int) -> float:
        begin = time.perf_counter()
        record = stored[index]
        took = time.perf_counter() - begin
        assert record.sample_id == f"synthetic/{index}"
        return took

    found = {"before": before["VmRSS"], "open_ms": opened * 1e3}
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for name in ("first", "again"):
            indices = [rng.randrange(len(stored)) for _ in range(READS)]
            start = time.perf_counter()
            took = sorted(pool.map(latency, indices, chunksize=100))
            found[f"{name}_per_s"] = READS / (time.perf_counter() - start)
            found[f"{name}_p50_us"], found[f"{name}_p99_us"] = (
                took[int(READS * q)] * 1e6 for q in (0.5, 0.99)
            )
    start = time.perf_counter()
    for index in range(len(stored))[:: max(len(stored) // READS, 1)]:
        stored.image_key(index)
    found["key_us"] = (time.perf_counter() - start) / READS * 1e6
    return {**found, **memory(), "files": len(os.listdir("/proc/self/fd"))}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="that build")
    parser.add_argument("--directory", type=Path, help="is kept; default: a temporary one")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(args.read, args.threads)))
        return 0

    with contextlib.ExitStack() as stack:
        directory = args.directory or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "synthetic"
        start = time.perf_counter()
        report = builder.store(synthetic(args.records), directory, workers=args.workers, settings={})
        took = time.perf_counter() - start
        size = report.num_bytes / report.records
        built = "found built" if report.finished_before else f"built in {took:.0f} s"
        rate = (
            "" if report.finished_before else f", {args.records / took:,.0f}/s with {args.workers} processes"
        )
        print(f"{report.records:,} records of {size:,.0f} bytes {built}{rate}")
        for threads in (1, 8):
            forget_pages(directory)
            command = [
                sys.executable,
                "-m",
                __spec__.name,
                "--read",
                str(directory),
                "--threads",
                str(threads),
            ]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(run.stdout)
            print(f"{threads} threads, {READS:,} reads at random, opened in {found['open_ms']:.0f} ms:")
            for name in ("first", "again"):
                print(
                    f"  {name}: {found[f'{name}_per_s']:,.0f} records/s, a read takes "
                    f"{found[f'{name}_p50_us']:.0f} µs (median), {found[f'{name}_p99_us']:.0f} µs (99 %)"
                )
            print(
                f"  memory: {found['VmRSS']:.0f} MB, of it {found['RssAnon']:.0f} MB its own, most at once "
                f"{found['VmHWM']:.0f} MB; {found['before']:.0f} MB before it opened; "
                f"{found['files']} files open; image_key {found['key_us']:.1f} µs"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
