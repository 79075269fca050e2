"""Transformers' torch `SamModel` with random weights, and the same model here; prompts for both.

The weights go over by the converter's table; `tests/convert/test_sam.py` tests its names.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from transformers import SamConfig, SamModel

from osprey_jax.checkpoint import flatten, unflatten
from osprey_jax.convert_rules import slots_of
from osprey_jax.convert_sam import SECTIONS, TIED
from osprey_jax.convert_sam_rules import read_sizes, rules
from osprey_jax.sam import config as our_configs
from osprey_jax.sam.network import SamNetwork, abstract_params
from osprey_jax.sam.prompt_encoder import BOTTOM_RIGHT, PADDING, TOP_LEFT
from osprey_jax.typing import Params

# A grid of 10 x 10 that windows of 4 don't divide.
B_LIKE = {
    "vision_config": {
        "hidden_size": 48,
        "output_channels": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": 80,
        "patch_size": 8,
        "window_size": 4,
        "global_attn_indexes": [1, 3],
        "num_pos_feats": 16,
        "mlp_dim": 96,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 80, "patch_size": 8},
    "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 24},
}
# Deeper, windows larger than half of the grid, other numbers of heads, masks and layers, and other epsilons.
L_LIKE = {
    "vision_config": {
        "hidden_size": 64,
        "output_channels": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 44,
        "patch_size": 4,
        "window_size": 7,
        "global_attn_indexes": [2, 5],
        "num_pos_feats": 32,
        "mlp_dim": 128,
        "layer_norm_eps": 1e-3,
    },
    "prompt_encoder_config": {
        "hidden_size": 64,
        "image_size": 44,
        "patch_size": 4,
        "mask_input_channels": 24,
    },
    "mask_decoder_config": {
        "hidden_size": 64,
        "mlp_dim": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_multimask_outputs": 2,
        "iou_head_depth": 4,
        "iou_head_hidden_dim": 40,
        "layer_norm_eps": 1e-3,
    },
}


@dataclasses.dataclass(frozen=True)
class SamPair:
    """A reference and the same model here."""

    reference: SamModel
    config: our_configs.SamConfig
    params: Params

    @classmethod
    def of(cls, sizes: Mapping[str, Mapping[str, object]], seed: int = 0) -> "SamPair":
        """A reference with random weights, and its twin."""
        reference = random_model(sizes, seed)
        fields = reference.config.to_dict()
        flat = {f"{section}.{key}": value for section in SECTIONS for key, value in fields[section].items()}
        tensors = {name: tensor for name, tensor in reference.state_dict().items() if name != TIED}
        config = read_sizes({name: tuple(t.shape) for name, t in tensors.items()}, flat, "transformers")
        return cls(reference, config, our_params(tensors, config))

    @property
    def network(self) -> SamNetwork:
        """Ours, computing in float32."""
        return SamNetwork(self.config)


def random_model(sizes: Mapping[str, Mapping[str, object]], seed: int = 0) -> SamModel:
    """A model in which no bias is at zero, no norm at one, and no table of places empty."""
    with torch.random.fork_rng(devices=[]):
        model = SamModel(SamConfig(**sizes, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "norm" in name and name.endswith("weight"):
                weight.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias"):
                weight.uniform_(-0.5, 0.5, generator=generator)
            elif re.search(r"(positional_embedding|embed(\.\d)?\.weight|tokens?\.weight)$", name):
                weight.normal_(0.0, 1.0, generator=generator)
            elif "rel_pos" in name or "pos_embed" in name:
                weight.normal_(0.0, 0.5, generator=generator)
            elif weight.ndim > 1:
                # torch's transposed convolutions have their inputs first.
                inputs = len(weight) if "upscale" in name else weight[0].numel()
                # Sharper attention, so that places and prompts show.
                gain = 1.6 if "qkv" in name or "q_proj" in name or "k_proj" in name else 1.0
                weight.normal_(0.0, gain * inputs**-0.5, generator=generator)
            else:
                raise AssertionError(f"{name} is not drawn")
    return model


def our_params(tensors: Mapping[str, torch.Tensor], config: our_configs.SamConfig) -> Params:
    """Parameters that hold a reference's tensors, in float32."""
    leaves = {
        path: np.zeros(leaf.shape, np.float32) for path, leaf in flatten(abstract_params(config)).items()
    }
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    for name, slot in slots_of(shapes, rules(config, "transformers")).items():
        target = leaves[slot.path] if slot.place is None else leaves[slot.path][slot.place]
        target[...] = slot.transform.to_jax(tensors[name].numpy()).reshape(target.shape)
    return unflatten(leaves)


