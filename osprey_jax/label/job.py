"""The work: images are read ahead in threads, units are answered one after another, a thread writes them."""

import collections
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from data_pipelines.reasons import message
from osprey_jax.engine import Prepared
from osprey_jax.label.inputs import Fault, Input, Region
from osprey_jax.label.output import Output, Part
from osprey_jax.label.plan import Plan
from osprey_jax.label.ways import Answerer, Way
from osprey_jax.masks import decode_rles
from osprey_jax.region_lines import encode, mask_box, region_line

AHEAD = 2
"""Units that are read while one is answered, and units that wait to be written."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked of every region, and what lines say of it."""

    way: Way
    question: str
    versions: Mapping[str, str]
    """Of the model and of the prompt, for every line."""


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """An image that was read, or what is wrong with it."""

    source: Mapping[str, Any]
    regions: tuple[Region, ...] = ()
    boxes: tuple[list[int], ...] = ()
    areas: tuple[int, ...] = ()
    faults: tuple[Fault, ...] = ()
    prepared: Prepared | None = None
    """None where there is no region."""


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """Images that were read and answered together."""

    number: int
    images: Sequence[Image]
    answers: Sequence[Sequence[Any]]
    """Of the images that have regions."""


class NothingWorks(ValueError):
    """So many images failed one after another that it can't be their own fault."""


def label(
    osprey: Answerer,
    data: Input,
    plan: Plan,
    output: Output,
    asked: Asked,
    *,
    give_up_after: int,
) -> None:
    """Writes what is missing of the output's shards, with a bar on stderr.

    Raises NothingWorks where `give_up_after` images fail one after another, or no image at all has a region;
    nothing is written of the last ones, so that they are tried again.
    """
    places = {
        unit: (shard, number)
        for shard, note in output.notes.items()
        for number, unit in enumerate(plan.units(shard))
        if number >= note.units
    }
    with _Progress(data, plan, output, places) as advance:
        held = _Held(give_up_after)

        def write(unit: Unit) -> None:
            part = to_part(unit, asked)
            for number, ready in held.release(unit, part):
                output.add(*places[number], ready)
            advance(plan.images(unit.number), part)

        run_units(osprey, data, plan, list(places), asked.way, write)
        worked = any(note.regions for note in output.notes.values())
        for number, part in held.rest(worked=worked):
            output.add(*places[number], part)
        if not worked and any(len(plan.units(shard)) for shard in output.notes):
            raise NothingWorks("none of the images has a region: nothing was described")
        output.declare()


def run_units(
    osprey: Answerer,
    data: Input,
    plan: Plan,
    units: Iterable[int],
    way: Way,
    done: Callable[[Unit], None],
) -> None:
    """Reads and answers units; `done` is called for one after another, in a thread of its own."""
    readers = ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 1), thread_name_prefix="read")
    writer = ThreadPoolExecutor(1, thread_name_prefix="write")
    waiting: collections.deque[Future[None]] = collections.deque()
    try:
        for unit, images in _read_ahead(readers, osprey, data, plan, units):
            prepared = [image.prepared for image in images if image.prepared is not None]
            answers = way.answers(osprey, prepared) if prepared else []
            waiting.append(writer.submit(done, Unit(unit, images, answers)))
            if len(waiting) > AHEAD:
                waiting.popleft().result()
        while waiting:
            waiting.popleft().result()
    finally:
        readers.shutdown(wait=False, cancel_futures=True)
        writer.shutdown(wait=True, cancel_futures=True)


def _read_ahead(
    pool: ThreadPoolExecutor, osprey: Answerer, data: Input, plan: Plan, units: Iterable[int]
) -> Iterator[tuple[int, list[Image]]]:
    reading: collections.deque[tuple[int, list[Future[Image]]]] = collections.deque()
    for unit in itertools.chain(units, [None] * (AHEAD + 1)):
        if unit is not None:
            futures = [pool.submit(read_image, osprey, data, index) for index in plan.images(unit)]
            reading.append((unit, futures))
        if reading and (unit is None or len(reading) > AHEAD):
            first, futures = reading.popleft()
            yield first, [future.result() for future in futures]


