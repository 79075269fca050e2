"""Carries a reference's sizes and weights over to our parameters, with no file between; compares results.

Both directions go by the converter's table, so a parameter here and a tensor there have one name: the
release's.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
import torch

from osprey_jax.checkpoint import flatten, unflatten
from osprey_jax.config import DecoderConfig, ExtractorConfig, OspreyConfig, VisionConfig
from osprey_jax.convert_rules import torch_slots
from osprey_jax.masks import MaskPyramid, mask_pyramid
from osprey_jax.models.osprey import Osprey, abstract_params
from osprey_jax.typing import Params
from tests.parity.reference import IMAGE_ID, OspreyReference, ReferenceConfig

Arrays = Mapping[str, np.ndarray]

FORWARD = 2e-5
"""Largest difference over largest reference value that a block may show in float32.

Two correct float32 programs differ by the order of their sums, each of which costs some units of 6e-8: 1e-7
to 2e-6 was seen for every block, the full tower included. A wrong epsilon, approximation or layout shows
from 1e-4 upwards.
"""
GRADIENT = 1e-4
"""Largest relative L2 difference of a tensor's gradient; 2e-6 was seen."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A reference and the same model here."""

    reference: OspreyReference
    config: OspreyConfig
    params: Params

    @classmethod
    def of(cls, config: ReferenceConfig, seed: int = 0) -> "Pair":
        """A reference with random weights, and its twin."""
        reference = OspreyReference(config, seed)
        ours = our_config(config)
        return cls(reference, ours, our_params(reference.release_state_dict(), ours))

    @property
    def model(self) -> Osprey:
        """Ours, computing in float32."""
        return Osprey(self.config)

    def expand(self, ids: list[int]) -> list[int]:
        """The reference's prompt in our static form: the image takes as many places as it has tokens."""
        count = self.config.vision.num_image_tokens
        return [each for token in ids for each in [token] * (count if token == IMAGE_ID else 1)]

    def pyramid(self, masks: np.ndarray) -> MaskPyramid:
        """Mask pyramid of one image's regions `(R, h, w)`, with a batch axis."""
        sizes, position = self.config.vision.level_sizes, self.config.extractor.position_size
        one = mask_pyramid(masks, level_sizes=sizes, position_size=position)
        return jax.tree.map(lambda x: x[None], one)


def our_config(config: ReferenceConfig) -> OspreyConfig:
    """The configuration of a model with the reference's sizes."""
    return OspreyConfig(
        vision=VisionConfig(image_size=config.image_size, depths=config.depths, dims=config.dims),
        extractor=ExtractorConfig(dim=config.extractor_dim, position_size=config.position_size),
        decoder=DecoderConfig(
            vocab_size=config.vocab_size,
            dim=config.dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim or config.dim // config.num_heads,
            rope_theta=config.rope_theta,
            norm_eps=config.norm_eps,
        ),
        mask_token_id=config.mask_id,
        position_token_id=config.position_id,
    )


def our_params(tensors: Mapping[str, torch.Tensor], config: OspreyConfig) -> Params:
    """Parameters that hold a release's tensors, in float32."""
    leaves = {
        path: np.zeros(leaf.shape, np.float32) for path, leaf in flatten(abstract_params(config)).items()
    }
    for name, slot in torch_slots({path: leaf.shape for path, leaf in leaves.items()}).items():
        target = leaves[slot.path] if slot.place is None else leaves[slot.path][slot.place]
        target[...] = slot.transform.to_jax(tensors[name].numpy()).reshape(target.shape)
    return unflatten(leaves)


def release_arrays(params: Params) -> dict[str, np.ndarray]:
    """The leaves of a tree like the parameters', gradients for one, under the release's names and shapes."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    slots = torch_slots({path: leaf.shape for path, leaf in leaves.items()})
    return {
        name: slot.transform.to_torch(
            leaves[slot.path] if slot.place is None else leaves[slot.path][slot.place]
        )
        for name, slot in slots.items()
    }


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    return _ratio(found, expected, lambda x: float(np.abs(x).max()))


def relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    """L2 norm of the difference over that of what is expected."""
    return _ratio(found, expected, lambda x: float(np.linalg.norm(x)))


def _ratio(found: np.ndarray, expected: np.ndarray, norm) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, f"{found.shape} for {expected.shape}"
    difference = norm(found - expected)
    return difference / norm(expected) if expected.any() else difference


def assert_steps_agree(found: Arrays, expected: Arrays, *, tolerance: float = FORWARD) -> None:
    """Compares a computation's steps in `expected`'s order; the error shows at which one agreement ends."""
    assert found.keys() == expected.keys()
    _assert_small({name: largest_difference(found[name], expected[name]) for name in expected}, tolerance)


def assert_gradients_agree(found: Arrays, expected: Arrays, *, tolerance: float = GRADIENT) -> None:
    """Compares gradients tensor by tensor; where zeros are expected, there have to be zeros."""
    assert found.keys() == expected.keys()
    differences = {name: relative_l2(found[name], expected[name]) for name in expected}
    _assert_small({name: value for name, value in differences.items() if value != 0}, tolerance)


def _assert_small(differences: Mapping[str, float], tolerance: float) -> None:
    # Written so that a difference that is not a number is marked.
    marks = {name: " " if value <= tolerance else "!" for name, value in differences.items()}
    table = "\n".join(f"{marks[name]} {value:.1e}  {name}" for name, value in differences.items())
    print(table)  # for pytest -s
    assert "!" not in marks.values(), f"differences, ! above {tolerance:.0e}:\n{table}"
