"""Images to SAM's input and masks back, against transformers' processor and the original's two resizes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from osprey_jax.sam.transforms import frame, preprocess, to_input, upscaling

SIDE, MASK_SIDE = 256, 64
SHAPES = [(1, 1), (3, 2), (427, 640), (640, 427), (256, 256), (255, 257), (300, 299), (75, 1300), (7, 900)]
SHAPES += [(1000, 4), (5, 2500)]


def picture(rows: int, columns: int) -> np.ndarray:
    """Noise over a gradient: every pixel and both directions show."""
    rng = np.random.default_rng(rows * columns)
    slope = np.linspace(0, 127, rows)[:, None, None] + np.linspace(0, 64, columns)[None, :, None]
    return (slope + rng.integers(0, 64, (rows, columns, 3))).astype(np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_preprocessed_images_agree_with_transformers(shape: tuple[int, int]) -> None:
    """In the units of normalised pixels, whose range is about 5."""
    processor = SamImageProcessorPil(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE})
    out = processor(picture(*shape), input_data_format="channels_last", return_tensors="np")
    found = preprocess(picture(*shape), side=SIDE)
    assert frame(shape, SIDE).resized == tuple(out["reshaped_input_sizes"][0])
    np.testing.assert_allclose(found, out["pixel_values"][0].transpose(1, 2, 0), atol=2e-6)


def test_what_lies_outside_of_the_image_is_zero_after_normalisation() -> None:
    found = preprocess(np.full((10, 40, 3), 255, np.uint8), side=SIDE)
    assert not found[64:].any()
    assert (found[:64] > 2).all()


def test_of_the_longest_images_a_row_stays() -> None:
    """Where the original's size is 0, which none of its steps takes."""
    where = frame((1, 10_000), SIDE)
    assert where.resized == (1, SIDE)
    found = preprocess(np.full((1, 10_000, 3), 255, np.uint8), side=SIDE)
    assert (found[0] > 2).all()
    assert not found[1:].any()
    rows, columns = upscaling(where, mask_size=MASK_SIDE, side=SIDE)
    assert (rows.shape, columns.shape) == ((1, MASK_SIDE), (10_000, MASK_SIDE))


@pytest.mark.parametrize("shape", SHAPES)
def test_places_go_where_the_original_puts_them(shape: tuple[int, int]) -> None:
    """`ResizeLongestSide.apply_coords`: each axis by its own rounded ratio."""
    where = frame(shape, SIDE)
    points = np.array([[[0.0, 0.0], [shape[1], shape[0]]], [[shape[1] / 3, shape[0] / 7], [-2.0, 1e5]]])
    expected = points.copy()
    expected[..., 0] *= where.resized[1] / shape[1]
    expected[..., 1] *= where.resized[0] / shape[0]
    found = to_input(points, where)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert tuple(found[0, 1]) == where.resized[::-1]


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_come_back_as_by_the_originals_two_resizes(shape: tuple[int, int]) -> None:
    """`Sam.postprocess_masks`, to 1e-5 of the logits' range: torch's weights are float32."""
    logits = np.random.default_rng(0).normal(0, 5, (2, MASK_SIDE, MASK_SIDE)).astype(np.float32)
    where = frame(shape, SIDE)
    large = F.interpolate(torch.from_numpy(logits)[None], (SIDE, SIDE), mode="bilinear", align_corners=False)
    cut = large[..., : where.resized[0], : where.resized[1]]
    expected = F.interpolate(cut, shape, mode="bilinear", align_corners=False)[0].numpy()
    rows, columns = upscaling(where, mask_size=MASK_SIDE, side=SIDE)
    assert (rows.shape, columns.shape) == ((shape[0], MASK_SIDE), (shape[1], MASK_SIDE))
    found = rows @ logits @ columns.T
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(logits).max())
