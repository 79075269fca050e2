"""The table that maps SAM's tensors in PyTorch to parameters, and the sizes that can be read off the tensors.

One table serves both layouts, the original's and transformers', and both directions. Files are
`convert_sam`'s business.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from osprey_jax.convert_rules import (
    CONV,
    HEADS_IN,
    HEADS_OUT,
    LINEAR,
    SAME,
    Rule,
    Transform,
    count_layers,
    integer_field,
    number_field,
)
from osprey_jax.sam.config import DecoderConfig, EncoderConfig, SamConfig
from osprey_jax.torch_files import Shape

Layout = Literal["original", "transformers"]

FIRST = Transform(lambda x: x[0], lambda x: x[None])  # (1, …) <-> (…)
FOLDED = Transform(lambda x: x, lambda x: x.reshape(-1))  # (N·H) <-> (N, H)
POINTWISE = Transform(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])  # OI11 <-> IO
UPSCALE = Transform(lambda x: x.transpose(0, 2, 3, 1), lambda x: x.transpose(0, 3, 1, 2))  # IOYX <-> IYXO


class Row(NamedTuple):
    """A tensor's name in both layouts, its leaf, and how axes are rearranged.

    Numbers stand for `{block}`s of the image encoder, `{layer}`s of the decoder, `{mask}`s that it predicts,
    layers of the IoU's network between its first and its `{last}`, `{inner}`, and `{before}`, one less;
    `{index}` is the leaf's first axis.
    """

    original: str
    transformers: str
    path: str
    transform: Transform


def _affine(
    original: str, transformers: str, path: str, transform: Transform, bias: Transform = SAME
) -> tuple[Row, Row]:
    return (
        Row(f"{original}.weight", f"{transformers}.weight", f"{path}/kernel", transform),
        Row(f"{original}.bias", f"{transformers}.bias", f"{path}/bias", bias),
    )


def _norm(original: str, transformers: str, path: str) -> tuple[Row, Row]:
    return (
        Row(f"{original}.weight", f"{transformers}.weight", f"{path}/scale", SAME),
        Row(f"{original}.bias", f"{transformers}.bias", f"{path}/bias", SAME),
    )


def _attention(original: str, transformers: str, path: str) -> tuple[Row, ...]:
    names = [(f"{original}.{x}_proj", f"{transformers}.{x}_proj", f"{path}/{x}_proj") for x in "qkv"]
    queries = [row for name in names for row in _affine(*name, HEADS_OUT, FOLDED)]
    return *queries, *_affine(
        f"{original}.out_proj", f"{transformers}.out_proj", f"{path}/out_proj", HEADS_IN
    )


_BLOCK, _HF_BLOCK = "image_encoder.blocks.{block}.", "vision_encoder.layers.{block}."
_BLOCK_PATH = "image_encoder/blocks_{block}/"
_NECK, _HF_NECK = "image_encoder.neck.", "vision_encoder.neck."
_PROMPT, _PROMPT_PATH = "prompt_encoder.", "prompt_encoder/"
_MASKS, _HF_MASKS = "prompt_encoder.mask_downscaling.", "prompt_encoder.mask_embed."
_DECODER, _DECODER_PATH = "mask_decoder.", "mask_decoder/"
_LAYER, _LAYER_PATH = "mask_decoder.transformer.layers.{layer}.", "mask_decoder/layers_{layer}/"
_TRANSFORMER = "mask_decoder.transformer."
_HYPER, _HYPER_PATH = "mask_decoder.output_hypernetworks_mlps.{mask}.", "mask_decoder/hypernetworks_{mask}/"
_IOU, _IOU_PATH = "mask_decoder.iou_prediction_head.", "mask_decoder/iou_head/"

ROWS: tuple[Row, ...] = (
    *_affine(
        "image_encoder.patch_embed.proj",
        "vision_encoder.patch_embed.projection",
        "image_encoder/patch_embed",
        CONV,
    ),
    Row("image_encoder.pos_embed", "vision_encoder.pos_embed", "image_encoder/pos_embed", FIRST),
    *_norm(_BLOCK + "norm1", _HF_BLOCK + "layer_norm1", _BLOCK_PATH + "norm1"),
    *_affine(_BLOCK + "attn.qkv", _HF_BLOCK + "attn.qkv", _BLOCK_PATH + "attn/qkv", HEADS_OUT, FOLDED),
    *_affine(_BLOCK + "attn.proj", _HF_BLOCK + "attn.proj", _BLOCK_PATH + "attn/proj", HEADS_IN),
    Row(_BLOCK + "attn.rel_pos_h", _HF_BLOCK + "attn.rel_pos_h", _BLOCK_PATH + "attn/rel_pos_h", SAME),
    Row(_BLOCK + "attn.rel_pos_w", _HF_BLOCK + "attn.rel_pos_w", _BLOCK_PATH + "attn/rel_pos_w", SAME),
    *_norm(_BLOCK + "norm2", _HF_BLOCK + "layer_norm2", _BLOCK_PATH + "norm2"),
    *_affine(_BLOCK + "mlp.lin1", _HF_BLOCK + "mlp.lin1", _BLOCK_PATH + "fc1", LINEAR),
    *_affine(_BLOCK + "mlp.lin2", _HF_BLOCK + "mlp.lin2", _BLOCK_PATH + "fc2", LINEAR),
    Row(_NECK + "0.weight", _HF_NECK + "conv1.weight", "image_encoder/neck_conv1/kernel", POINTWISE),
    *_norm(_NECK + "1", _HF_NECK + "layer_norm1", "image_encoder/neck_norm1"),
    Row(_NECK + "2.weight", _HF_NECK + "conv2.weight", "image_encoder/neck_conv2/kernel", CONV),
    *_norm(_NECK + "3", _HF_NECK + "layer_norm2", "image_encoder/neck_norm2"),
    Row(
        _PROMPT + "pe_layer.positional_encoding_gaussian_matrix",
        "shared_image_embedding.positional_embedding",
        _PROMPT_PATH + "frequencies",
        SAME,
    ),
    Row(
        _PROMPT + "point_embeddings.{index}.weight",
        _PROMPT + "point_embed.{index}.weight",
        _PROMPT_PATH + "kinds",
        FIRST,
    ),
    Row(
        _PROMPT + "not_a_point_embed.weight",
        _PROMPT + "not_a_point_embed.weight",
        _PROMPT_PATH + "not_a_point",
        FIRST,
    ),
    Row(_PROMPT + "no_mask_embed.weight", _PROMPT + "no_mask_embed.weight", _PROMPT_PATH + "no_mask", FIRST),
    *_affine(_MASKS + "0", _HF_MASKS + "conv1", _PROMPT_PATH + "mask_conv1", CONV),
    *_norm(_MASKS + "1", _HF_MASKS + "layer_norm1", _PROMPT_PATH + "mask_norm1"),
    *_affine(_MASKS + "3", _HF_MASKS + "conv2", _PROMPT_PATH + "mask_conv2", CONV),
    *_norm(_MASKS + "4", _HF_MASKS + "layer_norm2", _PROMPT_PATH + "mask_norm2"),
    *_affine(_MASKS + "6", _HF_MASKS + "conv3", _PROMPT_PATH + "mask_conv3", POINTWISE),
    Row(_DECODER + "iou_token.weight", _DECODER + "iou_token.weight", _DECODER_PATH + "iou_token", SAME),
    Row(
        _DECODER + "mask_tokens.weight", _DECODER + "mask_tokens.weight", _DECODER_PATH + "mask_tokens", SAME
    ),
    *_attention(_LAYER + "self_attn", _LAYER + "self_attn", _LAYER_PATH + "self_attn"),
    *(
        row
        for way in ("token_to_image", "image_to_token")
        for row in _attention(f"{_LAYER}cross_attn_{way}", f"{_LAYER}cross_attn_{way}", _LAYER_PATH + way)
    ),
    *(
        row
        for i in range(1, 5)
        for row in _norm(f"{_LAYER}norm{i}", f"{_LAYER}layer_norm{i}", f"{_LAYER_PATH}norm{i}")
    ),
    *_affine(_LAYER + "mlp.lin1", _LAYER + "mlp.lin1", _LAYER_PATH + "mlp/layers_0", LINEAR),
    *_affine(_LAYER + "mlp.lin2", _LAYER + "mlp.lin2", _LAYER_PATH + "mlp/layers_1", LINEAR),
    *_attention(
        _TRANSFORMER + "final_attn_token_to_image",
        _TRANSFORMER + "final_attn_token_to_image",
        _DECODER_PATH + "final_token_to_image",
    ),
    *_norm(
        _TRANSFORMER + "norm_final_attn",
        _TRANSFORMER + "layer_norm_final_attn",
        _DECODER_PATH + "final_norm",
    ),
    *(
        row
        for i, (original, transformers) in enumerate([("0", "upscale_conv1"), ("3", "upscale_conv2")], 1)
        for row in (
            Row(
                f"{_DECODER}output_upscaling.{original}.weight",
                f"{_DECODER}{transformers}.weight",
                f"{_DECODER_PATH}upscale_conv{i}/conv/kernel",
                UPSCALE,
            ),
            Row(
                f"{_DECODER}output_upscaling.{original}.bias",
                f"{_DECODER}{transformers}.bias",
                f"{_DECODER_PATH}upscale_conv{i}/bias",
                SAME,
            ),
        )
    ),
    *_norm(
        _DECODER + "output_upscaling.1",
        _DECODER + "upscale_layer_norm",
        _DECODER_PATH + "upscale_norm",
    ),
    *_affine(_HYPER + "layers.0", _HYPER + "proj_in", _HYPER_PATH + "layers_0", LINEAR),
    *_affine(_HYPER + "layers.1", _HYPER + "layers.0", _HYPER_PATH + "layers_1", LINEAR),
    *_affine(_HYPER + "layers.2", _HYPER + "proj_out", _HYPER_PATH + "layers_2", LINEAR),
    *_affine(_IOU + "layers.0", _IOU + "proj_in", _IOU_PATH + "layers_0", LINEAR),
    *_affine(_IOU + "layers.{inner}", _IOU + "layers.{before}", _IOU_PATH + "layers_{inner}", LINEAR),
    *_affine(_IOU + "layers.{last}", _IOU + "proj_out", _IOU_PATH + "layers_{last}", LINEAR),
)

ORIGINAL_HEADS = 8
"""Heads of the decoder in the original's code; its files don't tell."""

_BY_PATH = {row.path: row for row in ROWS}


def rules(config: SamConfig, layout: Layout) -> Iterator[Rule]:
    """The table's rows for a model of these sizes."""
    decoder = config.decoder
    numbers = {
        "{block}": range(config.encoder.num_layers),
        "{layer}": range(decoder.num_layers),
        "{mask}": range(decoder.num_masks + 1),
        "{inner}": range(1, decoder.iou_layers - 1),
        "{last}": [decoder.iou_layers - 1],
    }
    for row in ROWS:
        name = getattr(row, layout)
        key = next((key for key in numbers if key in row.path), None)
        if key is None:
            yield Rule(name, row.path, row.transform)
            continue
        for number in numbers[key]:
            filled = name.replace(key, str(number)).replace("{before}", str(number - 1))
            yield Rule(filled, row.path.replace(key, str(number)), row.transform)


