"""The automatic mask generator against a plain one on the same network, and what else it promises."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osprey_jax.masks import decode_rles
from osprey_jax.sam import config, network, surface
from osprey_jax.sam.everything import Found, Options, find
from osprey_jax.sam.predictor import Sam
from tests.sam import everything_reference as reference

GRID = {"points_per_side": 10, "points_per_batch": 16, "stability_score_thresh": 0.8}
REGIONS = {
    "min_mask_region_area": 12,
    "stability_score_thresh": 0.4,
    "box_nms_thresh": 0.5,
    "crop_nms_thresh": 0.5,
}


class Discs(Sam):
    """A random network with discs around its points: its own masks are noise, all much the same.

    What masks expect of themselves and how sharp their edges are depends on the point.
    """

    def decode(self, embedding: Any, places: Any, kinds: Any, masks: Any = None, *, multimask: bool) -> Any:
        noise, _ = super().decode(embedding, places, kinds, masks, multimask=multimask)
        side = self.config.mask_size
        x, y = np.split(places[:, 0] * np.float32(side / self.config.encoder.image_size), 2, axis=1)
        spots = np.arange(side, dtype=np.float32) + np.float32(0.5)
        distance = np.hypot((spots[None] - x)[:, None], (spots[None] - y)[:, :, None])[:, None]
        number = np.arange(noise.shape[1], dtype=np.float32)[None]
        radius = (5 + 4 * number + 3 * np.sin(x / 5))[..., None, None]
        sharp = (3 + 2 * np.cos(y / 3 + number))[..., None, None]
        logits = sharp * (radius - distance) + 6 * np.asarray(noise)
        return jnp.asarray(logits), jnp.asarray(0.9 + 0.1 * np.sin(3 * x + 5 * y + number))


def small() -> config.SamConfig:
    """As small as the algorithm can be seen with: the networks have tests of their own."""
    encoder = config.EncoderConfig(
        image_size=96, patch_size=8, dim=16, ffn_dim=16, num_layers=1, num_heads=2, window_size=6,
        global_layers=(), out_dim=16,
    )  # fmt: skip
    decoder = config.DecoderConfig(num_layers=1, num_heads=2, ffn_dim=16, iou_dim=8, iou_layers=2)
    return config.SamConfig(encoder=encoder, decoder=decoder)


def random_params(sam_config: config.SamConfig) -> Any:
    """By NumPy, for compiling the initializers takes longer than all that is tested."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(leaf.shape, np.float32)
        deviation = np.prod(leaf.shape[:-1], dtype=np.float32) ** -0.5
        return deviation * rng.normal(size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, network.abstract_params(sam_config))


@pytest.fixture(scope="module")
def sam() -> Sam:
    return Discs(small(), random_params(small()))


