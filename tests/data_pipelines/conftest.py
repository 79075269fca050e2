"""A vocabulary, a model's sizes and records small enough that what becomes of them can be written down."""

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from osprey_jax.config import DecoderConfig, ExtractorConfig, OspreyConfig, VisionConfig
from osprey_jax.prompt import Tokenizer

WORDS = ("<unk>", "<s>", "</s>", "Sys", "USER:", "ASSISTANT:", "What", "is", "red", "blue", "car")
"""A word's place is its id; 11 and 12 are those of `<mask>` and `<pos>`."""


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(WORDS[:3]))
    return Tokenizer(backend, file_name="tokenizer.json", data=b"")


@pytest.fixture(scope="session")
def config() -> OspreyConfig:
    """An image is four tokens; the levels are 8, 4, 2 and 1 places wide."""
    return OspreyConfig(
        vision=VisionConfig(image_size=32),
        extractor=ExtractorConfig(position_size=4),
        decoder=DecoderConfig(vocab_size=11),
        mask_token_id=11,
        position_token_id=12,
    )