def read_sizes(found: Mapping[str, Shape], fields: Mapping[str, Any], layout: Layout) -> SamConfig:
    """The configuration of a model whose tensors have these shapes, and whose `config.json` these fields.

    Raises ValueError where a tensor that tells a size is missing or of another kind of shape, and where
    `config.json` contradicts the tensors.
    """
    telling = {
        "image_encoder/pos_embed": 4,
        "image_encoder/patch_embed/kernel": 4,
        "image_encoder/blocks_{block}/fc1/kernel": 2,
        "image_encoder/blocks_{block}/attn/rel_pos_h": 2,
        "image_encoder/neck_conv1/kernel": 4,
        "prompt_encoder/mask_conv2/kernel": 4,
        "mask_decoder/mask_tokens": 2,
        "mask_decoder/layers_{layer}/mlp/layers_0/kernel": 2,
        "mask_decoder/layers_{layer}/token_to_image/q_proj/kernel": 2,
        "mask_decoder/iou_head/layers_0/kernel": 2,
    }
    names = {path: _name(path, layout) for path in telling}
    if missing := [name for name in names.values() if name not in found]:
        raise ValueError(f"missing tensors, without which SAM's sizes are unknown: {', '.join(missing)}")
    for path, rank in telling.items():
        shape = found[names[path]]
        if len(shape) != rank or 0 in shape:
            raise ValueError(f"{names[path]} has shape {shape}, expected {rank} axes, none of them empty")
    position, patch, fc1, relative, neck, mask, tokens, mlp, queries, iou = (
        found[name] for name in names.values()
    )
    grid, dim, out_dim = position[1], position[3], neck[0]
    if position[1] != position[2]:
        raise ValueError(f"{names['image_encoder/pos_embed']} has shape {position}, which is not a square's")
    for name, whole, part in (
        (names["image_encoder/blocks_{block}/attn/rel_pos_h"], dim, relative[1]),
        (names["mask_decoder/layers_{layer}/token_to_image/q_proj/kernel"], out_dim, queries[0]),
    ):
        if whole % part:
            raise ValueError(
                f"{name} has shape {found[name]}, but {part} doesn't divide the width of {whole}"
            )
    num_layers = _count(found, "image_encoder/blocks_{block}/norm1/scale", layout)
    window_size, global_layers = _windows(found, grid=grid, num_layers=num_layers, layout=layout)
    iou_layers = _count(found, "mask_decoder/iou_head/layers_{inner}/kernel", layout)
    config = SamConfig(
        encoder=EncoderConfig(
            image_size=grid * patch[2],
            patch_size=patch[2],
            dim=dim,
            ffn_dim=fc1[0],
            num_layers=num_layers,
            num_heads=dim // relative[1],
            window_size=window_size,
            global_layers=global_layers,
            out_dim=out_dim,
            norm_eps=number_field(fields, "vision_config.layer_norm_eps", EncoderConfig.norm_eps),
        ),
        decoder=DecoderConfig(
            num_layers=_count(found, "mask_decoder/layers_{layer}/norm1/scale", layout),
            num_heads=integer_field(fields, "mask_decoder_config.num_attention_heads", ORIGINAL_HEADS),
            ffn_dim=mlp[0],
            attention_reduction=out_dim // queries[0],
            num_masks=tokens[0] - 1,
            iou_dim=iou[0],
            iou_layers=iou_layers + (2 if layout == "transformers" else 0),  # whose ends are apart
            mask_channels=mask[0],
            norm_eps=number_field(
                fields,
                "mask_decoder_config.layer_norm_eps",
                DecoderConfig.norm_eps if layout == "original" else 1e-6,
            ),
        ),
    )
    _check_agreement(config, fields)
    return config