def picture(height: int, width: int) -> np.ndarray:
    """Squares of random colours."""
    squares = np.random.default_rng(7).integers(0, 256, (height // 10 + 1, width // 10 + 1, 3), np.uint8)
    return squares.repeat(10, 0).repeat(10, 1)[:height, :width]


CASES = {
    "square": ((96, 96), {}, ("iou", "stability", "nms")),
    "wide": ((61, 150), {"points_per_batch": 7}, ("iou", "stability", "nms")),
    "tall": ((133, 70), {"stability_score_offset": 2.5}, ("iou", "stability", "nms")),
    "no IoU is too low": ((40, 90), {"pred_iou_thresh": 0.0, "points_per_side": 6}, ("stability", "nms")),
    "one layer of crops": (
        (140, 171),
        {"crop_n_layers": 1, "points_per_side": 8},
        ("iou", "stability", "edge", "nms", "crop nms"),
    ),
    "two layers of crops": (
        (203, 160),
        {"crop_n_layers": 2, "crop_n_points_downscale_factor": 2, "crop_nms_thresh": 0.5},
        ("iou", "stability", "edge", "nms", "crop nms"),
    ),
    "small regions": (
        (60, 75),
        {**REGIONS, "points_per_side": 6},
        ("iou", "stability", "nms", "unchanged", "region nms"),
    ),
    "small regions of crops": (
        (76, 84),
        {**REGIONS, "points_per_side": 4, "crop_n_layers": 1},
        ("iou", "edge", "nms", "crop nms", "unchanged"),
    ),
    "judged small": ((210, 180), {"max_height": 90}, ("iou", "stability", "nms")),
    "crops judged small": (
        (230, 250),
        {"max_height": 150, "crop_n_layers": 1, "points_per_side": 8},
        ("iou", "stability", "edge", "nms", "crop nms"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_masks_order_and_rles_are_those_of_a_plain_generator(sam: Sam, case: str) -> None:
    size, given, steps = CASES[case]
    options = {**GRID, **given}
    image = picture(*size)
    expected, doubts, tally = reference.everything(sam, image, **options)
    for step in steps:
        assert tally[f"{step} kept"], f"{step} keeps nothing: {tally}"
        assert tally[f"{step} dropped"], f"{step} drops nothing: {tally}"
    max_height = options.pop("max_height", None)
    found = find(sam, image, Options(**options), max_height=max_height)
    assert found.size == size
    different = 0
    for ours, theirs, doubtful in zip(found.records, expected, doubts, strict=True):
        if ours != theirs:
            different += 1
            assert but_for_rounding(ours, pixels=doubtful) == but_for_rounding(theirs, pixels=doubtful)
            assert xor_area(ours["segmentation"], theirs["segmentation"]) <= doubtful
    assert different <= 1 + len(expected) // 50
    np.testing.assert_array_equal(found.masks(), masks_of(found))


def but_for_rounding(record: dict[str, Any], *, pixels: int) -> dict[str, Any]:
    """What is the same for masks that differ in a few pixels, which torch adds up in another order."""
    assert pixels, "no pixel's logit is close to a threshold"
    return {name: record[name] for name in ("predicted_iou", "point_coords", "crop_box")}


def xor_area(*rles: dict[str, Any]) -> int:
    one, two = decode_rles(rles)
    return int((one ^ two).sum())


def masks_of(found: Found) -> np.ndarray:
    return decode_rles([record["segmentation"] for record in found.records])


def test_results_are_the_same_bits_each_time(sam: Sam) -> None:
    image, options = picture(90, 120), Options(**GRID, crop_n_layers=1)
    once, again = find(sam, image, options), find(sam, image, options)
    assert len(once.records) > 20
    assert once.records == again.records
    assert np.asarray(once.masks()).tobytes() == np.asarray(again.masks()).tobytes()


def test_the_number_of_points_at_a_time_changes_nothing(sam: Sam) -> None:
    image = picture(61, 150)
    found = find(sam, image, Options(**GRID))
    other = find(sam, image, Options(**{**GRID, "points_per_batch": 7}))
    assert len(found.records) > 20
    for one, two in zip(found.records, other.records, strict=True):
        # A matmul of another size may add up in another order.
        assert one.pop("predicted_iou") == pytest.approx(two.pop("predicted_iou"), abs=1e-5)
    assert found.records == other.records


def test_the_number_of_masks_at_a_time_changes_nothing(sam: Sam, monkeypatch: pytest.MonkeyPatch) -> None:
    image, options = picture(96, 96), Options(**GRID)
    expected = find(sam, image, options)
    monkeypatch.setattr(surface, "MAX_MASKS", 8)
    found = find(sam, image, options)
    assert len(found.records) > 50
    assert found.records == expected.records
    np.testing.assert_array_equal(found.masks(), masks_of(expected))


def test_masks_of_some_records_are_those_of_all_in_part(sam: Sam) -> None:
    found = find(sam, picture(76, 84), Options(**{**GRID, **REGIONS, "crop_n_layers": 1}))
    everything = masks_of(found)
    assert len(everything) > 20
    for start, stop in ((0, 3), (5, 5), (7, 20), (len(everything) - 2, None), (3, 10_000)):
        some = found.masks(start, stop)
        assert (some.dtype, some.shape[1:]) == (bool, (76, 84))
        np.testing.assert_array_equal(some, everything[start:stop])


def test_progress_adds_up_to_all_points(sam: Sam) -> None:
    steps: list[int] = []
    options = Options(**{**GRID, "crop_n_layers": 1, "crop_n_points_downscale_factor": 2})
    find(sam, picture(70, 80), options, progress=steps.append)
    assert sum(steps) == 10**2 + 4 * 5**2
    assert max(steps) == 16


def test_where_nothing_is_good_enough_there_is_nothing(sam: Sam) -> None:
    found = find(sam, picture(50, 60), Options(**{**GRID, "pred_iou_thresh": 1.0, "min_mask_region_area": 5}))
    assert found.records == []
    assert found.masks().shape == (0, 50, 60)


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (3, 2), (20, 1900)])
def test_odd_images_are_searched_too(sam: Sam, size: tuple[int, int]) -> None:
    options = Options(**{**GRID, "points_per_side": 4, "crop_n_layers": int(max(size) < 100)})
    found = find(sam, picture(*size), options, max_height=30)
    assert found.masks().shape == (len(found.records), *size)
    np.testing.assert_array_equal(found.masks(), masks_of(found).reshape(-1, *size))


def test_a_low_image_is_judged_as_it_is(sam: Sam) -> None:
    image, options = picture(61, 150), Options(**GRID)
    assert find(sam, image, options, max_height=61).records == find(sam, image, options).records


def test_what_cannot_be_an_image_or_a_height_is_an_error(sam: Sam) -> None:
    with pytest.raises(ValueError, match="max_height must be at least 1, got 0"):
        find(sam, picture(8, 8), max_height=0)
    with pytest.raises(ValueError, match="an image array must be"):
        find(sam, np.zeros((8, 8), np.uint8))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("points_per_side", 0),
        ("points_per_side", 2.5),
        ("points_per_batch", 0),
        ("pred_iou_thresh", 1.1),
        ("pred_iou_thresh", float("nan")),
        ("stability_score_thresh", -0.1),
        ("stability_score_offset", -1.0),
        ("stability_score_offset", float("inf")),
        ("box_nms_thresh", 2.0),
        ("crop_n_layers", -1),
        ("crop_nms_thresh", float("nan")),
        ("crop_overlap_ratio", 1.0),
        ("crop_n_points_downscale_factor", 0),
        ("min_mask_region_area", -1),
    ],
)
def test_a_wrong_option_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be .*got {value}"):
        Options(**{name: value})


def test_layers_without_points_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"points_per_side \(4\) in layer 2"):
        Options(points_per_side=4, crop_n_layers=2, crop_n_points_downscale_factor=3)
