"""Whatever a file holds, only ValueError and OSError come out, and `validate` judges as training does.

Cases that once failed are kept as examples.
"""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from data_pipelines.conversation import draws
from data_pipelines.sources.custom import Custom
from data_pipelines.sources.custom_rules import open_image
from data_pipelines.transforms import encode
from data_pipelines.validation import validate
from osprey_jax.config import OspreyConfig
from osprey_jax.image import load_image
from osprey_jax.masks import decode_rles, decode_segmentation, rle_area, segmentation_rle
from osprey_jax.prompt import Tokenizer
from tests.data_pipelines.custom_files import CUT_OFF, HEIGHT, WIDTH, encoded, picture, sample, write_images

fuzzed = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
# Pillow's, of oddities in images: training goes on.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

IMAGES = ("a.jpg", "cmyk.jpg", "turned.jpg", "deep.png", "cut.jpg", "mask.png", "gone.jpg", "..", "")
BOM = b"\xef\xbb\xbf"
WORDS = (
    "<region1>",
    "<region2>",
    "<region99999999999999999999>",
    "<region 1>",
    "<image>",
    "<mask>",
    "<pos>",
    "</s>",
    "<region1><region1>",
    "What is it?",
    " ",
    "\n",
    "\0",
    "\ud800",
    "\x85",
    *IMAGES,
)
NUMBERS = (0, 1, -1, 0.5, 5, 6, 8, 48, 10**400, 1e308, float("inf"), float("nan"), 1e-320, True)

scalars = st.sampled_from([*WORDS, *NUMBERS, None]) | st.integers(-10, 60) | st.text(max_size=8)
keys = st.sampled_from(
    (
        "image",
        "regions",
        "conversations",
        "id",
        "list_regions",
        "polygon",
        "rle",
        "png",
        "box",
        "size",
        "counts",
        "from",
        "value",
    )
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)

