"""How a record lies in ArrayRecord files, and which files a prepared directory has.

A record is a `tf.Example` of the features below, so that TFDS reads it too. The image is an encoded file, as
the source gave it: TFDS's own image feature would decode it in another way (palettes, CMYK, 16 bits) and can
not say that there is none.
"""

import dataclasses
import functools
import hashlib
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from data_pipelines.records import Record, Turn

if TYPE_CHECKING:
    from tensorflow_datasets.core.features import FeaturesDict

VERSION = 1
SPLIT = "train"

PREPARED = "prepared.json"
"""Written last: a directory that has it is complete."""
KEYS = "image_keys.npy"
"""uint64 `(records,)`: a hash of each record's image, equal for equal files in whatever directory."""
LEFT_OUT = "left_out.jsonl"
"""A line for each sample of the source that isn't in the files, and why."""
PROGRESS = ".prepare"
"""A directory for what an unfinished run has to remember."""


@functools.cache
def features() -> "FeaturesDict":
    """The features of a record, for TFDS."""
    import tensorflow_datasets as tfds

    text, number = tfds.features.Text(), tfds.features.Scalar(np.int32)
    return tfds.features.FeaturesDict(
        {
            "sample_id": text,
            "image": tfds.features.Scalar(np.object_, optional=True, doc="an encoded file; may be absent"),
            "height": tfds.features.Scalar(np.int32, doc="of the masks; 0 without any"),
            "width": number,
            "masks": tfds.features.Sequence(text, doc="counts of COCO's compressed RLE"),
            "turns": tfds.features.Sequence(
                {
                    "question": text,
                    "answer": text,
                    # Lists of lists would need TensorFlow to be written.
                    "num_regions": tfds.features.Scalar(np.int32, doc="how many of `regions` are its own"),
                    "phrases": text,
                    "slot": text,
                }
            ),
            "regions": tfds.features.Sequence(np.int32, doc="of all turns, one after another"),
            "opening": text,
            "opening_regions": tfds.features.Sequence(np.int32),
            "broken_regions": tfds.features.Sequence(text, doc="what is wrong with those left out"),
            "at_most": number,
            "plain": tfds.features.Scalar(np.bool_),
        }
    )


@functools.cache
def _serializer() -> Any:
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    return ExampleSerializer(features().get_serialized_info())


def encode(record: Record) -> bytes:
    """The record as a `tf.Example`; the same bytes each time. An image that is an array becomes a PNG.

    Raises ValueError for masks of several sizes and for text that can't be UTF-8.
    """
    image = _png(record.image) if isinstance(record.image, np.ndarray) else record.image
    if len(sizes := {tuple(mask["size"]) for mask in record.masks}) > 1:
        raise ValueError(f"masks are of several sizes: {', '.join(map(str, sorted(sizes)))}")
    height, width = sizes.pop() if sizes else (0, 0)
    example = {
        "sample_id": record.sample_id,
        "image": image,
        "height": height,
        "width": width,
        "masks": [mask["counts"] for mask in record.masks],
        "turns": [
            {
                "question": turn.question,
                "answer": turn.answer,
                "num_regions": len(turn.regions),
                "phrases": turn.phrases,
                "slot": turn.slot,
            }
            for turn in record.turns
        ],
        "regions": [region for turn in record.turns for region in turn.regions],
        "opening": record.opening,
        "opening_regions": list(record.opening_regions),
        "broken_regions": list(record.broken_regions),
        "at_most": record.at_most,
        "plain": record.plain,
    }
    proto = _serializer().get_tf_example(features().encode_example(example))
    # Otherwise the order of the features, a map, would differ from process to process.
    return proto.SerializeToString(deterministic=True)


def decode(data: bytes) -> Record:
    """The record that `encode` was given, but for an array, of which this has the PNG."""
    from tensorflow_datasets.proto import tf_example_pb2  # imported where it is used: a fifth of a second

    feature = tf_example_pb2.Example.FromString(data).features.feature

    def texts(name: str) -> list[str]:
        return [value.decode() for value in feature[name].bytes_list.value]

    def numbers(name: str) -> tuple[int, ...]:
        return tuple(feature[name].int64_list.value)

    size = [*numbers("height"), *numbers("width")]
    regions, turns, start = numbers("regions"), [], 0
    for question, answer, count, phrases, slot in zip(
        texts("turns/question"),
        texts("turns/answer"),
        numbers("turns/num_regions"),
        texts("turns/phrases"),
        texts("turns/slot"),
        strict=True,
    ):
        turns.append(Turn(question, answer, regions[start : start + count], phrases, slot))
        start += count
    return Record(
        sample_id=texts("sample_id")[0],
        image=feature["image"].bytes_list.value[0] if "image" in feature else None,
        masks=tuple({"size": list(size), "counts": counts} for counts in texts("masks")),
        turns=tuple(turns),
        opening=texts("opening")[0],
        opening_regions=numbers("opening_regions"),
        broken_regions=tuple(texts("broken_regions")),
        at_most=numbers("at_most")[0],
        plain=bool(numbers("plain")[0]),
    )


def image_hash(data: bytes) -> int:
    """64 bits that tell images apart; by their bytes, so that names and places don't matter."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of a prepared directory; has the fields by which ArrayRecord knows a file without opening it."""

    filename: str
    take: int
    """Records in it."""
    num_bytes: int
    """Size of the file."""
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        """ArrayRecord's name for `take`."""
        return self.take


def shard_name(dataset: str, shard: int, num_shards: int) -> str:
    """The file name that TFDS gives to a shard."""
    return f"{dataset}-{SPLIT}.array_record-{shard:05d}-of-{num_shards:05d}"


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
