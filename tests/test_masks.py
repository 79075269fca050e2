"""Masks as users and data sets give them; the mask pyramid's arithmetic is tested against torch in `ops`."""

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.nn import functional as F

from osprey_jax.masks import (
    as_masks,
    decode_rles,
    decode_segmentation,
    encode_rle,
    mask_pyramid,
    rle_area,
    segmentation_rle,
)

SIZE = (5, 7)
MASKS = np.random.default_rng(0).random((3, *SIZE)) < 0.4
POLYGONS = [[1.5, 1, 6, 1, 6, 4.5], [0, 0, 2, 0, 2, 2, 0, 2]]


@pytest.mark.parametrize(
    "given",
    [
        MASKS,
        MASKS.astype(np.uint8),
        MASKS.astype(np.uint8) * 255,
        MASKS.astype(np.float32),
        MASKS.astype(np.int64),
        list(MASKS),
        [mask.tolist() for mask in MASKS],
        [Image.fromarray(mask) for mask in MASKS],
        iter(MASKS),
    ],
    ids=["bool", "0/1", "0/255", "float", "int", "arrays", "nested lists", "Pillow images", "an iterator"],
)
def test_masks_of_any_legal_kind_become_bool(given: object) -> None:
    found = as_masks(given, SIZE)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, MASKS)


def test_masks_may_be_empty_but_not_missing() -> None:
    assert not as_masks(np.zeros((2, *SIZE), np.uint8), SIZE).any()
    for none in (np.zeros((0, *SIZE), bool), [], (), iter([]), None):
        with pytest.raises(ValueError, match="no masks given"):
            as_masks(none, SIZE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (MASKS[0], r"must be \(R, h, w\), got \(5, 7\); for a single mask pass mask\[None\]"),
        (MASKS[None], r"must be \(R, h, w\), got \(1, 3, 5, 7\)$"),
        (MASKS.transpose(0, 2, 1), r"masks are \(7, 5\) \(height, width\), the image is \(5, 7\)"),
        ([MASKS[0], MASKS[1][:3]], r"one size, got \(3, 7\), \(5, 7\)"),
        (MASKS * 0.5, r"only 0 and 1, or 0 and 255; found the values 0\.0, 0\.5"),
        (MASKS * 1 - 1, "found the values -1, 0"),
        (np.arange(35).reshape(1, *SIZE), "found the values 0, 1, 2, 3, 4, 5$"),
        (np.where(MASKS, np.nan, 0), "only 0 and 1"),
        (MASKS.astype(str), "must be bool or numbers, got dtype <U5"),
        (Image.fromarray(MASKS[0]), r"got \(5, 7\); for a single mask pass mask\[None\]"),
        ("masks.png", r"must be \(R, h, w\), got \(9,\)"),
        (3, r"must be \(R, h, w\), got \(\)"),
    ],
    ids=[
        *("one mask", "a batch", "transposed", "two sizes", "soft", "negative", "labels", "nan", "text"),
        *("one Pillow image", "a path", "a number"),
    ],
)
def test_what_is_no_mask_of_this_image_is_refused(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_masks(given, SIZE)


def test_polygons_are_rasterised_as_pycocotools_does() -> None:
    for polygons in (POLYGONS, POLYGONS[:1], [[round(value) for value in POLYGONS[0]]]):
        runs = coco_mask.merge(coco_mask.frPyObjects(polygons, *SIZE))
        found = decode_segmentation(polygons, *SIZE)
        assert found.dtype == bool
        np.testing.assert_array_equal(found, coco_mask.decode(runs).astype(bool))
    assert decode_segmentation(POLYGONS, *SIZE)[:2, :2].all()


def test_a_compressed_rle_is_there_and_back_the_same() -> None:
    for mask in (*MASKS, np.zeros(SIZE, bool), np.ones(SIZE, bool)):
        rle = encode_rle(mask)
        theirs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        assert rle == {"size": [5, 7], "counts": theirs["counts"].decode()}
        np.testing.assert_array_equal(decode_segmentation(rle, *SIZE), mask)
        np.testing.assert_array_equal(decode_segmentation(theirs, *SIZE), mask)


def test_an_uncompressed_rle_counts_down_the_columns() -> None:
    mask = decode_segmentation({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3)
    assert mask.astype(int).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_every_kind_of_segmentation_becomes_the_compressed_rle_of_pycocotools() -> None:
    merged = coco_mask.merge(coco_mask.frPyObjects(POLYGONS, *SIZE))
    expected = {"size": [5, 7], "counts": merged["counts"].decode()}
    mask = coco_mask.decode(merged)
    changes = np.flatnonzero(np.diff(mask.ravel("F"))) + 1
    runs = np.diff([0, *changes, mask.size]).tolist()
    uncompressed = {"size": [5, 7], "counts": [0, *runs] if mask[0, 0] else runs}
    for given in (POLYGONS, merged, expected, uncompressed):
        assert segmentation_rle(given, *SIZE) == expected


def test_rles_are_decoded_as_pycocotools_does() -> None:
    """Runs of one to five characters, differences of both signs, and none of a colour."""
    rng = np.random.default_rng(0)
    for height, width, density in ((1, 1, 0.5), (5, 7, 0.4), (300, 500, 0.001), (300, 500, 0.6)):
        masks = rng.random((4, height, width)) < density
        masks[2], masks[3] = False, True
        theirs = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8))
        expected = coco_mask.decode(theirs).transpose(2, 0, 1)
        for rles in (theirs, [encode_rle(mask) for mask in masks], tuple(theirs)):
            found = decode_rles(rles)
            assert found.dtype == bool
            np.testing.assert_array_equal(found, expected)
    long = {
        "size": [30_000, 100],
        "counts": coco_mask.encode(np.ones((30_000, 100), np.uint8, "F"))["counts"],
    }
    assert decode_rles([long]).all()
    assert decode_rles([{"size": [2, 3], "counts": "123"}]).astype(int).tolist() == [[[0, 1, 0], [1, 0, 0]]]


