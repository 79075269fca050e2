"""Images with masks out of the ArrayRecord files that `python -m data_pipelines prepare` wrote."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.stored import Stored
from data_pipelines.stored_format import KEYS, PREPARED
from data_pipelines.transforms import check_sizes
from osprey_jax.directories import as_path
from osprey_jax.image import load_image
from osprey_jax.label.inputs import Picture, Region
from osprey_jax.masks import decode_rles, encode_rle


class Prepared:
    """Records with their masks, numbered from 1; an image that has several records comes several times."""

    counts = None
    left_out = ()

    def __init__(self, directory: str | os.PathLike):
        path = as_path(directory)
        self._stored = Stored(os.fspath(path))
        digest = hashlib.blake2b(digest_size=16)
        for name in (PREPARED, KEYS):
            digest.update((path / name).read_bytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._stored)

    def source(self, index: int) -> Mapping[str, Any]:
        """See `Input`; the record's number is all that is known."""
        return {"record": index}

    def image(self, source: Mapping[str, Any]) -> bytes | np.ndarray:
        """See `Input`."""
        if (image := self._stored[source["record"]].image) is None:
            raise ValueError("the record has no image")
        return image

    def read(self, index: int) -> Picture:
        """See `Input`; a record without an image has no regions."""
        record = self._stored[index]
        source = {"image": record.sample_id, "record": index}
        if record.image is None:
            return Picture(source, np.zeros((1, 1, 3), np.uint8), (), ())
        image = load_image(record.image)
        size = (image.shape[0], image.shape[1])
        rles = record.masks
        check_sizes((mask["size"] for mask in rles), size)
        if rles and tuple(rles[0]["size"]) != size:
            rles = tuple(encode_rle(_resized(mask, size)) for mask in decode_rles(rles))
        return Picture(
            source, image, tuple(Region(number, None, rle) for number, rle in enumerate(rles, 1)), ()
        )


def _resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask at another scale, such as that of an image that was made smaller."""
    scaled = Image.fromarray(mask.astype(np.uint8)).resize((size[1], size[0]), Image.Resampling.NEAREST)
    return np.asarray(scaled) != 0
