"""Masks files: what is read from them, against pycocotools and literal masks, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from osprey_jax.region_files import read_regions

SIZE = (4, 6)
SQUARE = [[1, 1, 4, 1, 4, 3, 1, 3]]
SQUARE_MASK = np.array([[0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
# Column by column: 5 zeros, 2 ones, 17 zeros.
COUNTS = {"size": [4, 6], "counts": [5, 2, 17]}
COUNTS_MASK = np.array([[0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
LABELS = np.array(
    [[0, 7, 7, 0, 0, 0], [0, 7, 7, 0, 2, 2], [0, 0, 0, 0, 2, 2], [255, 0, 0, 0, 0, 0]], np.uint8
)


def compressed(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def coco(annotations: list, *names: str, **size: int) -> dict:
    images = [{"id": number, "file_name": name, **size} for number, name in enumerate(names, 1)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "dog"}]}


def annotation(name: object, segmentation: object, image: int = 1, **more: object) -> dict:
    return {"id": name, "image_id": image, "segmentation": segmentation, **more}


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    """Writes JSON, an array of pixels, a Pillow image or bytes under a name."""

    def write(name: str, content: object) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, np.ndarray):
            content = Image.fromarray(content)
        if isinstance(content, Image.Image):
            content.save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


def test_polygons_and_both_rles_are_pycocotools_masks(put) -> None:
    big = (90, 130)
    blob = np.add.outer((np.arange(90) - 40) ** 2, (np.arange(130) - 60) ** 2) < 900
    runs = np.diff(np.flatnonzero(np.diff(blob.T.ravel(), prepend=False, append=True))).tolist()
    first = int(np.flatnonzero(blob.T.ravel())[0])
    total = blob.size - first - sum(runs)
    uncompressed = {"size": list(big), "counts": [first, *runs, *([total] if total else [])]}
    two = [[10.5, 3, 60, 20.25, 33, 71], [100, 5, 128.5, 5, 110, 80, 90, 40]]
    data = coco(
        [annotation(11 + i, s, category_id=3) for i, s in enumerate((two, compressed(blob), uncompressed))],
        "a.jpg",
        height=90,
        width=130,
    )
    path = put("masks.json", data)
    regions = read_regions([path], big, image_name="a.jpg")
    theirs = COCO(str(path))
    assert regions.ids == (11, 12, 13)
    for mask, name in zip(regions.masks, regions.ids, strict=True):
        np.testing.assert_array_equal(mask, theirs.annToMask(theirs.anns[name]).astype(bool))
    np.testing.assert_array_equal(regions.masks[1], blob)
    assert regions.masks.dtype == bool


def test_coco_annotations_are_those_of_the_file_name_with_ids_and_category_names(put) -> None:
    data = coco(
        [
            annotation(50, COUNTS, image=1),
            annotation("x9", SQUARE, image=2, category_id=3),
            annotation(None, COUNTS, image=2, category_id=4),
        ],
        "val/a.jpg",
        "val\\b.jpg",
        height=4,
        width=6,
    )
    regions = read_regions([put("masks.json", data)], SIZE, image_name="b.jpg")
    np.testing.assert_array_equal(regions.masks, [SQUARE_MASK, COUNTS_MASK])
    assert regions.ids == ("x9", 2)
    assert regions.labels == ("dog", None)
    assert regions.skipped == ()


def test_a_lone_image_of_a_coco_file_needs_no_name(put) -> None:
    regions = read_regions(
        [put("m.json", coco([annotation(1, SQUARE)], "other.jpg"))], SIZE, image_name="b.jpg"
    )
    np.testing.assert_array_equal(regions.masks, [SQUARE_MASK])


def test_an_image_listed_twice_gives_the_annotations_of_both_entries(put) -> None:
    data = coco([annotation(1, SQUARE), annotation(2, COUNTS, image=2)], "a.jpg", "a.jpg")
    assert read_regions([put("m.json", data)], SIZE, image_name="a.jpg").ids == (1, 2)


def test_a_list_holds_rles_or_objects_with_a_segmentation(put) -> None:
    content = [COUNTS, compressed(SQUARE_MASK), {"id": 40, "segmentation": SQUARE}]
    regions = read_regions([put("rles.json", content)], SIZE)
    np.testing.assert_array_equal(regions.masks, [COUNTS_MASK, SQUARE_MASK, SQUARE_MASK])
    assert regions.ids == (1, 2, 40)


def test_a_bad_annotation_is_left_out_and_named(put) -> None:
    content = [
        {"id": 7, "segmentation": [[1, 2, 3]]},
        {"id": 8, "segmentation": SQUARE},
        {"size": [9, 9], "counts": [81]},
        {"id": 5},
        "text",
    ]
    regions = read_regions([put("m.json", content)], SIZE)
    assert regions.ids == (8,)
    np.testing.assert_array_equal(regions.masks, [SQUARE_MASK])
    names = [sentence.partition(":")[0] for sentence in regions.skipped]
    assert names == ["annotation 7", "annotation 3", "annotation 5", "annotation 5"]
    assert "[9, 9]" in regions.skipped[1]


def palette(indices: np.ndarray) -> Image.Image:
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette([(9 * value + channel) % 256 for value in range(256) for channel in (5, 3, 1)])
    return image


@pytest.mark.parametrize(
    ("image", "values"),
    [
        (Image.fromarray(LABELS), (2, 7, 255)),
        (palette(LABELS), (2, 7, 255)),
        (Image.fromarray(LABELS.astype(np.uint16) * 256), (512, 1792, 65280)),
    ],
    ids=["grey", "palette", "16-bit"],
)
def test_a_label_map_is_a_region_for_each_value_in_ascending_order(
    put, image: Image.Image, values: tuple
) -> None:
    regions = read_regions([put("labels.PNG", image)], SIZE)
    assert regions.ids == values
    np.testing.assert_array_equal(regions.masks, [LABELS == 2, LABELS == 7, LABELS == 255])


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(SQUARE_MASK.astype(np.uint8) * 255),
        Image.fromarray(SQUARE_MASK.astype(np.uint8)),
        Image.fromarray(SQUARE_MASK),
        palette(SQUARE_MASK.astype(np.uint8)),
        Image.fromarray(SQUARE_MASK.astype(np.uint8) * 255).convert("RGB"),
    ],
    ids=["255", "1", "one bit", "palette", "grey in three channels"],
)
def test_a_png_of_zero_and_one_other_mask_value_is_a_single_mask(put, image: Image.Image) -> None:
    regions = read_regions([put("cup.png", image)], SIZE)
    np.testing.assert_array_equal(regions.masks, [SQUARE_MASK])
    assert (regions.ids, regions.labels) == ((1,), ("cup",))


def test_several_pngs_are_a_mask_each_and_a_directory_is_in_natural_order(put, tmp_path: Path) -> None:
    one_row = {name: np.zeros(SIZE, np.uint8) for name in ("m10", "m9", "M1", "none")}
    for row, name in enumerate(("M1", "m9", "m10")):
        one_row[name][row] = 255
    for name, pixels in one_row.items():
        put(f"dir/{name}.png", pixels)
    put("dir/notes.txt", b"no mask")
    put("dir/._m9.png", b"what a file manager leaves")
    extra = put("extra.png", SQUARE_MASK.astype(np.uint8))
    regions = read_regions([extra, tmp_path / "dir"], SIZE)
    assert regions.labels == ("extra", "M1", "m9", "m10", "none")
    assert regions.ids == (1, 2, 3, 4, 5)
    expected = np.stack([SQUARE_MASK, *(np.zeros(SIZE, bool) for _ in range(4))])
    for row in range(3):
        expected[row + 1, row] = True
    np.testing.assert_array_equal(regions.masks, expected)


WHOLE = np.full(SIZE, 255, np.uint8)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"m.json": b"{'no'"}, "m.json is not valid json"),
        ({"m.json": b"\xff\xfe\xff"}, "m.json is not valid json"),
        ({"m.json": b"[" * 100_000}, "m.json is not valid json"),
        ({"m.json": []}, "m.json has no annotations"),
        ({"m.json": {"size": [4, 6]}}, "m.json is neither COCO json"),
        ({"m.json": coco([], "b.jpg")}, "m.json has no annotations of the image with id 1"),
        ({"m.json": coco([annotation(1, SQUARE)])}, "m.json has no image called b.jpg; it has none at all"),
        (
            {"m.json": coco([], *(f"{n}.jpg" for n in range(7)))},
            "no image called b.jpg; it has 0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 2 more",
        ),
        ({"m.json": coco([], "x/b.jpg", "y/b.jpg")}, "several images called b.jpg; it has x/b.jpg, y/b.jpg"),
        (
            {"m.json": coco([annotation(1, SQUARE)], "b.jpg", height=6, width=4)},
            r"m.json .*\(6, 4\).*\(4, 6\)",
        ),
        ({"m.json": [{"id": 31, "segmentation": []}]}, "m.json: annotation 31: "),
        (
            {"m.json": [{"id": 31, "segmentation": []}, {"id": 32, "segmentation": None}]},
            "m.json: none of the 2 annotations can be read; annotation 31: ",
        ),
        ({"m.png": WHOLE[:3]}, r"m.png is \(3, 6\) .*\(4, 6\)"),
        ({"m.png": WHOLE * 0}, "m.png is zero everywhere"),
        ({"m.png": b"text"}, "cannot read .*m.png"),
        ({"m.png": np.stack([WHOLE, WHOLE, WHOLE * 0], -1)}, "m.png is a colour image"),
        ({"a.png": WHOLE, "b.png": LABELS}, "b.png holds the values 0, 2, 7, 255"),
        ({"a.png": WHOLE, "b.png": WHOLE[:, :5]}, r"b.png is \(4, 5\)"),
        ({"a.png": WHOLE, "b.json": []}, "b.json among 2 files"),
        ({"m.tif": b""}, "m.tif is neither"),
        ({"m": b""}, "m is neither"),
    ],
)
def test_what_is_wrong_with_masks_files_is_said_with_their_name(put, files: dict, said: str) -> None:
    paths = [put(name, content) for name, content in files.items()]
    with pytest.raises(ValueError, match=said):
        read_regions(paths, SIZE, image_name="b.jpg")


def test_a_truncated_png_is_refused(put) -> None:
    path = put("m.png", np.random.default_rng(0).integers(0, 255, (40, 60), np.uint8))
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"cannot read .*m\.png"):
        read_regions([path], (40, 60))


def test_names_with_digits_that_are_no_numbers_are_sorted(put, tmp_path: Path) -> None:
    for name in ("10", "2", "1²3", "1²"):
        put(f"dir/{name}.png", SQUARE_MASK)
    assert read_regions([tmp_path / "dir"], SIZE).labels == ("1²3", "1²", "2", "10")


def test_missing_paths_and_empty_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no masks at .*gone\.json"):
        read_regions([tmp_path / "gone.json"], SIZE)
    with pytest.raises(ValueError, match="no PNG masks in the directory"):
        read_regions([tmp_path], SIZE)
