"""Data sets that TFDS hosts, read where they were prepared as ArrayRecord: `coco`, `ref_coco`, `lvis`.

To prepare one takes TensorFlow for some of them; reading takes none. In Python, for example,
`tfds.builder("lvis", data_dir=DIR, file_format="array_record").download_and_prepare()`.
"""

import abc
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from data_pipelines.records import Record, Rle, Turn
from data_pipelines.sources.coco import Coco, RefCoco, RefCocoPlus
from osprey_jax.image import image_size
from osprey_jax.masks import encode_rle
from osprey_jax.prompt import REGION


class _Hosted(abc.ABC):
    """One record for each image.

    Args:
      annotations: TFDS's `data_dir`; None for TFDS's own choice.
      split: TFDS's name of a split, such as `train` or `train[:10%]`.

    Raises ValueError where the data set isn't there, or only in files that can't be read record by record.
    """

    name: ClassVar[str]
    dataset: str
    """TFDS's name, with that of the configuration."""
    opening: str
    at_most: int

    def __init__(
        self,
        annotations: str | os.PathLike[str] | None = None,
        *,
        split: str = "train",
    ):
        self._data_dir = None if annotations is None else os.path.abspath(annotations)
        self._split = split
        self._open()

    def _open(self) -> None:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.read_only_builder import builder_from_files
        from tensorflow_datasets.core.registered import DatasetNotFoundError

        # `tfds.data_source` would run the code that prepares the set, and with it TensorFlow.
        where = self._data_dir or "TFDS's data directory"
        try:
            builder = builder_from_files(self.dataset, data_dir=self._data_dir)
        except DatasetNotFoundError as error:
            raise ValueError(f"no data set {self.dataset} that TFDS prepared in {where}") from error
        try:
            self._records = builder.as_data_source(
                self._split, decoders={"image": tfds.decode.SkipDecoding()}
            )
        except NotImplementedError as error:
            raise ValueError(
                f"{self.dataset} in {where} can't be read record by record: "
                "prepare it with file_format=array_record"
            ) from error
        self._objects = builder.info.features["objects"]

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the files for itself.
        return {name: value for name, value in vars(self).items() if name not in ("_records", "_objects")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    @property
    def dropped(self) -> Mapping[str, int]:
        """Nothing: whether an image has objects shows when it is read."""
        return {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        self._check(index)
        fields = self._records[index]
        objects = fields["objects"]
        masks, turns = [], []
        height, width = image_size(fields["image"])
        for number in range(len(objects["bbox"])):
            masks.append(self._mask(objects, number, height, width))
            turns += [Turn(REGION, answer, (number,)) for answer in self._answers(objects, number)]
        if not turns:
            raise ValueError("the image has no objects")
        return Record(
            sample_id=f"{self.name}/{fields['image/id']}",
            image=fields["image"],
            masks=tuple(masks),
            turns=tuple(turns),
            opening=self.opening,
            at_most=self.at_most,
        )

    def image_key(self, index: int) -> str:
        """A name that only this set has for the image: no other is known without reading it."""
        self._check(index)
        return f"tfds/{self.dataset}/{self._split}/{index}"

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"no record {index} among {len(self)} of {self.dataset}")

    @abc.abstractmethod
    def _mask(self, objects: Mapping[str, Any], number: int, height: int, width: int) -> Rle:
        """The region of an object."""

    def _answers(self, objects: Mapping[str, Any], number: int) -> Sequence[str]:
        """What is said about an object, one thing a turn; here its category."""
        return [self._objects["label"].int2str(objects["label"][number]).replace("_", " ")]


class HostedCoco(_Hosted):
    """COCO 2017 with the conversation of `sources.coco.Coco`; regions are the boxes, no masks are hosted."""

    name = "tfds_coco"
    dataset = "coco/2017"
    opening, at_most = Coco.opening, Coco.at_most

    def _mask(self, objects: Mapping[str, Any], number: int, height: int, width: int) -> Rle:
        """The pixels whose centre is in the box."""
        y0, x0, y1, x1 = objects["bbox"][number]
        mask = np.zeros((height, width), bool)
        mask[_pixels(y0, y1, height), _pixels(x0, x1, width)] = True
        return encode_rle(mask)


class HostedLvis(_Hosted):
    """LVIS with its masks and the conversation of `sources.coco.Coco`."""

    name = "tfds_lvis"
    dataset = "lvis"
    opening, at_most = Coco.opening, Coco.at_most

    def _mask(self, objects: Mapping[str, Any], number: int, height: int, width: int) -> Rle:
        return encode_rle(objects["segmentation"][number][..., 0] > 0)


class HostedRefCoco(_Hosted):
    """RefCOCO, RefCOCO+ or RefCOCOg with RefCOCO's conversation, a turn for each referring expression."""

    name = "tfds_ref_coco"
    at_most = RefCoco.at_most

    def __init__(
        self,
        annotations: str | os.PathLike[str] | None = None,
        *,
        split: str = "train",
        config: str = "refcoco_unc",
    ):
        """See above; `config` is TFDS's, `refcocoplus_unc` for example."""
        self.dataset = f"ref_coco/{config}"
        self.opening = (RefCocoPlus if config.startswith("refcocoplus") else RefCoco).opening
        super().__init__(annotations, split=split)

    def _mask(self, objects: Mapping[str, Any], number: int, height: int, width: int) -> Rle:
        return encode_rle(objects["mask"][number][..., 0] > 0)

    def _answers(self, objects: Mapping[str, Any], number: int) -> Sequence[str]:
        return [raw.decode() for raw in objects["refexp"]["raw"][number]]


def _pixels(low: float, high: float, side: int) -> slice:
    """Pixels whose centre is between two places that are given as shares of a side."""
    return slice(*(math.ceil(min(max(float(share), 0), 1) * side - 0.5) for share in (low, high)))
