"""The sources by name: what reads each, where its files are under one data root, and where to get them."""

import dataclasses
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from data_pipelines.records import Source

_CUSTOM = "custom:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A source that can be named."""

    reader: str
    """Module and class, which are imported when the source is opened: some take much with them."""
    annotations: str | None = None
    """Its file under the data root; None for a source that has no place there."""
    images: str | None = None
    """The place of its images under the data root, as `open_images` takes them."""
    needs: tuple[str, ...] = ("annotations", "images")
    """Which of the two have to be given to open it."""
    optional: tuple[str, ...] = ()
    """Which may be given."""
    get: str
    """What to download and where to put it."""

    def open(self, **paths: str | os.PathLike[str]) -> Source:
        """Makes the source of what it needs."""
        module, _, reader = self.reader.partition(":")
        made: Source = getattr(importlib.import_module(module), reader)(**paths)
        return made


_SOURCES = "data_pipelines.sources"
_HUB = "the Hub data set sunshine-lwt/Osprey-TrainingData"
_COCO_IMAGES = "the images of COCO's train2017.zip and val2017.zip (cocodataset.org), together in coco/imgs"


def _osprey_724k(reader: str, file: str) -> Entry:
    path = f"Osprey-724K/{file}.json"
    return Entry(
        reader=f"{_SOURCES}.osprey_724k:{reader}",
        annotations=path,
        images="coco/imgs",
        get=f"{file}.json of the Hub data set AntGroup-MI/Osprey-724K as {path}; {_COCO_IMAGES}.",
    )


def _hosted(reader: str, data_set: str) -> Entry:
    return Entry(
        reader=f"{_SOURCES}.hosted:{reader}",
        needs=(),
        optional=("annotations",),
        get=f"TFDS's {data_set}, prepared with file_format=array_record; annotations is TFDS's data_dir.",
    )


CATALOG: Mapping[str, Entry] = MappingProxyType(
    {
        "coco": Entry(
            reader=f"{_SOURCES}.coco:Coco",
            annotations="coco/annotations/instances_train2017.json",
            images="coco/imgs",
            get="annotations_trainval2017.zip (cocodataset.org), of which instances_train2017.json as "
            f"coco/annotations/instances_train2017.json; {_COCO_IMAGES}.",
        ),
        "refcoco": Entry(
            reader=f"{_SOURCES}.coco:RefCoco",
            annotations="refcocos/finetune_refcoco_train_with_mask.json",
            images="coco/imgs",
            get=f"finetune_refcoco_train_with_mask.json of {_HUB} into refcocos; {_COCO_IMAGES}.",
        ),
        "refcoco_plus": Entry(
            reader=f"{_SOURCES}.coco:RefCocoPlus",
            annotations="refcocos/finetune_refcoco+_train_with_mask.json",
            images="coco/imgs",
            get=f"finetune_refcoco+_train_with_mask.json of {_HUB} into refcocos; {_COCO_IMAGES}.",
        ),
        "pascal_part": Entry(
            reader=f"{_SOURCES}.coco:PascalPart",
            annotations="part_data/pascal_part/train.json",
            images="part_data/pascal_part/VOCdevkit/VOC2010/JPEGImages",
            get=f"pascalpart_train.json of {_HUB} as part_data/pascal_part/train.json; the images of Pascal "
            "VOC 2010, whose folder VOCdevkit goes into part_data/pascal_part.",
        ),
        "part_imagenet": Entry(
            reader=f"{_SOURCES}.coco:PartImageNet",
            annotations="part_data/partImagenet/train_format.json",
            images="part_data/partImagenet/train",
            get=f"partImagenet_train_format.json of {_HUB} as part_data/partImagenet/train_format.json; the "
            "images of PartImageNet_OOD, whose folder train goes into part_data/partImagenet.",
        ),
        "vg": Entry(
            reader=f"{_SOURCES}.coco:VisualGenome",
            annotations="vg/vg_train_with_mask.json",
            images="vg/image",
            get=f"vg_train_with_mask.json of {_HUB} into vg; the images of Visual Genome 1.2 "
            "(VG_100K and VG_100K_2), together in vg/image.",
        ),
        "vcr": Entry(
            reader=f"{_SOURCES}.vcr:Vcr",
            annotations="vcr/train.jsonl",
            images="vcr/vcr1images",
            get="vcr1annots.zip and vcr1images.zip (visualcommonsense.com), of which train.jsonl and the "
            "folder vcr1images go into vcr.",
        ),
        "osprey_conversation": _osprey_724k("OspreyConversation", "osprey_conversation"),
        "osprey_short_form": _osprey_724k("OspreyShortForm", "osprey_short_form"),
        "osprey_part_level": _osprey_724k("OspreyPartLevel", "osprey_part_level"),
        "osprey_lvis": _osprey_724k("OspreyLvis", "osprey_lvis_positive_negative"),
        "osprey_detailed": _osprey_724k("OspreyDetailed", "osprey_detail_description"),
        "llava_pretrain": Entry(
            reader=f"{_SOURCES}.llava:LlavaPretrain",
            annotations="LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
            images="LLaVA-Pretrain/images",
            get="blip_laion_cc_sbu_558k.json of the Hub data set liuhaotian/LLaVA-Pretrain into "
            "LLaVA-Pretrain; what is in its images.zip into LLaVA-Pretrain/images.",
        ),
        "llava_instruct": Entry(
            reader=f"{_SOURCES}.llava:LlavaInstruct",
            annotations="llava_v1_5_mix665k.json",
            images=".",
            get="llava_v1_5_mix665k.json of the Hub data set liuhaotian/LLaVA-Instruct-150K into the data "
            "root itself; its images beside it, by the names that they have there: coco/train2017 (a link to "
            "coco/imgs will do), gqa/images, ocr_vqa/images, textvqa/train_images, vg/VG_100K and "
            "vg/VG_100K_2.",
        ),
        "custom": Entry(
            reader=f"{_SOURCES}.custom:Custom",
            needs=("annotations",),
            optional=("images",),
            get="Your own JSONL; under a data root it is named custom:FILE.jsonl.",
        ),
        "shapes": Entry(
            reader="data_pipelines.shapes:Shapes", needs=(), get="Nothing: it is drawn as it is read."
        ),
        "tfds_coco": _hosted("HostedCoco", "coco/2017"),
        "tfds_ref_coco": _hosted("HostedRefCoco", "ref_coco"),
        "tfds_lvis": _hosted("HostedLvis", "lvis"),
    }
)
"""Every source that has a name."""


