"""The predictor from a photo to masks of its size, against transformers' torch model and torch's resizing."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from osprey_jax.sam.predictor import Embedding, Sam
from osprey_jax.sam.transforms import preprocess
from tests.parity.sam_models import B_LIKE, SamPair

HEIGHT, WIDTH = 50, 75
SIDE = 80
RESIZED = (53, SIDE)
"""What an image of 50 x 75 becomes inside a square of 80."""


@dataclasses.dataclass
class Both:
    """One model twice, and what each of them makes of a photo."""

    sam: Sam
    embedding: Embedding
    reference: torch.nn.Module
    features: torch.Tensor


@pytest.fixture(scope="module")
def both() -> Both:
    pair = SamPair.of(B_LIKE)
    photo = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels = torch.from_numpy(preprocess(photo, side=SIDE)).permute(2, 0, 1)[None]
    with torch.no_grad():
        features = pair.reference.vision_encoder(pixels).last_hidden_state
    sam = Sam(pair.config, pair.params)
    return Both(sam, sam.encode(photo), pair.reference, features)


@torch.no_grad()
def expected(
    both: Both, *, multimask: bool, **given: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits at the photo's size, IoUs and logits, for prompts in the encoder's input."""
    found = both.reference(image_embeddings=both.features, **given, multimask_output=multimask)
    logits = found.pred_masks[0]
    large = F.interpolate(logits, (SIDE, SIDE), mode="bilinear", align_corners=False)
    large = large[..., : RESIZED[0], : RESIZED[1]]
    large = F.interpolate(large, (HEIGHT, WIDTH), mode="bilinear", align_corners=False)
    return large.numpy(), found.iou_scores[0].numpy(), logits.numpy()


def scaled(places: np.ndarray) -> torch.Tensor:
    """Places in the photo as places in the input."""
    factors = np.resize([RESIZED[1] / WIDTH, RESIZED[0] / HEIGHT], places.shape[-1])
    return torch.from_numpy((places * factors).astype(np.float32))[None]


def assert_same(found: tuple, wanted: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Within 1e-4 of the range; masks are the same where no logit is that near to zero."""
    masks, iou, logits = (np.asarray(x) for x in found)
    large, wanted_iou, wanted_logits = wanted
    near = 1e-4 * np.ptp(wanted_logits)
    np.testing.assert_allclose(logits, wanted_logits, rtol=0, atol=near)
    np.testing.assert_allclose(iou, wanted_iou, rtol=0, atol=1e-4 * np.ptp(wanted_iou))
    assert masks.shape == large.shape
    clear = np.abs(large) > near
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(masks[clear], (large > 0)[clear])


def test_points_in_pixels_of_the_photo_become_masks_of_its_size(both: Both) -> None:
    points = np.random.default_rng(1).uniform(0, 1, (3, 2, 2)) * [WIDTH, HEIGHT]
    labels = np.array([[1, 0], [1, 1], [1, -1]])
    given = {"input_points": scaled(points), "input_labels": torch.from_numpy(labels)[None]}
    for multimask in (True, False):
        found = both.sam.predict(both.embedding, points=points, labels=labels, multimask=multimask)
        assert found.masks.shape == (3, 3 if multimask else 1, HEIGHT, WIDTH)
        assert_same(found, expected(both, multimask=multimask, **given))


def test_a_box_with_the_mask_found_before_is_the_references(both: Both) -> None:
    box = np.array([[10.0, 5.0, 60.0, 45.0]])
    first = both.sam.predict(both.embedding, boxes=box)
    assert_same(first, expected(both, multimask=True, input_boxes=scaled(box)))
    again = both.sam.predict(both.embedding, boxes=box, masks=first.logits[:, 1], multimask=False)
    before = torch.from_numpy(np.array(first.logits[:, 1:2]))
    assert_same(again, expected(both, multimask=False, input_boxes=scaled(box), input_masks=before))


def test_more_prompts_than_a_batch_holds_are_answered_in_their_order(both: Both) -> None:
    points = np.random.default_rng(2).uniform(0, 1, (70, 1, 2)) * [WIDTH, HEIGHT]
    found = both.sam.predict(both.embedding, points=points, multimask=False)
    labels = torch.ones((1, 70, 1), dtype=torch.int32)
    given = {"input_points": scaled(points), "input_labels": labels}
    assert_same(found, expected(both, multimask=False, **given))


def test_images_of_one_pixel_and_very_wide_ones_have_masks_of_their_size(both: Both) -> None:
    for height, width in ((1, 1), (4, 400), (300, 3)):
        embedding = both.sam.encode(np.full((height, width, 3), 99, np.uint8))
        found = both.sam.predict(embedding, boxes=[[0, 0, width, height]], multimask=False)
        assert found.masks.shape == (1, 1, height, width)
        assert np.isfinite(np.asarray(found.iou)).all()


def test_another_dtype_and_another_kind_of_image_are_refused(both: Both) -> None:
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'bfloat16', got 'float16'"):
        Sam.load("anywhere", dtype="float16")
    with pytest.raises(ValueError, match="an image array must be"):
        both.sam.encode(np.zeros((4, 4)))
    with pytest.raises(FileNotFoundError, match=r"no image at missing\.png"):
        both.sam.encode("missing.png")
