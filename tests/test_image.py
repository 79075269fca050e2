"""Reading images, and preprocessing where the answer is known without a reference (`parity` has the rest)."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from osprey_jax.image import MEAN, STD, image_size, load_image, preprocess

RGB = np.random.default_rng(0).integers(0, 256, (5, 8, 3), np.uint8)


def test_a_path_a_pillow_image_and_an_array_give_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(RGB).save(path)
    for image in (path, str(path), Image.fromarray(RGB), RGB):
        found = load_image(image)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, RGB)


def test_grey_palette_and_transparent_images_become_rgb() -> None:
    grey = RGB[:, :, 0]
    np.testing.assert_array_equal(load_image(Image.fromarray(grey)), np.repeat(grey[:, :, None], 3, 2))
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 200, 77])
    palette.putpixel((1, 0), 1)
    assert load_image(palette).tolist() == [[[0, 0, 0], [9, 200, 77]]]
    # What shows through is not blended in: the stored colours count.
    assert load_image(Image.new("RGBA", (1, 1), (10, 20, 30, 0))).tolist() == [[[10, 20, 30]]]
    assert load_image(Image.new("1", (1, 1), 1)).tolist() == [[[255, 255, 255]]]


def test_grey_of_16_bits_keeps_its_shades() -> None:
    wide = Image.fromarray(np.array([[0, 257 * 128, 65535]], np.uint16))
    assert load_image(wide)[0, :, 0].tolist() == [0, 128, 255]


def test_orientation_of_exif_is_not_applied(tmp_path: Path) -> None:
    """Masks belong to the pixels as they are stored."""
    image, path = Image.fromarray(RGB), tmp_path / "turned.png"
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    assert load_image(path).shape == (5, 8, 3)


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no image at .*nowhere\.png"):
        load_image(tmp_path / "nowhere.png")
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    with pytest.raises(ValueError, match=r"cannot read the image .*text\.jpg"):
        load_image(text)
    truncated = tmp_path / "truncated.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cannot read the image .*truncated\.png"):
        load_image(truncated)
    with (
        Image.open(truncated) as opened,  # which reads the header alone
        pytest.raises(ValueError, match=r"cannot read the image .*truncated\.png"),
    ):
        load_image(opened)
    with pytest.raises(ValueError, match="cannot read the image"):
        load_image(tmp_path)


@pytest.mark.parametrize(
    "array",
    [
        RGB[:, :, 0],
        RGB.astype(np.float32),
        RGB[:, :, :2],
        RGB[:0],
        np.zeros((2, 3, 4, 3), np.uint8),
        Image.new("RGB", (0, 5)),
    ],
    ids=["grey", "float", "two channels", "no rows", "a batch", "a Pillow image without columns"],
)
def test_arrays_of_another_shape_or_dtype_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must be \(h, w, 3\) uint8, got \("):
        load_image(array)


def test_a_square_image_of_the_target_size_is_only_normalised() -> None:
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    expected = (image.astype(np.float64) / 255 - MEAN) / STD
    np.testing.assert_allclose(preprocess(image, size=32), expected, rtol=0, atol=1e-6)


def test_an_oblong_image_is_squeezed_not_cropped_or_padded() -> None:
    """The left half black, the right half white, whichever the proportions."""
    for shape in ((64, 200), (200, 64), (40, 41)):
        image = np.zeros((*shape, 3), np.uint8)
        image[:, shape[1] // 2 :] = 255
        found = preprocess(image, size=32) * STD + MEAN
        assert found.shape == (32, 32, 3)
        np.testing.assert_allclose(found[:, :14], 0, atol=1e-6)
        np.testing.assert_allclose(found[:, 18:], 1, atol=1e-6)


def test_shrinking_is_antialiased() -> None:
    """A checkerboard finer than the target turns grey instead of picking one colour."""
    board = np.indices((128, 128)).sum(0) % 2 * 255
    image = np.repeat(board[:, :, None], 3, 2).astype(np.uint8)
    found = preprocess(image, size=32) * STD + MEAN
    np.testing.assert_allclose(found, 0.5, atol=0.01)


@pytest.mark.parametrize("shape", [(100, 160), (160, 100), (37, 41), (150, 150)])
def test_values_agree_with_float64_arithmetic_on_pillows_bicubic(shape: tuple[int, int]) -> None:
    """A size that isn't a multiple of the rows done at a time; both orientations and none."""
    size = 150
    image = np.random.default_rng(2).integers(0, 256, (*shape, 3), np.uint8)
    height, width = (int(size * edge / min(shape)) for edge in shape)
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    values = (resized / 255 - MEAN.astype(float)) / STD.astype(float)
    places = [((np.arange(size) + 0.5) * edge / size - 0.5).clip(0) for edge in (height, width)]
    for axis, (place, edge) in enumerate(zip(places, (height, width), strict=True)):
        lo, hi = place.astype(int), np.minimum(place.astype(int) + 1, edge - 1)
        weight = (place - lo).reshape((-1, 1, 1) if axis == 0 else (-1, 1))
        values = values.take(lo, axis) * (1 - weight) + values.take(hi, axis) * weight
    # Places in float32 are off by some units in the last place, times the step between two pixels of noise.
    np.testing.assert_allclose(preprocess(image, size=size), values, rtol=0, atol=5e-5)


def test_an_image_that_would_grow_without_bounds_is_refused() -> None:
    load_image(np.zeros((2, 200, 3), np.uint8))
    with pytest.raises(ValueError, match=r"an image of \(2, 201\) \(height, width\) is too long and narrow"):
        load_image(np.zeros((2, 201, 3), np.uint8))


def test_a_file_s_bytes_are_read_like_the_file(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    np.testing.assert_array_equal(load_image(data), pixels)
    assert image_size(data) == (5, 7)
    with pytest.raises(ValueError, match="cannot read the image: its format is none that is known"):
        load_image(b"no picture")
    with pytest.raises(ValueError, match="cannot read the image"):
        image_size(data[:20])


def test_a_picture_of_too_many_pixels_is_refused_whatever_warnings_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="9 x 9 are more than 50 pixels"):
            load_image(Image.new("RGB", (9, 9)))