def test_no_rles_are_no_masks_and_several_sizes_are_refused() -> None:
    assert (decode_rles([]).shape, decode_rles([]).dtype) == ((0, 1, 1), bool)
    with pytest.raises(ValueError, match=r"all RLEs must have one size, got \(2, 3\), \(3, 2\)"):
        decode_rles([{"size": [3, 2], "counts": "6"}, {"size": [2, 3], "counts": "6"}])
    with pytest.raises(ValueError, match="do not add up to its 2 x 3 pixels"):  # as a sum over both they do
        decode_rles([{"size": [2, 3], "counts": "7"}, {"size": [2, 3], "counts": "5"}])


def test_the_area_of_an_rle_counts_its_pixels() -> None:
    for mask in (*MASKS, np.zeros(SIZE, bool), np.ones(SIZE, bool)):
        assert rle_area(encode_rle(mask)) == mask.sum()


def test_large_random_masks_survive_compression() -> None:
    """Runs longer than five bits, and differences of both signs."""
    rng = np.random.default_rng(0)
    for density in (0.001, 0.5, 0.999):
        mask = rng.random((300, 500)) < density
        np.testing.assert_array_equal(decode_segmentation(encode_rle(mask), 300, 500), mask)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "without polygons"),
        ([[0, 0, 1, 1]], "at least 3 points of 2 coordinates, got 4 numbers"),
        ([[0, 0, 1, 1, 2, 2, 3]], "got 7 numbers"),
        ([[0, 0, 1, 1, 2, float("nan")]], "coordinates must be"),
        ([[0, 0, 1, 1, 2, "2"]], "coordinates must be"),
        ([0, 0, 1, 1, 2, 2], "list of coordinate lists"),
        ({"counts": [35]}, "an RLE has the keys size and counts"),
        ({"size": [7, 5], "counts": [35]}, r"the RLE is \[7, 5\] \(height, width\), expected \[5, 7\]"),
        ({"size": [5, 7], "counts": [30]}, "do not add up to its 5 x 7 pixels"),
        ({"size": [5, 7], "counts": [40, -5]}, "non-negative integers"),
        ({"size": [5, 7], "counts": 35}, "counts are a list or a string, got int"),
        ({"size": [5, 7], "counts": "@@@"}, "do not add up"),
        ({"size": [5, 7], "counts": encode_rle(MASKS[0])["counts"][:-1]}, "do not add up"),
        ({"size": [5, 7], "counts": ""}, "do not add up"),
        ({"size": [5, 7], "counts": "X1K"}, "do not add up"),  # 40 - 5
        ({"size": [5, 7], "counts": "S"}, "do not add up"),  # begins a number and ends
        ({"size": [5, 7], "counts": "S" + 20 * "P" + "1"}, "do not add up"),  # 35 in 22 characters
        ({"size": [5, 7], "counts": "S1\ud8000"}, "do not add up"),
        ({"size": [5, 7], "counts": b"S1\xff"}, "do not add up"),
        ("polygon", "a segmentation is a list of polygons or an RLE, got str"),
        (None, "got NoneType"),
    ],
)
def test_malformed_segmentations_are_refused(segmentation: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_segmentation(segmentation, *SIZE)


@pytest.mark.parametrize("size", [(48, 64), (60, 37), (5, 90), (24, 12)])
def test_a_pyramid_does_not_depend_on_how_masks_lie_in_memory(size: tuple[int, int]) -> None:
    masks = np.random.default_rng(2).random((3, *size)) < 0.2
    by_column = decode_rles([encode_rle(mask) for mask in masks])
    assert by_column.strides[1] < by_column.strides[2]
    every_other = np.repeat(masks, 2, axis=2)[:, :, ::2]
    expected = {
        side: F.interpolate(torch.from_numpy(masks).float()[None], (side, side), mode="bilinear")[0].numpy()
        for side in (24, 12, 6)
    }
    for given in (masks, by_column, every_other):
        pyramid = mask_pyramid(given, level_sizes=(12, 6), position_size=24)
        for level, side in zip(pyramid.levels, (12, 6), strict=True):
            np.testing.assert_array_equal(level, expected[side] > 0)
        np.testing.assert_allclose(pyramid.position, expected[24], rtol=0, atol=2e-7)
    np.testing.assert_array_equal(
        mask_pyramid(masks, level_sizes=(), position_size=24).position,
        mask_pyramid(by_column, level_sizes=(), position_size=24).position,
    )


def test_a_pyramid_of_no_regions_keeps_its_shapes() -> None:
    pyramid = mask_pyramid(np.zeros((0, 30, 40), bool), level_sizes=(8, 4), position_size=6)
    assert [level.shape for level in pyramid.levels] == [(0, 8, 8), (0, 4, 4)]
    assert (pyramid.position.shape, pyramid.position.dtype) == ((0, 6, 6), np.float32)


def test_a_pyramid_of_one_mask_without_its_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"masks must be \(R, h, w\), got \(5, 7\)"):
        mask_pyramid(MASKS[0], level_sizes=(8, 4), position_size=6)


def test_an_axis_that_has_the_position_masks_size_is_left_as_it_is() -> None:
    masks = np.random.default_rng(1).random((2, 6, 12)) < 0.5
    halves = masks.reshape(2, 6, 6, 2).mean(-1)  # each pixel lies in the middle between two
    for given, expected in ((masks, halves), (masks.transpose(0, 2, 1), halves.transpose(0, 2, 1))):
        np.testing.assert_array_equal(mask_pyramid(given, level_sizes=(), position_size=6).position, expected)
    whole = mask_pyramid(masks[:, :, :6], level_sizes=(6,), position_size=6)
    np.testing.assert_array_equal(whole.levels[0], masks[:, :, :6])
    np.testing.assert_array_equal(whole.position, masks[:, :, :6])
    assert whole.position.dtype == np.float32


def test_a_polygon_with_an_endless_outline_is_refused() -> None:
    """pycocotools would end the process."""
    far = [coordinate for i in range(60) for coordinate in ((-1) ** i * 999_999, (-1) ** (i // 2) * 999_999)]
    with pytest.raises(ValueError, match="outline must not be longer than 8,000,000"):
        segmentation_rle([far], 48, 64)
