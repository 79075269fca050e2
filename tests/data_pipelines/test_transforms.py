"""One record's encoding against literals."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.records import Record, Turn
from data_pipelines.transforms import DoesNotFit, Example, encode
from osprey_jax.config import OspreyConfig
from osprey_jax.masks import encode_rle
from osprey_jax.prompt import Tokenizer

FIRST = Turn("What is <mask><pos>", "red", (0,))
SECOND = Turn("is <mask><pos> <mask><pos> blue", "red car", (1, 2))
THIRD = Turn("What car", "blue")

FIRST_IDS = [1, 3, 4, -200, -200, -200, -200, 6, 7, 11, 12, 5, 8, 2]
SECOND_IDS = [4, 7, 11, 12, 11, 12, 9, 5, 8, 10, 2]
THIRD_IDS = [4, 6, 10, 5, 9, 2]
OPENED_SECOND_IDS = [*FIRST_IDS[:7], *SECOND_IDS[1:]]
OPENED_THIRD_IDS = [*FIRST_IDS[:7], *THIRD_IDS[1:]]
FIRST_LABELS = [-100] * 12 + [8, 2]
SECOND_LABELS = [-100] * 8 + [8, 10, 2]


def quarter(row: int, column: int) -> np.ndarray:
    mask = np.zeros((8, 8), bool)
    mask[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
    return mask


QUARTERS = np.stack([quarter(0, 0), quarter(0, 1), quarter(1, 0)])


def record(*turns: Turn, masks: np.ndarray = QUARTERS, **values: object) -> Record:
    values = {"image": np.full((8, 8, 3), 255, np.uint8), "opening": "<image>\n", **values}
    return Record(sample_id="cards/7", turns=turns, masks=tuple(map(encode_rle, masks)), **values)


@dataclasses.dataclass
class Encode:
    """`encode` with the settings that most tests share."""

    tokenizer: Tokenizer
    config: OspreyConfig

    def __call__(self, example: Record, **settings: object) -> Example:
        settings = {"length": 40, "regions": 3, "system": "Sys", **settings}
        settings["rng"] = np.random.default_rng(0)
        return encode(example, self.tokenizer, self.config, **settings)


@pytest.fixture(scope="module")
def encoded(tokenizer: Tokenizer, config: OspreyConfig) -> Encode:
    return Encode(tokenizer, config)


def test_ids_have_every_place_of_the_image_and_labels_are_on_the_answers(encoded: Encode) -> None:
    example = encoded(record(FIRST, SECOND))
    assert example.tokens.input_ids.tolist() == FIRST_IDS + SECOND_IDS
    assert example.tokens.labels.tolist() == FIRST_LABELS + SECOND_LABELS
    assert example.tokens.input_ids.dtype == example.tokens.labels.dtype == np.int32
    assert (example.sample_ids, example.dropped_turns) == (("cards/7",), 0)


def test_a_dialogue_weighs_one_however_many_tokens_are_labelled(encoded: Encode) -> None:
    weights = encoded(record(FIRST, SECOND)).tokens.loss_weights
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, [0] * 12 + [0.2] * 2 + [0] * 8 + [0.2] * 3, rtol=1e-6)


def test_every_labelled_token_weighs_one_where_tokens_count(encoded: Encode) -> None:
    weights = encoded(record(FIRST, SECOND), loss_per="token").tokens.loss_weights
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
    expected = encoded(record(FIRST, image=pixels)).image
    np.testing.assert_array_equal(encoded(record(FIRST, image=file.getvalue())).image, expected)
    with pytest.raises(ValueError, match="truncated"):
        encoded(record(FIRST, image=file.getvalue()[:-60]))


@pytest.mark.parametrize(
    ("limits", "parts"),
    [
        ({"length": 31}, [FIRST_IDS + SECOND_IDS + THIRD_IDS]),
        ({"length": 30}, [FIRST_IDS + SECOND_IDS, OPENED_THIRD_IDS]),
        ({"length": 25}, [FIRST_IDS + SECOND_IDS, OPENED_THIRD_IDS]),
        ({"length": 24}, [FIRST_IDS, OPENED_SECOND_IDS + THIRD_IDS]),
        ({"length": 17}, [FIRST_IDS, OPENED_SECOND_IDS, OPENED_THIRD_IDS]),
        # The second turn alone is too long.
        ({"length": 16}, [FIRST_IDS, OPENED_THIRD_IDS]),
        ({"regions": 2}, [FIRST_IDS, OPENED_SECOND_IDS + THIRD_IDS]),
        ({"regions": 1}, [FIRST_IDS, OPENED_THIRD_IDS]),
    ],
)
def test_what_does_not_fit_is_split_by_turns_and_the_parts_come_in_their_turn(
    encoded: Encode, limits: dict[str, int], parts: list[list[int]]
) -> None:
    for part in range(5):
        example = encoded(record(FIRST, SECOND, THIRD), part=part, **limits)
        ids = parts[part % len(parts)]
        assert example.tokens.input_ids.tolist() == ids
        assert example.tokens.labels[-1] == 2
        assert example.tokens.loss_weights.sum() == pytest.approx(1)
        assert example.dropped_turns == 3 - ids.count(2)
        # The first turn names the first region, the second the two others.
        regions = {0: [], 1: [0], 2: [1, 2], 3: [0, 1, 2]}[ids.count(11)]
        np.testing.assert_array_equal(example.masks.levels[0], QUARTERS[regions])


def test_a_first_turn_that_does_not_fit_is_an_error_that_says_why(encoded: Encode) -> None:
    with pytest.raises(DoesNotFit, match="the first turn has 14 tokens, 10 are allowed"):
        encoded(record(FIRST, SECOND), length=10)
    with pytest.raises(DoesNotFit, match="the first turn has 1 regions, 0 are allowed"):
        encoded(record(FIRST, SECOND), regions=0)


def test_a_conversation_without_an_image_has_no_place_for_one(encoded: Encode) -> None:
    example = encoded(record(THIRD, image=None, masks=QUARTERS[:0], opening=""))
    assert example.tokens.input_ids.tolist() == [1, 3, *THIRD_IDS]
    assert example.image is None
    assert [level.shape for level in example.masks.levels] == [(0, 8, 8), (0, 4, 4), (0, 2, 2), (0, 1, 1)]


def test_a_caption_stands_alone_behind_its_image(encoded: Encode) -> None:
    example = encoded(record(Turn("", "red car"), masks=QUARTERS[:0], plain=True))
    # The newline is no word of this vocabulary, and white space parts its words.
    assert example.tokens.input_ids.tolist() == [1, -200, -200, -200, -200, 8, 10]
    assert example.tokens.labels.tolist() == [-100] * 5 + [8, 10]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (record(FIRST, Turn("<mask> is", "red")), "<mask> is 2 times in the text, expected 1"),
        (record(FIRST, Turn("is", "<pos>")), "<pos> is 2 times in the text, expected 1"),
        (record(FIRST, opening=""), "<image> is 0 times"),
        (record(FIRST, Turn("<image>", "red")), "<image> is 2 times"),
        (record(THIRD, image=None), "<image> is 1 times in the text, expected 0"),
        (record(FIRST, masks=np.ones((1, 8, 12), bool)), r"masks are \(8, 12\).*the image is \(8, 8\)"),
        (record(plain=True), "without a turn"),
    ],
)
def test_what_does_not_belong_together_is_an_error(encoded: Encode, wrong: Record, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoded(wrong)


def test_an_image_may_be_of_another_scale_than_its_masks(encoded: Encode) -> None:
    smaller = np.full((4, 4, 3), 255, np.uint8)
    example = encoded(record(FIRST, SECOND, image=smaller))
    np.testing.assert_array_equal(example.masks.levels[0], QUARTERS)


def test_a_record_that_names_other_regions_than_it_has_is_refused() -> None:
    with pytest.raises(ValueError, match="1 <mask><pos> in the text but 2 regions"):
        record(FIRST._replace(regions=(0, 1)))
    with pytest.raises(ValueError, match="region 4 is named, there are 3 masks"):
        record(FIRST._replace(regions=(3,)))
    with pytest.raises(ValueError, match="1 <mask><pos> in the text but 0 regions"):
        record(FIRST, opening="<image>\nregion1<mask><pos>. ")