def read_image(osprey: Answerer, data: Input, index: int) -> Image:
    """Reads an image and makes it ready for the network; what is wrong with it is a fault of its own."""
    source = data.source(index)
    try:
        picture = data.read(index)
        source = picture.source
        if not picture.regions:
            return Image(source, faults=picture.faults)
        masks = decode_rles([region.segmentation for region in picture.regions])
        return Image(
            source,
            picture.regions,
            tuple(mask_box(mask) for mask in masks),
            tuple(int(mask.sum()) for mask in masks),
            picture.faults,
            osprey.prepare(picture.image, masks),
        )
    except MemoryError:
        raise
    except Exception as error:  # files are broken in all kinds of ways
        return Image(source, faults=(Fault(None, message(error)),))


def to_part(unit: Unit, asked: Asked) -> Part:
    """The lines of a unit."""
    lines, skipped = [], []
    answers = iter(unit.answers)
    for image in unit.images:
        for fault in image.faults:
            region = {} if fault.region is None else {"region": fault.region}
            skipped.append(encode({**image.source, **region, "reason": fault.reason}))
        said = next(answers) if image.prepared is not None else []
        for region_, box, area, answer in zip(image.regions, image.boxes, image.areas, said, strict=True):
            line = region_line(
                image.source,
                region=region_.id,
                label=region_.label,
                box=box,
                area=area,
                segmentation=region_.segmentation,
                question=asked.question,
                answer={**asked.way.told(answer), **asked.versions},
            )
            lines.append(encode(line))
    return Part(
        b"".join(lines),
        b"".join(skipped),
        images=len(unit.images),
        described=sum(image.prepared is not None for image in unit.images),
        regions=len(lines),
        skipped=len(skipped),
        skipped_images=sum(fault.region is None for image in unit.images for fault in image.faults),
    )


class _Held:
    """Keeps back units of which nothing worked until a later one shows that the job as a whole does."""

    def __init__(self, give_up_after: int):
        self._give_up_after = give_up_after
        self._units: list[tuple[int, Part]] = []
        self._failed = 0
        self._first = ""

    def release(self, unit: Unit, part: Part) -> list[tuple[int, Part]]:
        """What can be written now that this unit is done."""
        for image in unit.images:
            if image.regions:
                self._failed = 0
            elif image.faults:
                if not self._failed:
                    name = image.source.get("image", f"record {image.source.get('record')}")
                    self._first = f"{name}: {image.faults[0].reason}"
                self._failed += 1
            if self._failed >= self._give_up_after:
                raise NothingWorks(
                    f"{self._failed} images failed one after another, so nothing more is written; first "
                    f"{self._first}. The same command tries them again; --give-up-after allows more"
                )
        self._units.append((unit.number, part))
        if not part.regions:
            return []
        ready, self._units = self._units, []
        return ready

    def rest(self, *, worked: bool) -> list[tuple[int, Part]]:
        """What is left at the end; `worked` tells whether anything did."""
        if self._failed and not worked:
            raise NothingWorks(f"not one image can be used; the first of them: {self._first}")
        return self._units


class _Progress:
    """Shows how far all of it is, what a former run did included."""

    def __init__(self, data: Input, plan: Plan, output: Output, places: Mapping[int, tuple[int, int]]):
        shards = [unit for shard in output.notes for unit in plan.units(shard)]
        todo = sum(self._weight(data, plan.images(unit)) for unit in places)
        total = sum(self._weight(data, plan.images(unit)) for unit in shards)
        self._data = data
        self._skipped = sum(note.skipped for note in output.notes.values())
        self._images = sum(note.images for note in output.notes.values())
        self._regions, self._start = 0, time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=total - todo,
            unit=" images" if data.counts is None else " regions",
            mininterval=0.5,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Callable[[range, Part], None]:
        return self._advance

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @staticmethod
    def _weight(data: Input, images: range) -> int:
        if data.counts is None:
            return len(images)
        return int(data.counts[images.start : images.stop].sum())

    def _advance(self, images: range, part: Part) -> None:
        self._images += len(images)
        self._skipped += part.skipped
        self._regions += part.regions
        told = [f"{self._images:,} images"]
        if self._data.counts is None:
            told = [f"{self._regions / (time.monotonic() - self._start):.1f} regions/s"]
        if self._skipped:
            told.append(f"{self._skipped:,} skipped")
        self._bar.set_postfix_str(", ".join(told), refresh=False)
        self._bar.update(self._weight(self._data, images))
