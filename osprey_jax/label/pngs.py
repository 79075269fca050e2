"""Masks in PNGs: label maps, panoptic ids in colours, a mask for each region."""

import collections
import io
import os
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from osprey_jax.image import load_image
from osprey_jax.label.folders import IMAGE_SUFFIXES, Folder, digest
from osprey_jax.label.inputs import Fault, Picture, Region
from osprey_jax.masks import encode_rle
from osprey_jax.region_files import natural, read_png, single_mask


class Pngs:
    """For the image `a.jpg` the label map `a.png`, or masks `a/….png` or `a_….png`."""

    counts = None

    def __init__(self, images: Folder, masks: Folder, names: Sequence[str], *, same: bool):
        """`same` says that images and masks lie in one folder, where PNGs are masks."""
        suffixes = tuple(suffix for suffix in IMAGE_SUFFIXES if not (same and suffix == ".png"))
        stems: dict[str, str] = {}
        for name in images.names(*suffixes):
            stem = posixpath.splitext(name)[0]
            if stem in stems:
                raise ValueError(f"which one do masks belong to, {stems[stem]} or {name}?")
            stems[stem] = name
        if not stems:
            raise ValueError(f"no images ({', '.join(suffixes)}) among those given")
        found = collections.defaultdict[str, list[str]](list)
        for name in names:
            owner = _stem(posixpath.splitext(name)[0], stems)
            if owner is not None:
                found[owner].append(name)
        self.left_out = []
        if strange := len(names) - sum(map(len, found.values())):
            self.left_out.append(f"{strange:,} of {len(names):,} mask PNGs belong to none of the images")
        if not found:
            raise ValueError(
                f"none of {len(names)} mask PNGs belongs to one of {len(stems)} images: masks of photo.jpg "
                f"are photo.png, photo/….png or photo_….png; the first mask is {names[0]}, the first image "
                f"{next(iter(stems.values()))}"
            )
        self._images, self._masks = images, masks
        self._listed = [(stems[stem], tuple(sorted(found[stem], key=natural))) for stem in sorted(found)]
        self.fingerprint = digest(
            [image, *([name, self._masks.size(name)] for name in names)] for image, names in self._listed
        )

    def __len__(self) -> int:
        return len(self._listed)

    def source(self, index: int) -> Mapping[str, Any]:
        """See `Input`."""
        return {"image": self._listed[index][0]}

    def image(self, source: Mapping[str, Any]) -> bytes:
        """See `Input`."""
        return self._images.read(source["image"])

    def read(self, index: int) -> Picture:
        """See `Input`."""
        source, names = self.source(index), self._listed[index][1]
        image = load_image(self.image(source))
        size = (image.shape[0], image.shape[1])
        stem = posixpath.splitext(source["image"])[0]
        if len(names) == 1 and posixpath.splitext(names[0])[0] == stem:
            ids = read_ids(self._masks.read(names[0]), names[0], size)
            found = [Region(value, None, segment(ids, value)) for value in np.unique(ids[ids != 0]).tolist()]
            return Picture(source, image, tuple(found), ())
        regions, faults = [], []
        for number, name in enumerate(names, 1):
            label = posixpath.splitext(name)[0].removeprefix(stem)[1:]
            try:
                mask = single_mask(read_ids(self._masks.read(name), name, size), name)
            except (ValueError, OSError) as error:
                faults.append(Fault(number, str(error)))
            else:
                regions.append(Region(number, label, encode_rle(mask)))
        return Picture(source, image, tuple(regions), tuple(faults))


def _stem(mask: str, stems: Mapping[str, str]) -> str | None:
    """The image that a mask's name, without its suffix, belongs to."""
    folder = posixpath.dirname(mask)
    for stem in (mask, folder):
        if stem in stems:
            return stem
    while "_" in os.path.basename(mask):
        mask = mask.rpartition("_")[0]
        if mask in stems:
            return mask
    return None


def read_ids(data: bytes, name: str, size: tuple[int, int]) -> np.ndarray:
    """`(h, w)` int32 of a label map, or of panoptic colours as R + 256 G + 65536 B.

    Raises ValueError, which names the file, for what is neither, or not of `size`.
    """
    values = read_png(io.BytesIO(data), name, size)
    if values.ndim == 2:
        return values
    if values.shape[2] != 3:
        raise ValueError(f"{name} has {values.shape[2]} channels; ids have one, or three as panoptic colours")
    return values @ np.array([1, 256, 65536], np.int32)


def segment(ids: np.ndarray, value: int) -> dict[str, Any]:
    """The RLE of the pixels of one id; ValueError where there is none."""
    mask = ids == value
    if not mask.any():
        raise ValueError(f"no pixel has its id {value}")
    return encode_rle(mask)
