"""From sources to a stream of batches: order, mixture, each host's share, padding, and where it can resume.

What a sample is and where it comes in the stream depends on the seed alone, not on hosts, workers or
threads: the order is a function from place to sample (Grain's `MapDataset`), and a sample that fails keeps
its place until the loader has counted it. So the number of places taken is all that a checkpoint needs, and,
where a place holds several samples, how many of them.
"""

import collections
import itertools
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import grain
from absl import flags

from data_pipelines.encoder import Element, Encoder, Skipped
from data_pipelines.order import HostShare, order
from data_pipelines.packing import Bucket, collate, fits
from data_pipelines.reasons import reason
from data_pipelines.records import Source
from data_pipelines.transforms import Example, LossPer
from data_pipelines.watched import Watched
from data_pipelines.workers import end_with_parent
from osprey_jax.batch import Batch
from osprey_jax.config import OspreyConfig
from osprey_jax.prompt import SYSTEM_TRAINING, Tokenizer

_log = logging.getLogger(__name__)

WATCHED = 1000
"""The share of failures is taken over this many of the last samples,"""
AT_LEAST = 100
"""and over so many in the beginning."""
MOST_AHEAD = 16
"""Samples that a worker encodes ahead, and so many again on their way from it."""
SHOWN = 5
"""How many reasons of failures are told."""


