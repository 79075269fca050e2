"""The same small data set in every form in which masks come."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

HEIGHT, WIDTH = 24, 32
COUNT = 7
NAMES = [f"{'sub/' if index % 3 == 1 else ''}photo_{index}.png" for index in range(COUNT)]


def picture(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def masks(index: int) -> dict[int, np.ndarray]:
    """One to three regions that don't overlap, by their ids."""
    found = {}
    for number in range(1 + index % 3):
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[2 + index : 10 + 2 * index, 10 * number + 1 : 10 * number + 8] = True
        mask[5 + index, 10 * number + 3] = False
        found[300 * number + index + 1] = mask
    return found


def rle(mask: np.ndarray) -> dict:
    found = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}


def write_images(folder: Path) -> Path:
    for index, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(index)).save(folder / name)
    return folder


Form = tuple[Path, list[Path]]
"""The images and what `--masks` is given."""


def coco(folder: Path) -> Form:
    annotations = [
        {"id": number, "image_id": 40 - index, "category_id": 5, "segmentation": rle(mask)}
        for index in range(COUNT)
        for number, mask in masks(index).items()
    ]
    # Not in the images' order: those of an image needn't stand together.
    annotations.sort(key=lambda entry: entry["id"] % 5)
    data = {
        "annotations": annotations,
        "categories": [{"id": 5, "name": "thing"}],
        "images": [{"id": 40 - index, "file_name": name} for index, name in enumerate(NAMES)]
        + [{"id": 99, "file_name": "bare.png"}],
    }
    (folder / "coco.json").write_text(json.dumps(data))
    return write_images(folder / "images"), [folder / "coco.json"]


def lines_of_regions(folder: Path) -> Form:
    """In two files, the second of which goes on with an image of the first."""
    lines = [
        json.dumps({"image": name, "region": number, "segmentation": rle(mask)}) + "\n"
        for index, name in enumerate(NAMES)
        for number, mask in masks(index).items()
    ]
    (folder / "lines").mkdir()
    (folder / "lines" / "a.jsonl").write_text("".join(lines[:5]) + "\n")
    (folder / "lines" / "b.jsonl").write_text("".join(lines[5:]))
    return write_images(folder / "images"), [folder / "lines"]


def lines_of_images(folder: Path) -> Form:
    lines = [json.dumps(document(index)) + "\n" for index in range(COUNT)]
    (folder / "images.jsonl").write_text("".join(lines))
    return write_images(folder / "images"), [folder / "images.jsonl"]


def document(index: int, *, name: str | None = None) -> dict:
    annotations = [{"id": number, "segmentation": rle(mask)} for number, mask in masks(index).items()]
    return {"image": {"file_name": name or NAMES[index]}, "annotations": annotations}


def sa1b(folder: Path) -> Form:
    """Each image beside its document."""
    images = write_images(folder / "images")
    for index, name in enumerate(NAMES):
        text = json.dumps(document(index, name=Path(name).name))
        (images / name).with_suffix(".json").write_text(text)
    return images, [images]


def sa1b_tar(folder: Path) -> Form:
    """All of that in one archive of one folder, as it is distributed."""
    images, _ = sa1b(folder)
    with tarfile.open(folder / "sa.tar", "w") as archive:
        archive.add(images, "sa_000000")
    return folder / "sa.tar", [folder / "sa.tar"]


def panoptic(folder: Path) -> Form:
    (folder / "panoptic").mkdir()
    entries = []
    for index in range(COUNT):
        Image.fromarray(colours(index)).save(folder / "panoptic" / f"{index}.png")
        segments = [{"id": number, "category_id": 5} for number in masks(index)]
        entries.append({"image_id": index, "file_name": f"{index}.png", "segments_info": segments})
    data = {
        "images": [{"id": index, "file_name": name} for index, name in enumerate(NAMES)],
        "annotations": entries,
        "categories": [{"id": 5, "name": "thing"}],
    }
    (folder / "panoptic.json").write_text(json.dumps(data))
    return write_images(folder / "images"), [folder / "panoptic.json"]


def colours(index: int) -> np.ndarray:
    """Ids as COCO's panoptic PNGs have them."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for number, mask in masks(index).items():
        image[mask] = (number % 256, number // 256, 0)
    return image


def colour_maps(folder: Path) -> Form:
    return _pngs(folder, lambda index, stem: {f"{stem}.png": colours(index)})


def label_maps(folder: Path) -> Form:
    def label_map(index: int, stem: str) -> dict[str, np.ndarray]:
        values = sum(mask * number for number, mask in masks(index).items())
        return {f"{stem}.png": np.asarray(values, np.uint16)}

    return _pngs(folder, label_map)


def mask_folders(folder: Path) -> Form:
    return _pngs(folder, lambda index, stem: _each(index, f"{stem}/"))


def mask_files(folder: Path) -> Form:
    return _pngs(folder, lambda index, stem: _each(index, f"{stem}_"))


def _each(index: int, beginning: str) -> dict[str, np.ndarray]:
    return {
        f"{beginning}part_{number}.png": mask.astype(np.uint8) * 255 for number, mask in masks(index).items()
    }


def _pngs(folder: Path, files: Callable[[int, str], dict[str, np.ndarray]]) -> Form:
    for index, name in enumerate(NAMES):
        for file, values in files(index, name.removesuffix(".png")).items():
            (folder / "masks" / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(folder / "masks" / file)
    return write_images(folder / "images"), [folder / "masks"]


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


FORMS = {
    form.__name__: form
    for form in (
        coco,
        lines_of_regions,
        lines_of_images,
        sa1b,
        sa1b_tar,
        panoptic,
        colour_maps,
        label_maps,
        mask_folders,
        mask_files,
    )
}
