"""Writes small files of every format that the sources read, in the folders of one data root."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIZES = ((48, 64), (64, 48), (56, 56), (90, 40), (41, 77), (72, 88))
"""Height and width of the images, by their numbers."""

POLYGON = [[8.0, 8.0, 30.5, 9.0, 28.0, 31.5, 10.0, 27.0]]
TWO_POLYGONS = [[3, 3, 20, 3, 20, 20, 3, 20], [24.5, 22, 38, 24, 30, 37]]
OUTSIDE = [[-9.0, 5.0, 22.0, -6.0, 500.0, 35.0, 12.0, 38.0]]


def image(path: Path, number: int) -> tuple[int, int]:
    """Draws the picture of a number, unlike all others, as a JPEG; gives its height and width."""
    height, width = SIZES[number % len(SIZES)]
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[:height, :width]
    shades = [127 + 100 * np.sin(rows * a + columns * b + c) for a, b, c in rng.uniform(0, 0.4, (3, 3))]
    picture = Image.fromarray(np.stack(shades, axis=-1).astype(np.uint8))
    left, top = (int(v) for v in rng.integers(3, 16, 2))
    ImageDraw.Draw(picture).ellipse(
        (left, top, left + 20, top + 18), tuple(map(int, rng.integers(0, 255, 3)))
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=90)
    return height, width


def box_mask(height: int, width: int, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run lengths as a list, counted one by one: columns after columns, zeros first."""
    counts, value = [0], 0
    for pixel in mask.T.reshape(-1):
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def compressed(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run lengths as a string: five bits a character, differences from the fourth run on."""
    runs, text = uncompressed(mask)["counts"], ""
    for place, run in enumerate(runs):
        value = run - runs[place - 2] if place > 2 else run
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
    return {"size": list(mask.shape), "counts": text}


def segmentations(height: int, width: int) -> list[Any]:
    """One of each form, and masks of different sizes; none is empty."""
    return [
        POLYGON,
        uncompressed(box_mask(height, width, 5, 7, 25, 35)),
        compressed(box_mask(height, width, 12, 2, 39, 18)),
        TWO_POLYGONS,
        OUTSIDE,
    ]


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path: Path, values: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def coco_file(names: list[str], folder: Path, captions: list[str] | None = None, **categories: int) -> dict:
    """COCO's format: an image for each name, with five annotations; draws the images into the folder.

    With captions it is RefCOCO's, whose names have something before the images' own.
    """
    images, annotations = [], []
    for number, name in enumerate(names):
        height, width = image(folder / (name.rpartition("_")[2] if captions else name), number)
        images.append({"id": 100 + number, "file_name": name, "height": height, "width": width})
        if captions:
            images[-1]["caption"] = captions[number]
        for place, segmentation in enumerate(segmentations(height, width)):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + number,
                    "category_id": [*categories.values()][place % len(categories)] if categories else 1,
                    "segmentation": segmentation,
                    "iscrowd": 0,
                    "caption": f"thing {place} of picture {number}",
                }
            )
    named = [{"id": number, "name": name} for name, number in categories.items()]
    return {"info": {}, "images": images, "annotations": annotations, "categories": named}


def osprey_sample(number: int, regions: int, texts: list[str], /, **more: Any) -> dict[str, Any]:
    """A sample of Osprey-724K; the texts are questions and answers in turn."""
    height, width = SIZES[number % len(SIZES)]
    return {
        "file_name": f"COCO_train2014_{number:012}.jpg",
        "height": height,
        "width": width,
        "annotation": [{"segmentation": s} for s in segmentations(height, width)[:regions]],
        "conversations": messages(texts),
        **more,
    }


def messages(texts: list[str]) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def vcr_line(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "img_fn": f"lsmdc/scene@{number}.jpg",
        "metadata_fn": f"lsmdc/scene@{number}.json",
        "objects": ["person", "person", "chair"],
        "question": ["Why", "is", [0], "near", [2], "?"],
        "question_orig": "Why is 1 near 3?",
        "answer_orig": "1 wants to sit down.",
        "rationale_orig": "3 is empty, and 2 is still standing.",
        **changes,
    }


def vcr_metadata(folder: Path, number: int) -> dict[str, Any]:
    """Boxes that aren't whole pixels and polygons inside them; draws the image beside it."""
    height, width = image(folder / f"lsmdc/scene@{number}.jpg", number)
    boxes = [[2.4, 3.1, 24.6, 30.5, 0.99], [11.5, 8.5, 38.2, 37.9, 0.9], [0.0, 0.2, 15.7, 12.3, 0.7]]
    segments = [
        [[[3, 4], [24, 5.5], [20, 30], [4.5, 28]]],
        [[[12, 9], [38, 9], [25, 37]], [[12, 30], [20, 30], [20, 37.5], [12, 37.5]]],
        [[[0, 1], [15, 1], [15, 12], [0, 12]]],
    ]
    names = ["person", "person", "chair"]
    metadata = {"boxes": boxes, "segms": segments, "names": names, "height": height, "width": width}
    write_json(folder / f"lsmdc/scene@{number}.json", metadata)
    return metadata


def write_all(root: Path) -> None:
    """Lays out a data root with every source, three samples each, in the folders that the original has."""
    coco = root / "coco/imgs"
    names = [f"{number:012}.jpg" for number in range(3)]
    longer = [f"COCO_train2014_{name}" for name in names]
    instances = coco_file(names, coco, person=1, dog=18, cup=47)
    write_json(root / "coco/annotations/instances_train2017.json", instances)
    for file in ("finetune_refcoco_train_with_mask", "finetune_refcoco+_train_with_mask"):
        captions = ["the left one with a hat", "a dog behind the cup", "red cup"]
        write_json(root / f"refcocos/{file}.json", coco_file(longer, coco, captions))

    parts = root / "part_data"
    pascal = ["2008_000001.jpg", "2008_000002.jpg", "2009_000003.jpg"]
    pascal_images = parts / "pascal_part/VOCdevkit/VOC2010/JPEGImages"
    write_json(
        parts / "pascal_part/train.json",
        coco_file(pascal, pascal_images, **{"dog:ear": 1, "car:wheel": 2, "dog:tail": 5}),
    )
    part_names = [f"n02510455/n02510455_{number}.JPEG" for number in (11, 12, 13)]
    part_categories = {"Quadruped Head": 0, "Car Tier": 4}
    write_json(
        parts / "partImagenet/train_format.json",
        coco_file(part_names, parts / "partImagenet/train", **part_categories),
    )

    genome = coco_file(["2400001.jpg", "2400002.jpg", "2400003.jpg"], root / "vg/image")
    genome["annotations"][1]["ignore"] = 1
    write_json(root / "vg/vg_train_with_mask.json", genome)

    for number in range(3):
        vcr_metadata(root / "vcr/vcr1images", number)
    write_lines(root / "vcr/train.jsonl", [vcr_line(number) for number in range(3)])

    write_osprey_724k(root / "Osprey-724K", coco)
    write_llava(root)


def write_osprey_724k(folder: Path, images: Path) -> None:
    """The five files, three samples each, about images 0 to 2."""
    for number in range(3):
        image(images / f"{number:012}.jpg", number)
    talk = [
        "What is <region1>?",
        "<region1> is a dog.",
        "Is it close to <region3>?",
        "Yes, next to <region3>.",
    ]
    short = ["What colour has <region2>?", "Red", "Is <region1> round?", "No"]
    kinds = {"osprey_conversation": talk, "osprey_short_form": short, "osprey_part_level": short}
    for name, texts in kinds.items():
        write_json(folder / f"{name}.json", [osprey_sample(number, 3, texts) for number in range(3)])
    asked = ["Is there a cat in <region1>?", "Yes", "Does <region2> show a car?", "No, it is a cup."]
    lvis = [osprey_sample(number, 2, asked, file_name=f"{number:012}.jpg") for number in range(3)]
    write_json(folder / "osprey_lvis_positive_negative.json", lvis)
    described = ["<region1>: A round, red thing: it lies on the grass.", "<region2>: A post of grey stone."]
    detailed = [osprey_sample(number, 2, [], description=described) for number in range(3)]
    write_json(folder / "osprey_detail_description.json", detailed)


def write_llava(root: Path) -> None:
    """Captions, and conversations of which one is about no image."""
    captions = []
    for number in range(3):
        name = f"00{number}/00{number}17.jpg"
        image(root / "LLaVA-Pretrain/images" / name, number + 3)
        texts = ["Describe the picture.\n<image>", f"a photo of thing number {number}"]
        captions.append({"id": str(number), "image": name, "conversations": messages(texts)})
    write_json(root / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", captions)

    image(root / "coco/train2017/000000000000.jpg", 0)
    image(root / "gqa/images/77.jpg", 4)
    talk = ["<image>\nWhat is this?", "A red disc.", "Where?", "On the left."]
    write_json(
        root / "llava_v1_5_mix665k.json",
        [
            {"id": "a", "image": "coco/train2017/000000000000.jpg", "conversations": messages(talk)},
            {"id": "b", "conversations": messages(["Name a colour.", "Blue."])},
            {
                "id": "c",
                "image": "gqa/images/77.jpg",
                "conversations": messages(["Is it red?\n<image>", "No"]),
            },
        ],
    )
