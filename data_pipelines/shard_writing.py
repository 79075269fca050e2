"""The work of `prepare`: checks records and writes them into shards, in one process or in several."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from data_pipelines.reasons import message, reason
from data_pipelines.records import Source
from data_pipelines.stored_format import PROGRESS, encode, image_hash, shard_name
from data_pipelines.transforms import check_sizes
from data_pipelines.workers import end_with_parent
from osprey_jax.image import load_image

SHARD_RECORDS = 4096
"""Samples of a shard: few enough to do again, enough that a million records are a few hundred open files."""
UNFINISHED = "unfinished-"


class PrepareError(ValueError):
    """The work could not be done; shards that are complete stay for another run."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which samples come into which file."""

    output: Path
    dataset: str
    """The name that TFDS gives to the data set."""
    samples: int
    shard_records: int = SHARD_RECORDS

    @property
    def num_shards(self) -> int:
        """A shard holds a range of the samples, but for those that are left out."""
        return math.ceil(self.samples / self.shard_records)

    def indices(self, shard: int) -> range:
        """Samples that a shard is made of."""
        return range(self.samples)[shard * self.shard_records : (shard + 1) * self.shard_records]

    def shard(self, shard: int) -> Path:
        """The file of a shard."""
        return self.output / shard_name(self.dataset, shard, self.num_shards)

    def note(self, shard: int) -> Path:
        """Written after a shard, which is complete where this is."""
        return self.output / PROGRESS / f"{shard:05d}.json"


Advance = Callable[[int, int], None]
"""Called with how many samples were done since the last call, and how many of them were left out."""


def write_shards(source: Source, plan: Plan, *, workers: int) -> None:
    """Writes the shards that are missing, with a bar on stderr.

    Raises PrepareError, naming the file, for what can't be written, or where a process was killed.
    """
    todo = [shard for shard in range(plan.num_shards) if not plan.note(shard).exists()]
    left = sum(len(plan.indices(shard)) for shard in todo)
    lost = 0
    with tqdm(total=plan.samples, initial=plan.samples - left, unit=" samples", desc=source.name) as bar:

        def advance(done: int, left_out: int) -> None:
            nonlocal lost
            lost += left_out
            if lost:
                bar.set_postfix_str(f"{lost} left out", refresh=False)
            bar.update(done)

        if min(workers, len(todo)) <= 1:
            _write(source, plan, iter(todo), advance)
        else:
            _write_in_processes(source, plan, todo, min(workers, len(todo)), advance)


def _write_in_processes(source: Source, plan: Plan, todo: list[int], workers: int, advance: Advance) -> None:
    context = multiprocessing.get_context("spawn")  # forking a process with threads can hang it
    shared = _Shared(
        claimed=context.Value("q", 0),
        done=context.Value("q", 0),
        left_out=context.Value("q", 0),
        errors=context.SimpleQueue(),
    )
    processes = [
        context.Process(target=_worker, args=(source, plan, todo, shared), daemon=True)
        for _ in range(workers)
    ]
    seen = (0, 0)

    def look() -> None:
        nonlocal seen
        # Without their locks, which a killed process may hold for ever.
        now = (shared.done.get_obj().value, shared.left_out.get_obj().value)
        advance(now[0] - seen[0], now[1] - seen[1])
        seen = now

    try:
        for process in processes:
            process.start()
        while True:
            running = [process.sentinel for process in processes if process.exitcode is None]
            look()
            _check_workers(processes, shared.errors, plan)
            if not running:
                return
            multiprocessing.connection.wait(running, timeout=0.5)
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _check_workers(processes: list[SpawnProcess], errors: Any, plan: Plan) -> None:
    if failed := [process.exitcode for process in processes if process.exitcode]:
        if not errors.empty():
            raise PrepareError(errors.get())
        how = f"was killed by signal {-failed[0]}" if failed[0] < 0 else f"ended with status {failed[0]}"
        raise PrepareError(
            f"a process that was writing {plan.output} {how}; where it was the memory, use fewer workers; "
            "the same command goes on"
        )


@dataclasses.dataclass
class _Shared:
    """What the processes have in common."""

    claimed: Any
    """How many of the shards to be written a process has taken."""
    done: Any
    left_out: Any
    errors: Any


def _worker(source: Source, plan: Plan, todo: list[int], shared: _Shared) -> None:
    end_with_parent()

    def claim() -> Iterator[int]:
        while True:
            with shared.claimed.get_lock():
                place = shared.claimed.value
                shared.claimed.value += 1
            if place >= len(todo):
                return
            yield todo[place]

    def advance(done: int, left_out: int) -> None:
        for counter, number in ((shared.done, done), (shared.left_out, left_out)):
            with counter.get_lock():
                counter.value += number

    try:
        _write(source, plan, claim(), advance)
    except PrepareError as error:
        shared.errors.put(str(error))
        sys.exit(1)


def _write(source: Source, plan: Plan, shards: Iterator[int], advance: Advance) -> None:
    for shard in shards:
        note = _write_shard(source, plan, shard, advance)
        write_whole(plan.note(shard), json.dumps(note).encode())


def _write_shard(source: Source, plan: Plan, shard: int, advance: Advance) -> dict[str, Any]:
    """Returns what is to be remembered of it."""
    keys: list[str] = []
    left_out: list[dict[str, Any]] = []
    with replacing(plan.shard(shard), plan.output / PROGRESS) as partial, _array_record(partial) as write:
        for index in plan.indices(shard):
            try:
                data, key = _checked(source, index)
            except Exception as error:
                left_out.append(
                    {
                        "index": index,
                        "sample": f"{source.name}[{index}]",
                        "message": message(error),
                        "reason": reason(error),
                    }
                )
                advance(1, 1)
                continue
            write(data)
            keys.append(f"{key:016x}")
            advance(1, 0)
    return {"keys": keys, "left_out": left_out}


@contextlib.contextmanager
def _array_record(path: Path) -> Iterator[Callable[[bytes], None]]:
    writer = ArrayRecordWriter(os.fspath(path), "group_size:1")  # each record can be read alone
    try:
        yield writer.write
        writer.close()
    except RuntimeError as error:
        # After the first cause come places in the file.
        raise OSError(str(error).partition(";")[0]) from error
    finally:
        with contextlib.suppress(RuntimeError):
            writer.close()


def _checked(source: Source, index: int) -> tuple[bytes, int]:
    """An encoded record and the hash of its image; raises what is wrong with it."""
    record = source[index]
    if record.image is None:
        if record.masks:
            raise ValueError("regions without an image")
        return encode(record), image_hash(f"no image: {source.image_key(index)}".encode())
    check_sizes((mask["size"] for mask in record.masks), load_image(record.image).shape[:2])
    image = record.image if isinstance(record.image, bytes) else record.image.tobytes()
    return encode(record), image_hash(image)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tells which file could not be written."""
    try:
        yield
    except OSError as error:
        cause = error.strerror or error
        raise PrepareError(f"cannot write {path}: {cause}; the same command goes on from there") from error


@contextlib.contextmanager
def replacing(path: Path, beside: Path | None = None) -> Iterator[Path]:
    """A file to be written that takes the name `path` when it is complete."""
    partial = (beside or path.parent) / f"{UNFINISHED}{os.getpid()}-{path.name}"
    try:
        with writing(path):
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that has all of `data` or isn't there."""
    with replacing(path) as partial:
        partial.write_bytes(data)
