"""One record's encoding, and the padding of a batch, against literals."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.records import Record
from data_pipelines.transforms import DoesNotFit, Example, collate, encode
from osprey_jax.config import OspreyConfig
from osprey_jax.prompt import Tokenizer

FIRST = ("<image>\nWhat is <mask><pos>", "red")
SECOND = ("is <mask><pos> <mask><pos> blue", "red car")
THIRD = ("What car", "blue")

FIRST_IDS = [1, 3, 4, -200, -200, -200, -200, 6, 7, 11, 12, 5, 8, 2]
SECOND_IDS = [4, 7, 11, 12, 11, 12, 9, 5, 8, 10, 2]
THIRD_IDS = [4, 6, 10, 5, 9, 2]
FIRST_LABELS = [-100] * 12 + [8, 2]
SECOND_LABELS = [-100] * 8 + [8, 10, 2]


def quarter(row: int, column: int) -> np.ndarray:
    mask = np.zeros((8, 8), bool)
    mask[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
    return mask


QUARTERS = np.stack([quarter(0, 0), quarter(0, 1), quarter(1, 0)])


def record(*turns: tuple[str, str], regions: int = 3, **values: object) -> Record:
    values = {"image": np.full((8, 8, 3), 255, np.uint8), "masks": QUARTERS[:regions], **values}
    return Record(sample_id="cards/7", turns=turns, **values)


@dataclasses.dataclass
class Encode:
    """`encode` with the settings that most tests share."""

    tokenizer: Tokenizer
    config: OspreyConfig

    def __call__(self, example: Record, **settings: object) -> Example:
        settings = {"length": 40, "regions": 3, "system": "Sys", **settings}
        return encode(example, self.tokenizer, self.config, **settings)


@pytest.fixture(scope="module")
def encoded(tokenizer: Tokenizer, config: OspreyConfig) -> Encode:
    return Encode(tokenizer, config)


def test_ids_have_every_place_of_the_image_and_labels_are_on_the_answers(encoded: Encode) -> None:
    example = encoded(record(FIRST, SECOND))
    assert example.input_ids.tolist() == FIRST_IDS + SECOND_IDS
    assert example.labels.tolist() == FIRST_LABELS + SECOND_LABELS
    assert example.input_ids.dtype == example.labels.dtype == np.int32
    assert (example.sample_id, example.dropped_turns) == ("cards/7", 0)


def test_a_dialogue_weighs_one_however_many_tokens_are_labelled(encoded: Encode) -> None:
    weights = encoded(record(FIRST, SECOND)).loss_weights
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, [0] * 12 + [0.2] * 2 + [0] * 8 + [0.2] * 3, rtol=1e-6)


def test_every_labelled_token_weighs_one_where_tokens_count(encoded: Encode) -> None:
    weights = encoded(record(FIRST, SECOND), loss_per="token").loss_weights
    assert weights.tolist() == [0] * 12 + [1] * 2 + [0] * 8 + [1] * 3


def test_masks_are_pyramids_in_the_order_of_the_text(encoded: Encode) -> None:
    levels, position = encoded(record(FIRST, SECOND)).masks
    np.testing.assert_array_equal(levels[0], QUARTERS)
    assert [level.shape for level in levels] == [(3, 8, 8), (3, 4, 4), (3, 2, 2), (3, 1, 1)]
    np.testing.assert_array_equal(levels[2], [[[1, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 0]]])
    assert position.dtype == np.float32
    np.testing.assert_array_equal(position[1], np.kron([[0, 1], [0, 0]], np.ones((2, 2))))


def test_pixels_are_normalised(encoded: Encode) -> None:
    image = encoded(record(FIRST, SECOND)).image
    assert (image.shape, image.dtype) == ((32, 32, 3), np.float32)
    white = [(1 - 0.48145466) / 0.26862954, (1 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711]
    np.testing.assert_allclose(image[5, 9], white, rtol=1e-6)


def test_an_encoded_file_gives_what_its_pixels_give(encoded: Encode) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    expected = encoded(record(FIRST, regions=1, image=pixels)).image
    np.testing.assert_array_equal(encoded(record(FIRST, regions=1, image=file.getvalue())).image, expected)
    with pytest.raises(ValueError, match="truncated"):
        encoded(record(FIRST, regions=1, image=file.getvalue()[:-60]))


@pytest.mark.parametrize(
    ("limits", "ids", "regions"),
    [
        ({"length": 31}, FIRST_IDS + SECOND_IDS + THIRD_IDS, 3),
        ({"length": 30}, FIRST_IDS + SECOND_IDS, 3),
        ({"length": 25}, FIRST_IDS + SECOND_IDS, 3),
        ({"length": 24}, FIRST_IDS, 1),
        ({"length": 14}, FIRST_IDS, 1),
        ({"regions": 2}, FIRST_IDS, 1),
        ({"regions": 1}, FIRST_IDS, 1),
    ],
)
def test_turns_that_do_not_fit_are_dropped_whole_with_their_regions(
    encoded: Encode, limits: dict[str, int], ids: list[int], regions: int
) -> None:
    example = encoded(record(FIRST, SECOND, THIRD), **limits)
    assert example.input_ids.tolist() == ids
    np.testing.assert_array_equal(example.masks.levels[0], QUARTERS[:regions])
    assert example.labels[-1] == 2
    assert example.loss_weights.sum() == pytest.approx(1)
    assert example.dropped_turns == [
        FIRST_IDS + SECOND_IDS + THIRD_IDS,
        FIRST_IDS + SECOND_IDS,
        FIRST_IDS,
    ].index(ids)


def test_a_first_turn_that_does_not_fit_is_an_error_that_says_why(encoded: Encode) -> None:
    with pytest.raises(DoesNotFit, match="cards/7: the first turn has 14 tokens, 13 are allowed"):
        encoded(record(FIRST, SECOND), length=13)
    with pytest.raises(DoesNotFit, match="cards/7: the first turn has 1 regions, 0 are allowed"):
        encoded(record(FIRST, SECOND), regions=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            record(FIRST, ("<mask> is", "red"), regions=1),
            "cards/7: <mask> is 2 times in the text, expected 1",
        ),
        (record(FIRST, ("is", "<pos>"), regions=1), "cards/7: <pos> is 2 times in the text, expected 1"),
        (record(("What is <mask><pos>", "red"), regions=1), "cards/7: <image> is 0 times"),
        (record(FIRST, ("<image>", "red"), regions=1), "cards/7: <image> is 2 times"),
        (
            record(FIRST, masks=np.ones((1, 8, 9), bool)),
            r"cards/7: masks are \(8, 9\).*the image is \(8, 8\)",
        ),
    ],
)
def test_what_does_not_belong_together_is_an_error_that_names_the_sample(
    encoded: Encode, wrong: Record, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encoded(wrong)


def test_padding_carries_no_attention_no_loss_and_no_region(encoded: Encode) -> None:
    long, short = encoded(record(FIRST, SECOND)), encoded(record(FIRST, regions=1))
    batch = collate([short, long], (27, 4), pad_id=0)
    np.testing.assert_array_equal(batch.images, [short.image, long.image])
    assert batch.input_ids.tolist() == [FIRST_IDS + [0] * 13, FIRST_IDS + SECOND_IDS + [0] * 2]
    assert batch.labels.tolist() == [FIRST_LABELS + [-100] * 13, FIRST_LABELS + SECOND_LABELS + [-100] * 2]
    assert batch.segment_ids.tolist() == [[1] * 14 + [0] * 13, [1] * 25 + [0] * 2]
    assert batch.positions.tolist() == [[*range(14), *[0] * 13], [*range(25), 0, 0]]
    np.testing.assert_allclose(batch.loss_weights.sum(axis=1), [1, 1], rtol=1e-6)
    assert not batch.prefix_segment_ids.any()
    nothing = np.zeros((8, 8), bool)
    np.testing.assert_array_equal(
        batch.masks.levels[0], [[QUARTERS[0], nothing, nothing, nothing], [*QUARTERS, nothing]]
    )
    np.testing.assert_array_equal(batch.masks.position.sum(axis=(2, 3)), [[4, 0, 0, 0], [4, 4, 4, 0]])
    assert {name: array.dtype.name for name, array in vars(batch).items() if name != "masks"} == {
        "images": "float32",
        "input_ids": "int32",
        "labels": "int32",
        "loss_weights": "float32",
        "positions": "int32",
        "segment_ids": "int32",
        "prefix_segment_ids": "int32",
    }