def _name(path: str, layout: Layout) -> str:
    """The tensor of a leaf, where there are several the first one."""
    name: str = getattr(_BY_PATH[path], layout)
    return name.replace("{block}", "0").replace("{layer}", "0")


def _count(found: Mapping[str, Shape], path: str, layout: Layout) -> int:
    """How many of the number in a leaf's path there are, by the names of what lies beside that leaf."""
    prefix = getattr(_BY_PATH[path], layout).partition("{")[0]
    return count_layers(found, re.escape(prefix) + r"(\d+)\..+")


def _windows(
    found: Mapping[str, Shape], *, grid: int, num_layers: int, layout: Layout
) -> tuple[int, tuple[int, ...]]:
    """The windows' side and the layers that have none, by how many distances their tables are for.

    Where a window is as large as the grid, it holds the whole image, and its layer is like one without.
    """
    name = getattr(_BY_PATH["image_encoder/blocks_{block}/attn/rel_pos_h"], layout)
    sides = {}
    for layer in range(num_layers):
        shape = found.get(name.replace("{block}", str(layer)))
        if shape:  # what is missing is listed when all names are known
            sides[layer] = (shape[0] + 1) // 2
    windows = sorted({side for side in sides.values() if side != grid})
    if len(windows) > 1:
        raise ValueError(f"the windows of {name} have several sizes: {', '.join(map(str, windows))}")
    return (windows or [grid])[0], tuple(layer for layer, side in sides.items() if side == grid)


