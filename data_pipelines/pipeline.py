"""From sources to a stream of batches: order, mixture, each host's share, padding, and where it can resume.

What a sample is and where it comes in the stream depends on the seed alone, not on hosts, workers or
threads: the order is a function from place to sample (Grain's `MapDataset`), and a sample that fails keeps
its place until the loader has counted it. So the number of places taken is all that a checkpoint needs.
"""

import collections
import dataclasses
import itertools
import json
import logging
import math
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeGuard

import grain
import numpy as np
from absl import flags

from data_pipelines.order import HostShare, Key, order
from data_pipelines.records import Source
from data_pipelines.transforms import Bucket, Example, LossPer, collate, encode
from osprey_jax.batch import Batch
from osprey_jax.config import OspreyConfig
from osprey_jax.prompt import SYSTEM_TRAINING, Tokenizer

_log = logging.getLogger(__name__)

WATCHED = 1000
"""The share of failures is taken over this many samples."""


def make_loader(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    config: OspreyConfig,
    *,
    batch_size: int,
    buckets: Sequence[Bucket],
    seed: int,
    epochs: float | None = None,
    num_steps: int | None = None,
    weights: Sequence[float] | None = None,
    systems: Sequence[str] = (SYSTEM_TRAINING,),
    loss_per: LossPer = "dialogue",
    host: int = 0,
    num_hosts: int = 1,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 2,
    tolerance: float = 0.05,
) -> "Loader":
    """A resumable stream of shuffled batches.

    Args:
      sources: where the samples come from; read by several threads, and pickled if there are workers.
      tokenizer: makes the ids.
      config: of the model.
      batch_size: rows of a batch over all hosts.
      buckets: lengths and region counts to pad to, each at least as large in both as the one before; a batch
        takes the first that holds it, and a conversation that the last doesn't hold loses turns.
      seed: of order and draws.
      epochs: ends the stream when this many samples were taken as all sources hold together, rounded up to a
        whole batch.
      num_steps: ends it after this many batches; without either it is endless.
      weights: how often each source is drawn; by default all are shuffled into one another, so that each
        counts by its size and an epoch has every sample once.
      systems: the system texts to draw from.
      loss_per: what weighs 1 in the loss: every dialogue, or every labelled token.
      host: the number of this host.
      num_hosts: hosts that share each batch.
      workers: processes that encode; 0 for threads of this one.
      threads: threads that encode, in this process or in each worker.
      prefetch: batches encoded ahead.
      tolerance: the share of failing samples, of the last 1,000, beyond which the stream raises
        FailingSamples.

    Raises:
      ValueError: settings that don't fit together.
    """
    _check(sources, tokenizer, config, weights, buckets, batch_size, num_hosts)
    if epochs is not None and num_steps is not None:
        raise ValueError(f"epochs ({epochs}) and num_steps ({num_steps}) exclude each other")
    if epochs is not None:
        num_steps = math.ceil(epochs * sum(map(len, sources)) / batch_size)
    rows = batch_size // num_hosts
    encoder = Encoder(
        sources=tuple(sources),
        tokenizer=tokenizer,
        config=config,
        limits=buckets[-1],
        systems=tuple(systems),
        loss_per=loss_per,
        seed=seed,
    )
    share = HostShare(rows, host, num_hosts)
    keys = grain.MapDataset.select_from_datasets([order(sources, weights=weights, seed=seed)], share)
    return Loader(
        keys.map(encoder),
        rows=rows,
        buckets=tuple(buckets),
        pad_id=tokenizer.pad_id,
        num_steps=num_steps,
        workers=workers,
        threads=threads,
        ahead=rows * prefetch,
        tolerance=tolerance,
        identity={
            "seed": seed,
            "batch_size": batch_size,
            "host": host,
            "num_hosts": num_hosts,
            "sources": [[source.name, len(source)] for source in sources],
            "weights": None if weights is None else list(map(float, weights)),
        },
    )


def _check(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    config: OspreyConfig,
    weights: Sequence[float] | None,
    buckets: Sequence[Bucket],
    batch_size: int,
    num_hosts: int,
) -> None:
    if not sources:
        raise ValueError("no sources given")
    if empty := [source.name for source in sources if len(source) == 0]:
        raise ValueError(f"sources without samples: {', '.join(empty)}")
    if weights is not None and (len(weights) != len(sources) or min(weights) <= 0):
        raise ValueError(f"weights must be {len(sources)} positive numbers, one per source, got {weights}")
    if not buckets or any(a > b for pair in itertools.pairwise(buckets) for a, b in zip(*pair, strict=True)):
        raise ValueError(f"buckets must grow in length and regions, got {buckets}")
    if num_hosts > 1 and len(buckets) > 1:
        raise ValueError(
            f"hosts can't agree on one of {len(buckets)} buckets: give one for {num_hosts} hosts"
        )
    if batch_size % num_hosts:
        raise ValueError(f"a batch of {batch_size} doesn't divide over {num_hosts} hosts")
    found = tokenizer.mask_id, tokenizer.position_id
    expected = config.mask_token_id, config.position_token_id
    if found != expected:
        raise ValueError(f"<mask> and <pos> are {found} in the tokenizer and {expected} in the config")
    if config.decoder.vocab_size < min(found):
        raise ValueError(
            f"the tokenizer has {min(found)} tokens before <mask> and <pos>, the config's "
            f"decoder.vocab_size is {config.decoder.vocab_size}"
        )


class FailingSamples(RuntimeError):
    """Too many samples of the data can't be read or encoded to go on."""


