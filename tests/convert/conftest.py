"""Small models, their releases, and a stand-in for the tokenizer."""

from pathlib import Path

import pytest
import torch
from transformers import SamModel

from osprey_jax import convert, convert_sam
from tests.convert.releases import SIZES, FileTokenizer, write_release
from tests.convert.sam_releases import original_names
from tests.parity import reference
from tests.parity.sam_models import B_LIKE, random_model


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


@pytest.fixture(scope="session")
def sam_model() -> SamModel:
    return random_model(B_LIKE)


@pytest.fixture
def sam_file(tmp_path: Path, sam_model: SamModel) -> Path:
    """The original's file."""
    torch.save(original_names(sam_model), tmp_path / "sam.pth")
    return tmp_path / "sam.pth"


@pytest.fixture
def sam_directory(tmp_path: Path, sam_model: SamModel) -> Path:
    """Transformers' directory."""
    sam_model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture(scope="session")
def sam_checkpoint(tmp_path_factory: pytest.TempPathFactory, sam_model: SamModel) -> Path:
    """What the original's file is converted to."""
    folder = tmp_path_factory.mktemp("converted")
    torch.save(original_names(sam_model), folder / "sam.pth")
    convert_sam.convert(folder / "sam.pth", folder / "sam")
    return folder / "sam"