masks = st.sampled_from(
    [
        CUT_OFF,
        {"box": [0, 0, 2, 2]},
        {"png": "mask.png"},
        {"polygon": [[1, 1, 5, 1, 5, 5], [0, 0, 3, 0, 3, 3]]},
        {"rle": {"size": [6, 8], "counts": [3, 40, 5]}},
        {
            "rle": {
                "size": [6, 8],
                "counts": coco_mask.encode(np.ones((6, 8), np.uint8, "F"))["counts"].decode(),
            }
        },
    ]
)
asked = st.sampled_from(["What is <region1>?", "<region2> or <region1>?", "<region2>", "And so?"])
samples = st.builds(
    lambda image, regions, texts, listed: sample(*texts, image=image, regions=regions, list_regions=listed),
    st.sampled_from(IMAGES[:6]),
    st.lists(masks, min_size=1, max_size=3),
    st.sampled_from([2, 4]).flatmap(lambda count: st.lists(asked, min_size=count, max_size=count)),
    st.booleans(),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value, with each key or index that it has."""
    inside = list(value.items() if isinstance(value, dict) else enumerate(value))
    found = [(value, key) for key, _ in inside]
    return found + [place for _, v in inside if isinstance(v, dict | list) for place in places(v)]


@st.composite
def changed_samples(draw: st.DrawFn) -> dict:
    """A sample with another value in one or two places, or without what was there."""
    value = json.loads(json.dumps(draw(samples)))
    for _ in range(draw(st.integers(1, 2))):
        container, key = draw(st.sampled_from(places(value) or [({"": 0}, "")]))
        if draw(st.booleans()):
            container[key] = draw(values)
        else:
            del container[key]
    return value


@st.composite
def changed_bytes(draw: st.DrawFn, whole: st.SearchStrategy[bytes], pieces: tuple[bytes, ...]) -> bytes:
    """Bytes with some replaced, put in or left out."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        piece = draw(st.sampled_from(pieces) | st.binary(max_size=3))
        data[at : at + draw(st.sampled_from((0, 1, len(piece), 8)))] = piece
    return bytes(data)


PIECES = (
    b"NaN",
    b"1e999",
    b"{",
    b"[" * 2000,
    b"]",
    b'"id":1,',
    b"\\ud83d",
    b"\n",
    b"\r",
    b"\x0b",
    b"\x1c",
    BOM,
)
lines = st.one_of(
    st.builds(json.dumps, samples).map(str.encode),
    st.builds(json.dumps, changed_samples()).map(str.encode),
    st.builds(json.dumps, values).map(str.encode),
    changed_bytes(st.builds(json.dumps, samples).map(str.encode), PIECES),
    st.binary(max_size=20),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzz")
    write_images(made)
    return made


@fuzzed
@given(st.lists(lines, min_size=1, max_size=4).map(b"\n".join))
@example(BOM * 2 + b"{}")
@example(BOM + b"\n[{}]\n{}")
def test_validate_finds_bad_exactly_what_training_can_not_use(
    folder: Path, tokenizer: Tokenizer, config: OspreyConfig, data: bytes
):
    path = folder / "data.jsonl"
    path.write_bytes(data)
    report = validate(path)
    try:
        source = Custom(path)
    except ValueError:
        assert (report.samples, report.bad_lines) == (0, [0])
        return
    usable = set()
    for index in range(len(source)):
        source.image_key(index)
        try:
            record = source[index]
            encode(record, tokenizer, config, rng=draws(0, "custom", 0, index), length=10**6, regions=10**4)
        except (ValueError, OSError):
            continue
        usable.add(int(record.sample_id.partition(":")[2].partition(" ")[0]))
    split = data.removeprefix(BOM).split(b"\n")
    with_text = {number for number, line in enumerate(split, 1) if line.strip()}
    assert report.lines == len(with_text)
    assert with_text - set(report.bad_lines) == usable
    assert report.samples == len(usable)


coordinates = st.integers(-20, 20) | st.floats(-20, 20) | st.sampled_from(NUMBERS)
segmentations = st.one_of(
    values,
    st.lists(st.lists(coordinates, max_size=12), max_size=3),
    st.fixed_dictionaries(
        {
            "size": st.sampled_from([[6, 8], [8, 6], [6.0, 8], [True, 48], (6, 8), None]),
            "counts": st.one_of(
                st.lists(st.integers(-1, 60) | scalars, max_size=6),
                st.text(st.characters(min_codepoint=40, max_codepoint=115), max_size=8),
                st.text(max_size=6),
                st.binary(max_size=6),
            ),
        }
    ),
)


@fuzzed
@given(segmentations)
def test_segmentation_gives_a_mask_of_the_size_or_is_refused(segmentation: Any):
    try:
        rle = segmentation_rle(segmentation, 6, 8)
    except ValueError:
        return
    # What was taken is good for all that follows.
    assert rle["size"] == [6, 8]
    mask = decode_rles([rle])[0]
    assert mask.shape == (6, 8)
    assert mask.dtype == bool
    assert rle_area(rle) == mask.sum()
    assert np.array_equal(decode_segmentation(segmentation, 6, 8), mask)


def _with_sums(data: bytes) -> bytes:
    """A PNG whose chunks carry the right checksums, so that what was changed is looked at."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + struct.unpack_from(">I", out, at)[0]
        if end + 4 > len(out):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(out[at + 4 : end]))
        at = end + 4
    return bytes(out)


def _pictures() -> list[bytes]:
    turned = Image.Exif()
    turned[0x0112] = 6
    rgb = picture()
    return [
        encoded(rgb),
        encoded(rgb, progressive=True, exif=turned),
        encoded(rgb.convert("CMYK")),
        encoded(rgb, "PNG", exif=turned),
        encoded(rgb.convert("P"), "PNG", transparency=b"\0\1"),
        encoded(rgb.convert("1"), "PNG"),
        encoded(rgb.convert("RGBA"), "PNG"),
        encoded(Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8)), "PNG"),
    ]


@fuzzed
@given(
    changed_bytes(
        st.sampled_from(_pictures()), (b"\xff", b"\0\0", b"\xff\xd9", b"IDAT", b"iCCP", b"\x7f\xff")
    )
    | st.binary(max_size=40)
)
@example(encoded(picture(), "PNG").replace(struct.pack(">II", WIDTH, HEIGHT), b"\x7f\xff" * 4))
@example(encoded(picture(), "PNG").replace(b"\0\0\0\0IEND", b"\0\0\0\0iCCP????" + b"\0\0\0\0IEND"))
def test_damaged_picture_gives_pixels_or_is_refused(data: bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # more would only take time
        for content in (data, _with_sums(data)):
            try:
                pixels = load_image(content)
            except ValueError:
                continue
            assert pixels.shape == (*open_image(content, "picture").size[::-1], 3)
            assert pixels.dtype == np.uint8