def check_supported(fields: Mapping[str, Any]) -> None:
    """Raises ValueError where `config.json` describes a model that would be computed wrongly.

    `fields` have dotted keys, such as `vision_config.hidden_size`.
    """
    only = {
        "vision_config.use_abs_pos": True,
        "vision_config.use_rel_pos": True,
        "vision_config.qkv_bias": True,
        "vision_config.num_channels": 3,
        "vision_config.hidden_act": "gelu",
        "prompt_encoder_config.hidden_act": "gelu",
        "prompt_encoder_config.num_point_embeddings": 4,
        "prompt_encoder_config.layer_norm_eps": 1e-6,
        "mask_decoder_config.hidden_act": "relu",
    }
    for key, value in only.items():
        if fields.get(key, value) != value:
            raise ValueError(f"config.json: {key} is {fields[key]!r}, only {value!r} is supported")


def _check_agreement(config: SamConfig, fields: Mapping[str, Any]) -> None:
    encoder, decoder = config.encoder, config.decoder
    sizes = {
        "vision_config.image_size": encoder.image_size,
        "vision_config.patch_size": encoder.patch_size,
        "vision_config.hidden_size": encoder.dim,
        "vision_config.mlp_dim": encoder.ffn_dim,
        "vision_config.num_hidden_layers": encoder.num_layers,
        "vision_config.num_attention_heads": encoder.num_heads,
        "vision_config.output_channels": encoder.out_dim,
        "vision_config.num_pos_feats": encoder.out_dim // 2,
        "prompt_encoder_config.image_size": encoder.image_size,
        "prompt_encoder_config.patch_size": encoder.patch_size,
        "prompt_encoder_config.hidden_size": encoder.out_dim,
        "prompt_encoder_config.mask_input_channels": decoder.mask_channels,
        "mask_decoder_config.hidden_size": encoder.out_dim,
        "mask_decoder_config.mlp_dim": decoder.ffn_dim,
        "mask_decoder_config.num_hidden_layers": decoder.num_layers,
        "mask_decoder_config.attention_downsample_rate": decoder.attention_reduction,
        "mask_decoder_config.num_multimask_outputs": decoder.num_masks,
        "mask_decoder_config.iou_head_depth": decoder.iou_layers,
        "mask_decoder_config.iou_head_hidden_dim": decoder.iou_dim,
    }
    for key, size in sizes.items():
        if (said := fields.get(key)) is not None and said not in (size, [size, size]):
            raise ValueError(f"config.json says {key} {said}, the tensors say {size}")
    key = "vision_config.window_size"
    window = integer_field(fields, key, encoder.window_size)
    everywhere = len(encoder.global_layers) == encoder.num_layers
    if window != encoder.window_size and not everywhere:
        raise ValueError(f"config.json says {key} {window}, the tensors say {encoder.window_size}")
    key = "vision_config.global_attn_indexes"
    layers, told = fields.get(key), encoder.global_layers
    if layers is not None and window != encoder.grid_size and layers not in (told, [*told]):
        raise ValueError(f"config.json says {key} {layers}, the tensors say {[*told]}")
