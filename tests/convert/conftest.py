"""A small model, its release, and a stand-in for the tokenizer."""

from pathlib import Path

import pytest

from osprey_jax import convert
from tests.convert.releases import SIZES, FileTokenizer, write_release
from tests.parity import reference


@pytest.fixture(autouse=True)
def _file_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "Tokenizer", FileTokenizer)


@pytest.fixture(scope="module")
def model() -> reference.OspreyReference:
    return reference.OspreyReference(SIZES)


@pytest.fixture
def release(tmp_path: Path, model: reference.OspreyReference) -> Path:
    """A release of two `.bin` shards with the original's mix of dtypes."""
    return write_release(model, tmp_path / "release")