class Skipped(NamedTuple):
    """Stands in the stream for a sample that could not be encoded."""

    sample_id: str
    reason: str
    message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """Reads and encodes a sample; what it draws depends on the seed and the key alone."""

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    config: OspreyConfig
    limits: Bucket
    systems: tuple[str, ...]
    loss_per: LossPer
    seed: int

    def __call__(self, key: Key) -> Example | Skipped:
        """Never raises: whatever is wrong with a sample comes back as a `Skipped`."""
        source = self.sources[key.source]
        sample_id = f"{source.name}[{key.record}]"
        try:
            record = source[key.record]
            sample_id = record.sample_id
            # By the source's name: another source in front of it changes nothing.
            name = zlib.crc32(source.name.encode())
            rng = np.random.default_rng((self.seed, name, key.epoch, key.record))
            return encode(
                record,
                self.tokenizer,
                self.config,
                length=self.limits[0],
                regions=self.limits[1],
                system=self.systems[rng.integers(len(self.systems))],
                loss_per=self.loss_per,
            )
        except Exception as error:
            return Skipped(sample_id, type(error).__name__, str(error))


class Loader(Iterator[tuple[Batch, list[str]]]):
    """Yields batches and the ids of their samples; made by `make_loader`."""

    def __init__(
        self,
        examples: grain.MapDataset[Example | Skipped],
        *,
        rows: int,
        buckets: tuple[Bucket, ...],
        pad_id: int,
        num_steps: int | None,
        workers: int,
        threads: int,
        ahead: int,
        tolerance: float,
        identity: dict,
    ):
        self.num_steps = num_steps
        """Batches in the whole stream, or None."""
        self.skipped: collections.Counter[str] = collections.Counter()
        """How many samples were skipped since the start of this process, by the kind of error."""
        self.dropped_turns = 0
        """Turns that did not fit, since the start of this process."""
        self._examples = examples
        self._rows, self._buckets, self._pad_id = rows, buckets, pad_id
        self._workers, self._threads, self._ahead = workers, threads, ahead
        self._tolerance = tolerance
        self._identity = identity
        self._step = self._place = 0
        self._iterator: grain.DatasetIterator[Example | Skipped] | None = None
        self._failures: collections.deque[bool] = collections.deque(maxlen=WATCHED)

    def __next__(self) -> tuple[Batch, list[str]]:
        if self._step == self.num_steps:
            self.close()
            raise StopIteration
        if self._iterator is None:
            self._iterator = self._start()
        examples: list[Example] = []
        place = self._place
        while len(examples) < self._rows:
            element = next(self._iterator)
            place += 1
            if self._accept(element):
                examples.append(element)
        self._step, self._place = self._step + 1, place
        length = max(len(example.input_ids) for example in examples)
        regions = max(len(example.masks.position) for example in examples)
        bucket = next(bucket for bucket in self._buckets if bucket[0] >= length and bucket[1] >= regions)
        return collate(examples, bucket, pad_id=self._pad_id), [example.sample_id for example in examples]

    def left_out(self) -> str:
        """What of the data was not used since the start of this process, in words; empty where all was."""
        skipped = [f"{self.skipped.total()} samples were skipped ({self._reasons()})"] if self.skipped else []
        turns = [f"{self.dropped_turns} turns did not fit the largest bucket"] if self.dropped_turns else []
        return "; ".join(skipped + turns)

    def _reasons(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())

    def get_state(self) -> bytes:
        """JSON from which `set_state` continues after the last batch that was yielded."""
        return json.dumps({"step": self._step, "place": self._place, "identity": self._identity}).encode()

    def set_state(self, state: bytes) -> None:
        """Continues where a loader was when it gave this state, whatever its workers, threads and buckets.

        Raises ValueError where it had other sources, weights, seed, batch or hosts.
        """
        values = json.loads(state)
        before = values["identity"]
        if changed := [key for key, value in self._identity.items() if before.get(key) != value]:
            told = "; ".join(f"{key} was {before.get(key)}, is {self._identity[key]}" for key in changed)
            raise ValueError(f"the data stream of the checkpoint is another one: {told}")
        self.close()
        self._step, self._place = values["step"], values["place"]

    def close(self) -> None:
        """Ends threads and workers; the next batch would start them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _start(self) -> grain.DatasetIterator[Example | Skipped]:
        workers = max(self._workers, 1)
        ahead = max(self._threads, math.ceil(self._ahead / workers))
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=ahead)
        examples = self._examples[self._place :].to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():
                # Grain asks for its own, which a program that isn't absl's never parses.
                flags.FLAGS.mark_as_parsed()
            processes = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=ahead)
            examples = grain.experimental.WithOptionsIterDataset(
                examples, grain.experimental.DatasetOptions(min_shm_size=1 << 16)
            )
            examples = examples.mp_prefetch(processes, worker_init_fn=_start_worker)
        return iter(examples)

    def _accept(self, element: Example | Skipped) -> TypeGuard[Example]:
        self._failures.append(isinstance(element, Skipped))
        if isinstance(element, Example):
            self.dropped_turns += element.dropped_turns
            return True
        self.skipped[element.reason] += 1
        _log.warning("skipped %s: %s: %s", *element)
        if sum(self._failures) > self._tolerance * WATCHED:
            raise FailingSamples(
                f"more than {self._tolerance:.0%} of the last {WATCHED} samples failed ({self._reasons()}), "
                f"the last one {element.sample_id}: {element.message}"
            )
        return False


def _start_worker(worker: int, num_workers: int) -> None:
    """Makes a worker end with its parent, and leave Ctrl-C to it.

    A killed parent can't end its workers, which would wait for it for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in worker processes"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