def open_source(
    name: str,
    *,
    annotations: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
) -> Source:
    """Opens a source of the catalog.

    Args:
      name: a key of `CATALOG`.
      annotations: its annotation file; of one that TFDS hosts, TFDS's `data_dir`.
      images: what `open_images` takes.

    Raises:
      ValueError: an unknown name, something that the source needs or doesn't take, a file of another form.
      OSError: a file that isn't there.
    """
    entry = CATALOG.get(name)
    if entry is None:
        raise ValueError(_unknown(name))
    given = {"annotations": annotations, "images": images}
    paths = {key: path for key, path in given.items() if path is not None}
    if lacking := [key for key in entry.needs if key not in paths]:
        raise ValueError(f"the source {name} needs {' and '.join(lacking)}")
    if strange := [key for key in paths if key not in entry.needs + entry.optional]:
        raise ValueError(f"the source {name} takes no {' and no '.join(strange)}")
    return entry.open(**paths)


def open_from_root(name: str, root: str | os.PathLike[str]) -> Source:
    """Opens a source whose files are in their places under a data root.

    Args:
      name: a key of `CATALOG`, `custom:FILE.jsonl`, or a directory that `python -m data_pipelines prepare`
        wrote; file and directory are relative to the root.
      root: the directory of all data.

    Raises as `open_source` does; `missing` says the same of several sources at once.
    """
    root = Path(root)
    if name.startswith(_CUSTOM):
        return CATALOG["custom"].open(annotations=root / name.removeprefix(_CUSTOM))
    if name == "custom":
        raise ValueError(f"which file? name it as {_CUSTOM}FILE.jsonl")
    if name in CATALOG:
        paths = _places(name, root)
        return open_source(name, annotations=paths.get("annotations"), images=paths.get("images"))
    if (root / name).is_dir():
        stored: Source = importlib.import_module("data_pipelines.stored").Stored(root / name)
        return stored
    raise ValueError(_unknown(name))


def missing(names: Sequence[str], root: str | os.PathLike[str]) -> list[str]:
    """What has to be got before these sources can be opened from a data root, a line for each of them."""
    root, lines = Path(root), []
    for name in names:
        if name.startswith(_CUSTOM):
            if not (file := root / name.removeprefix(_CUSTOM)).is_file():
                lines.append(f"{name}: there is no file {file}")
        elif name not in CATALOG:
            if not (root / name).is_dir():
                lines.append(f"{name}: {_unknown(name)}")
        elif paths := _places(name, root):
            if absent := [str(path) for path in paths.values() if not path.exists()]:
                lines.append(f"{name}: there is no {' and no '.join(absent)}. {CATALOG[name].get}")
        else:
            try:
                open_from_root(name, root)
            except (ValueError, OSError, ImportError) as error:
                lines.append(f"{name}: {error}. {CATALOG[name].get}")
    return lines


def _places(name: str, root: Path) -> dict[str, Path]:
    entry = CATALOG[name]
    places = {"annotations": entry.annotations, "images": entry.images}
    return {key: root / place for key, place in places.items() if place is not None}


def _unknown(name: str) -> str:
    return f"no source {name!r}, and no prepared directory; sources are {', '.join(CATALOG)}"
