"""SAM's tensors under the original's names, and ways to edit and compare what is converted."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import SamModel

from osprey_jax import convert_sam
from tests.convert.releases import leaves

Tensors = dict[str, torch.Tensor]
SHARED = "shared_image_embedding.positional_embedding"
TIED = "prompt_encoder.shared_embedding.positional_embedding"

GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
# In this order, from transformers' names to the original's.
RENAMES = (
    (r"^shared_image_embedding\.positional_embedding", GAUSSIAN),
    (r"^vision_encoder\.patch_embed\.projection", "image_encoder.patch_embed.proj"),
    (r"^vision_encoder\.layers", "image_encoder.blocks"),
    (r"^vision_encoder\.neck\.conv1", "image_encoder.neck.0"),
    (r"^vision_encoder\.neck\.layer_norm1", "image_encoder.neck.1"),
    (r"^vision_encoder\.neck\.conv2", "image_encoder.neck.2"),
    (r"^vision_encoder\.neck\.layer_norm2", "image_encoder.neck.3"),
    (r"^vision_encoder\.", "image_encoder."),
    (r"mask_embed\.conv1", "mask_downscaling.0"),
    (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
    (r"mask_embed\.conv2", "mask_downscaling.3"),
    (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
    (r"mask_embed\.conv3", "mask_downscaling.6"),
    (r"\.point_embed\.", ".point_embeddings."),
    (r"upscale_conv1", "output_upscaling.0"),
    (r"upscale_layer_norm", "output_upscaling.1"),
    (r"upscale_conv2", "output_upscaling.3"),
    (r"layer_norm_final_attn", "norm_final_attn"),
    (r"layer_norm(\d)", r"norm\1"),
    (r"((mlps\.\d|head)\.layers)\.1\.", r"\1.2."),
    (r"((mlps\.\d|head)\.layers)\.0\.", r"\1.1."),
    (r"(mlps\.\d|head)\.proj_in", r"\1.layers.0"),
    (r"mlps\.(\d)\.proj_out", r"mlps.\1.layers.2"),
)  # fmt: skip


def original_names(model: SamModel) -> Tensors:
    """A model's tensors as the original's file has them."""
    last = model.config.mask_decoder_config.iou_head_depth - 1
    renamed = {}
    for name, tensor in model.state_dict().items():
        if name != TIED:
            for pattern, new in (*RENAMES, (r"head\.proj_out", f"head.layers.{last}")):
                name = re.sub(pattern, new, name)
            renamed[name] = tensor
    return renamed


def edit(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    torch.save(change(torch.load(file)), file)


def assert_fails(source: Path, destination: Path, message: str, **options: object) -> None:
    before = sorted(destination.parent.iterdir())
    with pytest.raises(ValueError, match=message):
        convert_sam.convert(source, destination, **options)
    assert sorted(destination.parent.iterdir()) == before


def assert_same_leaves(found: Path, expected: Path) -> None:
    one, other = leaves(found), leaves(expected)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert leaf.dtype == other[path].dtype
        assert leaf.tobytes() == other[path].tobytes(), path


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}
