"""Tensors of the 7B release, names and shapes, against a torch model of its sizes; nothing is allocated."""

import math

import pytest
import torch

from osprey_jax.checkpoint import flatten
from osprey_jax.config import OspreyConfig, osprey_7b
from osprey_jax.convert_rules import is_ignored, torch_slots
from osprey_jax.models.osprey import abstract_params
from tests.parity.bridge import our_config
from tests.parity.reference import VISION_PREFIX, OspreyReference, ReferenceConfig

SIZES = ReferenceConfig(
    depths=(3, 3, 27, 3),
    dims=(192, 384, 768, 1536),
    extractor_dim=1024,
    dim=4096,
    ffn_dim=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
)


@pytest.fixture(scope="module")
def release() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        tensors = OspreyReference(SIZES).release_state_dict()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_defaults_are_the_release_s_sizes() -> None:
    assert our_config(SIZES) == osprey_7b() == OspreyConfig()


def test_every_tensor_of_the_release_has_its_place_and_shape(release: dict[str, tuple[int, ...]]) -> None:
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(osprey_7b())).items()}
    ours = {name: slot.torch_shape for name, slot in torch_slots(shapes).items()}
    assert ours == {name: shape for name, shape in release.items() if not is_ignored(name)}
    head = {name for name in release if ".head." in name}
    assert {name for name in release if is_ignored(name)} == head | {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(32)
    }


def test_parts_have_the_parameters_that_are_known_of_them(release: dict[str, tuple[int, ...]]) -> None:
    counts = {name: math.prod(shape) for name, shape in release.items() if not name.endswith("inv_freq")}

    def count(*prefixes: str) -> int:
        return sum(number for name, number in counts.items() if name.startswith(prefixes))

    # open_clip's ConvNeXt-Large with its head, Llama-2-7B, and 768 → 4096 → 4096.
    assert count(VISION_PREFIX) == 199_770_816
    assert count("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.") == 6_738_415_616
    assert count("model.mm_projector.") == (768 + 1) * 4096 + (4096 + 1) * 4096
    ours = {part: flatten(tree) for part, tree in abstract_params(osprey_7b()).items()}
    totals = {part: sum(math.prod(leaf.shape) for leaf in leaves.values()) for part, leaves in ours.items()}
    head = sum(number for name, number in counts.items() if ".head." in name)
    assert totals == {
        "vision": 199_770_816 - head,
        "projector": count("model.mm_projector."),
        "extractor": count("mask_extractor."),
        "decoder": 6_738_415_616,
    }
    assert totals["vision"] == 196_227_264