class Prompts(NamedTuple):
    """Some prompts about one image, in pixels of the input: points `(P, T, 2)`, boxes `(P, 4)`, masks."""

    points: np.ndarray | None = None
    labels: np.ndarray | None = None
    boxes: np.ndarray | None = None
    masks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(next(x for x in (self.points, self.boxes, self.masks) if x is not None))

    def ours(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Places, kinds and masks: points alone are followed by one that is none, as in the original."""
        places, kinds = np.zeros((len(self), 0, 2), np.float32), np.zeros((len(self), 0), np.int32)
        if self.points is not None and self.labels is not None:
            places, kinds = self.points.astype(np.float32), self.labels.astype(np.int32)
            if self.boxes is None:
                places = np.concatenate([places, np.zeros_like(places[:, :1])], axis=1)
                kinds = np.concatenate([kinds, np.full_like(kinds[:, :1], PADDING)], axis=1)
        if self.boxes is not None:
            corners = self.boxes.reshape(-1, 2, 2).astype(np.float32)
            places = np.concatenate([places, corners], axis=1)
            sides = np.tile(np.array([TOP_LEFT, BOTTOM_RIGHT], np.int32), (len(self), 1))
            kinds = np.concatenate([kinds, sides], axis=1)
        return places, kinds, self.masks

    def one(self, number: int) -> "Prompts":
        """One of them, still with its axis."""
        return Prompts(*(x if x is None else x[number : number + 1] for x in self))

    def torch(self) -> dict[str, torch.Tensor]:
        """The reference's arguments, with a batch axis for the image."""
        found = {"input_points": self.points, "input_labels": self.labels, "input_boxes": self.boxes}
        given = {key: torch.from_numpy(x)[None] for key, x in found.items() if x is not None}
        if self.masks is not None:
            assert len(self.masks) == 1, "the reference takes one mask for an image"
            given["input_masks"] = torch.from_numpy(self.masks)[:, None]
        return given


@torch.no_grad()
def reference_decode(
    model: SamModel, embedding: torch.Tensor, prompts: Prompts
) -> tuple[np.ndarray, np.ndarray]:
    """Logits `(P, 1 + M, Y, X)` and IoUs of all masks, prompt by prompt where they have masks."""
    groups = [prompts.one(i) for i in range(len(prompts))] if prompts.masks is not None else [prompts]
    logits, ious = [], []
    for group in groups:
        outs = [
            model(image_embeddings=embedding, **group.torch(), multimask_output=multimask)
            for multimask in (False, True)
        ]
        logits.append(torch.cat([out.pred_masks[0] for out in outs], dim=1).numpy())
        ious.append(torch.cat([out.iou_scores[0] for out in outs], dim=1).numpy())
    return np.concatenate(logits), np.concatenate(ious)


def make_prompts(kind: str, *, side: int, mask_side: int, count: int = 3, seed: int = 0) -> Prompts:
    """Random ones: `point`, `points` of all labels, `box`, `mask`, or several of them joined by `+`."""
    rng = np.random.default_rng(seed)
    given: dict[str, np.ndarray] = {}
    for part in kind.split("+"):
        if part in ("point", "points"):
            # As many places as points alone have with the one after them, for which there is a program.
            number = 1 if part == "point" else 3 if "box" in kind else 4
            given["points"] = rng.uniform(0, side, (count, number, 2)).astype(np.float32)
            given["labels"] = np.tile(np.array([1, 0, -1, 1][:number]), (count, 1))
        elif part == "box":
            corners = np.sort(rng.uniform(0, side, (count, 2, 2)), axis=1)
            given["boxes"] = corners.reshape(count, 4).astype(np.float32)
        else:
            given["masks"] = rng.normal(0, 5, (count, mask_side, mask_side)).astype(np.float32)
    return Prompts(**given)