def make_loader(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    config: OspreyConfig,
    *,
    batch_size: int,
    buckets: Sequence[tuple[int, int]],
    seed: int,
    epochs: float | None = None,
    num_steps: int | None = None,
    weights: Sequence[float] | None = None,
    share_image: int = 1,
    images_per_row: int = 1,
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
      buckets: lengths of a row and region counts of an image to pad to, each at least as large in both as the
        one before; a batch takes the first that holds it. A conversation that the last doesn't hold is split
        into parts of whole turns, one of which comes in each epoch.
      seed: of order and draws.
      epochs: ends the stream when this many samples were taken as all sources hold together, rounded up to a
        whole batch; not with packing, where only reading tells how many rows they fill.
      num_steps: ends it after this many batches; without either it is endless.
      weights: how often each source is drawn; by default all are shuffled into one another, so that each
        counts by its size and an epoch has every sample once.
      share_image: how many conversations about one image may stand behind that image's one prefix.
      images_per_row: how many images a row may hold, with their conversations; rows are filled in the order
        of the stream.
      systems: the system texts to draw from.
      loss_per: what weighs 1 in the loss: every dialogue, or every labelled token.
      host: the number of this host.
      num_hosts: hosts that share each batch.
      workers: processes that encode; 0 for threads of this one.
      threads: threads that encode, in this process or in each worker.
      prefetch: batches encoded ahead.
      tolerance: the share of failing samples, of the last 1,000 and in the beginning of 100, beyond which the
        stream raises FailingSamples. One that fails is replaced by the next.

    Raises:
      ValueError: settings that don't fit together.
    """
    _check(sources, tokenizer, config, weights, buckets, batch_size, host, num_hosts, systems, loss_per)
    if epochs is not None and num_steps is not None:
        raise ValueError(f"epochs ({epochs}) and num_steps ({num_steps}) exclude each other")
    if epochs is not None and max(share_image, images_per_row) > 1:
        raise ValueError(
            "packed rows can't be counted before they are read: give a number of steps instead of epochs"
        )
    if epochs is not None:
        num_steps = math.ceil(epochs * sum(map(len, sources)) / batch_size)
    rows = batch_size // num_hosts
    encoder = Encoder(
        sources=tuple(sources),
        tokenizer=tokenizer,
        config=config,
        limits=Bucket(*buckets[-1]),
        systems=tuple(systems),
        loss_per=loss_per,
        seed=seed,
    )
    share = HostShare(rows, host, num_hosts)
    places = order(sources, weights=weights, seed=seed, share_image=share_image)
    return Loader(
        grain.MapDataset.select_from_datasets([places], share).map(encoder),
        rows=rows,
        images=images_per_row,
        image_size=config.vision.image_size,
        buckets=tuple(Bucket(*bucket) for bucket in buckets),
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
            "share_image": share_image,
            "images_per_row": images_per_row,
        },
    )


def _check(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    config: OspreyConfig,
    weights: Sequence[float] | None,
    buckets: Sequence[tuple[int, int]],
    batch_size: int,
    host: int,
    num_hosts: int,
    systems: Sequence[str],
    loss_per: str,
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
    if not 0 <= host < num_hosts:
        raise ValueError(f"host {host} is none of {num_hosts} hosts")
    if not systems or loss_per not in get_args(LossPer):
        raise ValueError(f"no system texts, or a loss per {loss_per!r}, not {' or '.join(get_args(LossPer))}")
    if batch_size < 1 or batch_size % num_hosts:
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


class Loader(Iterator[tuple[Batch, list[str]]]):
    """Yields batches and the ids of their samples; made by `make_loader`."""

    def __init__(
        self,
        places: grain.MapDataset[list[Element]],
        *,
        rows: int,
        images: int,
        image_size: int,
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
        """How many samples were skipped since the start of this process, by the reason."""
        self.broken_regions: collections.Counter[str] = collections.Counter()
        """The same of regions that were left out of samples."""
        self.dropped_turns = 0
        """Turns of split conversations that were not in this epoch's part, since this process started."""
        self.dropped_regions = 0
        """Regions whose masks are empty or broken, since this process started."""
        self.report: Path | None = None
        """Gets a line of JSON for each sample that is skipped."""
        self._places = places
        self._rows, self._images, self._image_size = rows, images, image_size
        self._buckets, self._pad_id = buckets, pad_id
        self._workers, self._threads, self._ahead = workers, threads, ahead
        self._tolerance = tolerance
        self._identity = identity
        self._step = 0
        self._at = (0, 0)  # the next element's place, and how many samples of that were taken
        self._iterator: grain.DatasetIterator[list[Element]] | Watched[list[Element]] | None = None
        self._read: collections.deque[Element] = collections.deque()  # of this place, from the next on
        self._failures: collections.deque[float] = collections.deque(maxlen=WATCHED)

    def __next__(self) -> tuple[Batch, list[str]]:
        if self._step == self.num_steps:
            self.close()
            raise StopIteration
        length = self._buckets[-1].length
        rows: list[list[Example]] = []
        while len(rows) < self._rows or self._images > 1:
            example = self._peek()
            room = (row for row in rows if fits(row, example, length=length, images=self._images))
            if self._images > 1 and (row := next(room, None)) is not None:
                row.append(example)
            elif len(rows) < self._rows:
                rows.append([example])
            else:
                break
            self._take(example)
        self._step += 1
        examples = [example for row in rows for example in row]
        tokens = max(sum(len(example.tokens.input_ids) for example in row) for row in rows)
        regions = max(len(example.masks.position) for example in examples)
        bucket = next(b for b in self._buckets if b.length >= tokens and b.regions >= regions)
        batch = collate(rows, bucket, images=self._images, image_size=self._image_size, pad_id=self._pad_id)
        return batch, [sample_id for example in examples for sample_id in example.sample_ids]

    def left_out(self) -> str:
        """What of the data was not used since the start of this process, in words; empty where all was."""
        skipped = [
            f"{reasons.total()} {what} were skipped ({_commonest(reasons)})"
            for what, reasons in (("samples", self.skipped), ("regions", self.broken_regions))
            if reasons
        ]
        turns = [f"{self.dropped_turns} turns did not fit beside others"] if self.dropped_turns else []
        no_mask = self.dropped_regions - self.broken_regions.total()
        empty = [f"{no_mask} regions have empty masks"] if no_mask else []
        return "; ".join(skipped + turns + empty)

    def get_state(self) -> bytes:
        """JSON from which `set_state` continues after the last batch that was yielded."""
        place, taken = self._at
        state = {"step": self._step, "place": place, "taken": taken, "identity": self._identity}
        return json.dumps(state).encode()

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
        self._step, self._at = values["step"], (values["place"], values["taken"])

    def set_states(self, states: Sequence[bytes]) -> str:
        """`set_state` from those of all hosts, in their order, who may have been another number of hosts.

        These hosts have been the same number of steps along the same order, so the next one is where all
        have been. Where they have skipped samples or filled rows with several, they were not side by side:
        then nothing comes twice, but what only some of them had reached is left out, and the answer, which is
        empty otherwise, says so.
        """
        host, hosts = self._identity["host"], self._identity["num_hosts"]
        if len(states) == hosts:
            self.set_state(states[host])
            return ""
        found = [json.loads(state) for state in states]
        rows = self._identity["batch_size"] // len(found)
        batches = [(each["place"] + bool(each["taken"])) / rows for each in found]
        place = math.ceil(max(batches)) * self._rows
        identity = found[0]["identity"] | {"host": host, "num_hosts": hosts}
        state = found[0] | {"place": place, "taken": 0, "identity": identity}
        self.set_state(json.dumps(state).encode())
        if self._identity["share_image"] == 1 and len({*batches}) == 1 and batches[0].is_integer():
            return ""
        return f"{len(found)} hosts were not at the same sample, {hosts} go on behind the last of them"

    def close(self) -> None:
        """Ends threads and workers; the next batch would start them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
            self._read.clear()

    def _start(self) -> grain.DatasetIterator[list[Element]] | Watched[list[Element]]:
        # A worker keeps few, for a hundred of them are hundreds of megabytes; this process keeps the others.
        ahead = min(self._ahead, MOST_AHEAD) if self._workers else self._ahead
        ahead = max(self._threads, ahead)
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=ahead)
        places = self._places[self._at[0] :].to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():
                # Grain asks for its own, which a program that isn't absl's never parses.
                flags.FLAGS.mark_as_parsed()
            processes = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=ahead)
            places = grain.experimental.WithOptionsIterDataset(
                places, grain.experimental.DatasetOptions(min_shm_size=1 << 16)
            )
            places = places.mp_prefetch(processes, worker_init_fn=_start_worker)
            return Watched(iter(places), ahead=self._ahead)
        return iter(places)

    def _peek(self) -> Example:
        """The next example, which stays the next one; what was skipped before it is counted."""
        if self._iterator is None:
            self._iterator = self._start()
            self._read.extend(next(self._iterator))
            # By samples: what becomes of them may be another number of sequences than it was.
            taken = 0
            while self._read and taken < self._at[1]:
                taken += _samples(self._read.popleft())
        while True:
            while not self._read:
                self._read.extend(next(self._iterator))
                self._at = (self._at[0] + 1, 0)
            if isinstance(element := self._read[0], Example):
                return element
            self._advance()
            self._skip(element)

    def _take(self, example: Example) -> None:
        """Goes on behind the example that `_peek` gave."""
        self._advance()
        self.dropped_turns += example.dropped_turns
        self.dropped_regions += example.dropped_regions
        self._failures.extend([0.0] * len(example.sample_ids))
        if example.broken:
            for told in example.broken:
                why = reason(ValueError(told.partition(", ")[2]))
                self.broken_regions[why] += 1
                self._tell(Skipped(told.partition(", ")[0], why, told))
            share = len(example.broken) / (len(example.broken) + len(example.masks.position))
            self._failures[-1] = share
            self._check_failures(example.broken[-1])

    def _advance(self) -> None:
        taken = _samples(self._read.popleft())
        self._at = (self._at[0], self._at[1] + taken)

    def _skip(self, element: Skipped) -> None:
        self._failures.append(1.0)
        self.skipped[element.reason] += 1
        self._tell(element)
        self._check_failures(f"{element.sample_id}: {element.message}")

    def _tell(self, element: Skipped) -> None:
        if self.report is not None:
            with self.report.open("a") as file:
                file.write(json.dumps(element._asdict()) + "\n")
        _log.warning("skipped %s: %s", element.sample_id, element.message)

    def _check_failures(self, last: str) -> None:
        looked_at = max(len(self._failures), AT_LEAST)
        if sum(self._failures) > self._tolerance * looked_at:
            raise FailingSamples(
                f"more than {self._tolerance:.0%} of the last {looked_at} samples failed "
                f"({_commonest(self.skipped + self.broken_regions)}), the last one {last}"
                + (f"; each is named in {self.report}" if self.report else "")
            )


def _samples(element: Element) -> int:
    return len(element.sample_ids) if isinstance(element, Example) else 1


def _commonest(reasons: collections.Counter[str]) -> str:
    """The commonest reasons, in words."""
    named = [f"{count}: {told}" for told, count in reasons.most_common(SHOWN)]
    others = len(reasons) - len(named)
    return "; ".join([*named, *([f"{others} other reasons"] if others else [])])


def _start_worker(worker: int, num_workers: int) -> None:
    end_with_parent()
