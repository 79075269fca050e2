"""The table that maps PyTorch's tensors to parameters, and the sizes that can be read off the tensors.

One table serves both directions: a row holds the tensor's name in the release, the parameter's path and how
the axes are rearranged. Rows are expanded over stages and layers into the exact list of tensors of a model,
and a source has to hold that list, no more (but for what `IGNORED` names) and no less. NumPy only; files are
`convert`'s business.

Reference: Llama's half-split rotary layout (Hugging Face's) is kept as it is.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from osprey_jax.config import DecoderConfig, ExtractorConfig, OspreyConfig, VisionConfig
from osprey_jax.torch_files import Shape, listed

TOWER = "model.vision_tower.vision_tower."
"""What the release puts in front of open_clip's names."""
EXTRACTOR = "mask_extractor."
PROJECTOR = "model.mm_projector."


class Transform(NamedTuple):
    """Rearranges a tensor's axes; `to_jax` may leave heads folded, the caller gives the leaf's shape."""

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


SAME = Transform(lambda x: x, lambda x: x)
LINEAR = Transform(lambda x: x.T, lambda x: x.T)  # (out, in) <-> (in, out)
CONV = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIYX <-> YXIO
DEPTHWISE = Transform(lambda x: x[:, 0].transpose(1, 2, 0), lambda x: x.transpose(2, 0, 1)[:, None])
HEADS_OUT = Transform(lambda x: x.T, lambda x: x.reshape(x.shape[0], -1).T)  # (N·H, D) <-> (D, N, H)
HEADS_IN = Transform(lambda x: x.T, lambda x: x.reshape(-1, x.shape[-1]).T)  # (D, N·H) <-> (N, H, D)


class Rule(NamedTuple):
    """A row: `{stage}` stands for 0 to 3 on both sides, `{index}` in the name for the leaf's first axis."""

    name: str
    path: str
    transform: Transform


class Slot(NamedTuple):
    """Where a tensor goes: to a leaf, or to `place` on its first axis."""

    path: str
    place: int | None
    transform: Transform
    torch_shape: Shape


def _affine(name: str, path: str, transform: Transform) -> tuple[Rule, Rule]:
    return Rule(f"{name}.weight", f"{path}/kernel", transform), Rule(f"{name}.bias", f"{path}/bias", SAME)


def _norm(name: str, path: str) -> tuple[Rule, Rule]:
    return Rule(f"{name}.weight", f"{path}/scale", SAME), Rule(f"{name}.bias", f"{path}/bias", SAME)


_TRUNK = TOWER + "visual.trunk."
_STAGE, _STAGE_PATH = _TRUNK + "stages.{stage}.", "vision/stages_{stage}/"
_BLOCK, _BLOCK_PATH = _STAGE + "blocks.{index}.", _STAGE_PATH + "blocks/"
_LAYER, _LAYER_PATH = "model.layers.{index}.", "decoder/layers/"
_ATTENTION, _ATTENTION_PATH = _LAYER + "self_attn.", _LAYER_PATH + "self_attn/"

RULES: tuple[Rule, ...] = (
    *_affine(_TRUNK + "stem.0", "vision/stem_conv", CONV),
    *_norm(_TRUNK + "stem.1", "vision/stem_norm"),
    *_norm(_STAGE + "downsample.0", _STAGE_PATH + "downsample_norm"),
    *_affine(_STAGE + "downsample.1", _STAGE_PATH + "downsample_conv", CONV),
    *_affine(_BLOCK + "conv_dw", _BLOCK_PATH + "dwconv", DEPTHWISE),
    *_norm(_BLOCK + "norm", _BLOCK_PATH + "norm"),
    *_affine(_BLOCK + "mlp.fc1", _BLOCK_PATH + "fc1", LINEAR),
    *_affine(_BLOCK + "mlp.fc2", _BLOCK_PATH + "fc2", LINEAR),
    Rule(_BLOCK + "gamma", _BLOCK_PATH + "gamma", SAME),
    *_affine(PROJECTOR + "0", "projector/fc1", LINEAR),
    *_affine(PROJECTOR + "2", "projector/fc2", LINEAR),
    *(rule for i in range(2, 6) for rule in _affine(f"{EXTRACTOR}res{i}", f"extractor/res{i}", LINEAR)),
    *_affine(EXTRACTOR + "feat_linear", "extractor/feat_linear", LINEAR),
    *_affine(EXTRACTOR + "mask_linear.layers.0", "extractor/mask_linear_0", LINEAR),
    *_affine(EXTRACTOR + "mask_linear.layers.1", "extractor/mask_linear_1", LINEAR),
    *_affine(EXTRACTOR + "mask_linear.layers.2", "extractor/mask_linear_2", LINEAR),
    Rule("model.embed_tokens.weight", "decoder/embed_tokens/embedding", SAME),
    Rule(_LAYER + "input_layernorm.weight", _LAYER_PATH + "input_layernorm/scale", SAME),
    Rule(_ATTENTION + "q_proj.weight", _ATTENTION_PATH + "q_proj/kernel", HEADS_OUT),
    Rule(_ATTENTION + "k_proj.weight", _ATTENTION_PATH + "k_proj/kernel", HEADS_OUT),
    Rule(_ATTENTION + "v_proj.weight", _ATTENTION_PATH + "v_proj/kernel", HEADS_OUT),
    Rule(_ATTENTION + "o_proj.weight", _ATTENTION_PATH + "o_proj/kernel", HEADS_IN),
    Rule(_LAYER + "post_attention_layernorm.weight", _LAYER_PATH + "post_attention_layernorm/scale", SAME),
    Rule(_LAYER + "mlp.gate_proj.weight", _LAYER_PATH + "mlp/gate_proj/kernel", LINEAR),
    Rule(_LAYER + "mlp.up_proj.weight", _LAYER_PATH + "mlp/up_proj/kernel", LINEAR),
    Rule(_LAYER + "mlp.down_proj.weight", _LAYER_PATH + "mlp/down_proj/kernel", LINEAR),
    Rule("model.norm.weight", "decoder/norm/scale", SAME),
    Rule("lm_head.weight", "decoder/lm_head/kernel", LINEAR),
)

IGNORED = tuple(
    re.compile(pattern)
    for pattern in (
        # The pooled head of the tower, which the region features don't use.
        re.escape(TOWER) + r"visual\.(trunk\.)?head\..+",
        # Derived from the head size; only old Llama checkpoints save it.
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        # open_clip's text tower.
        re.escape(TOWER) + r"(positional_embedding|text_projection|logit_scale|logit_bias|attn_mask)",
        re.escape(TOWER) + r"(token_embedding|ln_final|transformer\.resblocks\.\d+)\..+",
    )
)


def is_ignored(name: str) -> bool:
    """Whether a source may hold this tensor although no parameter comes from it."""
    return any(pattern.fullmatch(name) for pattern in IGNORED)


def torch_slots(shapes: Mapping[str, Shape]) -> dict[str, Slot]:
    """The tensors that make up the leaves `{path: shape}` of Osprey, see `slots_of`."""
    expanded = []
    for rule in RULES:
        for stage in range(4) if "{stage}" in rule.path else (0,):
            name, path = (text.replace("{stage}", str(stage)) for text in (rule.name, rule.path))
            expanded.append(Rule(name, path, rule.transform))
    return slots_of(shapes, expanded)


def slots_of(shapes: Mapping[str, Shape], rules: Iterable[Rule]) -> dict[str, Slot]:
    """The tensors that make up the leaves `{path: shape}`, by the names that the rules give them.

    Raises ValueError for a leaf that no rule writes.
    """
    rows: dict[str, tuple[str, Transform]] = {}
    for rule in rules:
        assert rule.path not in rows, f"two rows write {rule.path}"
        rows[rule.path] = rule.name, rule.transform
    if unknown := sorted(shapes.keys() - rows.keys()):
        raise ValueError(f"no conversion rule for parameters {', '.join(unknown)}")
    slots: dict[str, Slot] = {}
    for path, shape in shapes.items():
        name, transform = rows[path]
        stacked = "{index}" in name
        # The transform itself says which shape it takes: a broadcast scalar has one and no memory.
        view = np.broadcast_to(np.int8(0), shape[1:] if stacked else shape)
        torch_shape = transform.to_torch(view).shape
        for index in range(shape[0]) if stacked else (None,):
            full_name = name.replace("{index}", str(index))
            assert full_name not in slots, f"two rows read {full_name}"
            slots[full_name] = Slot(path, index, transform, torch_shape)
    return slots


def check_tensors(
    found: Mapping[str, Shape], slots: Mapping[str, Slot], *, ignored: Callable[[str], bool] = is_ignored
) -> None:
    """Raises a ValueError that lists missing (-), unknown (+) and misshapen (!) tensors."""
    faults = listed([f"- {name}" for name in slots if name not in found])
    faults += listed([f"+ {name}" for name in found if name not in slots and not ignored(name)])
    faults += listed(
        [
            f"! {name}: {found[name]}, expected {slot.torch_shape}"
            for name, slot in slots.items()
            if name in found and found[name] != slot.torch_shape
        ]
    )
    if faults:
        raise ValueError(
            "tensors don't fit the model; missing (-), unknown (+), of another shape (!):\n"
            + "\n".join(faults)
        )


def read_sizes(
    found: Mapping[str, Shape], fields: Mapping[str, Any], *, extractor: ExtractorConfig | None = None
) -> OspreyConfig:
    """The configuration of a model whose tensors have these shapes and whose `config.json` has these fields.

    `extractor` gives the sizes of an extractor that the source doesn't hold. The placeholders' ids are left
    at their defaults. Raises ValueError where a tensor that tells a size is missing or has too few axes,
    where `config.json` contradicts the tensors, and where it asks for what this decoder doesn't do.
    """
    check_supported(fields)
    _check_parts(found, with_extractor=extractor is None)
    gate, embedding = "model.layers.0.mlp.gate_proj.weight", "model.embed_tokens.weight"
    pooled, position = EXTRACTOR + "feat_linear.weight", EXTRACTOR + "mask_linear.layers.0.weight"
    convs = [
        _TRUNK + "stem.0.weight",
        *(f"{_TRUNK}stages.{stage}.downsample.1.weight" for stage in (1, 2, 3)),
    ]
    telling = dict.fromkeys(convs, 4) | {gate: 2, embedding: 2}
    telling |= {} if extractor else {pooled: 2, position: 2}
    if missing := [name for name in telling if name not in found]:
        raise ValueError(f"missing tensors, without which the sizes are unknown: {', '.join(missing)}")
    for name, rank in telling.items():
        if len(found[name]) != rank:
            raise ValueError(f"{name} has shape {found[name]}, expected {rank} axes")

    if extractor is None:
        cells = found[position][1]
        if math.isqrt(cells) ** 2 != cells:
            raise ValueError(f"{position} has shape {found[position]}: its inputs are not a square mask's")
        extractor = ExtractorConfig(dim=found[pooled][1], position_size=math.isqrt(cells))
    decoder = _read_decoder(found, fields, embedding=found[embedding], gate=found[gate])
    depths = tuple(
        count_layers(found, rf"{re.escape(_TRUNK)}stages\.{s}\.blocks\.(\d+)\..+") for s in range(4)
    )
    vision = VisionConfig(
        image_size=integer_field(fields, "image_size", VisionConfig.image_size),
        depths=depths,
        dims=tuple(found[name][0] for name in convs),
    )
    return OspreyConfig(vision=vision, extractor=extractor, decoder=decoder)


def check_supported(fields: Mapping[str, Any]) -> None:
    """Raises ValueError where `config.json` describes a model that would be computed wrongly."""
    if fields.get("tie_word_embeddings"):
        raise ValueError(
            "config.json: tie_word_embeddings is true, so there is no lm_head.weight; "
            "only untied heads are supported"
        )
    projector = fields.get("mm_projector_type", "mlp2x_gelu")
    if projector != "mlp2x_gelu":
        raise ValueError(f"config.json: mm_projector_type is {projector!r}, only 'mlp2x_gelu' is supported")
    if fields.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act is {fields['hidden_act']!r}, only 'silu' is supported")
    for key in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if fields.get(key):
            raise ValueError(
                f"config.json: {key} is true; prompts with such tokens around the image are not supported"
            )
    for key in ("rope_scaling", "rope_parameters"):
        rope = _rope_fields(fields, key)
        # transformers 5 gives the unscaled base under both names.
        if rope.get("rope_type", rope.get("type", "default")) != "default" or "factor" in rope:
            raise ValueError(f"config.json: {key} is {rope}, which is not supported")


def _check_parts(found: Mapping[str, Shape], *, with_extractor: bool) -> None:
    if not any(name.startswith(_TRUNK) for name in found):
        raise ValueError(
            f"missing the vision tower's tensors ({_TRUNK}…); "
            "give open_clip's file with --vision-tower open_clip_pytorch_model.bin"
        )
    if with_extractor and not any(name.startswith(EXTRACTOR) for name in found):
        raise ValueError(
            f"missing the mask extractor's tensors ({EXTRACTOR}…); "
            "to start stage 2 from a plain decoder, give its directory with --decoder"
        )


def _read_decoder(
    found: Mapping[str, Shape], fields: Mapping[str, Any], *, embedding: Shape, gate: Shape
) -> DecoderConfig:
    sizes = {
        "vocab_size": (embedding[0], "model.embed_tokens.weight"),
        "hidden_size": (embedding[1], "model.embed_tokens.weight"),
        "intermediate_size": (gate[0], "model.layers.0.mlp.gate_proj.weight"),
        "num_hidden_layers": (
            count_layers(found, r"model\.layers\.(\d+)\..+\.weight"),
            "the numbers of model.layers",
        ),
    }
    for key, (size, origin) in sizes.items():
        if integer_field(fields, key, size) != size:
            raise ValueError(f"config.json says {key} {fields[key]}, the tensors ({origin}) say {size}")
    num_heads = integer_field(fields, "num_attention_heads", 0)
    if not num_heads:
        raise ValueError("config.json has no num_attention_heads, which no tensor tells")
    rope = _rope_fields(fields, "rope_parameters") or _rope_fields(fields, "rope_scaling")
    return DecoderConfig(
        vocab_size=embedding[0],
        dim=embedding[1],
        ffn_dim=gate[0],
        num_layers=sizes["num_hidden_layers"][0],
        num_heads=num_heads,
        num_kv_heads=integer_field(fields, "num_key_value_heads", num_heads),
        head_dim=integer_field(fields, "head_dim", embedding[1] // num_heads),
        rope_theta=number_field(
            fields, "rope_theta", number_field(rope, "rope_theta", DecoderConfig.rope_theta)
        ),
        norm_eps=number_field(fields, "rms_norm_eps", DecoderConfig.norm_eps),
    )


def release_fields(config: OspreyConfig, *, torch_dtype: str, bos_id: int, eos_id: int) -> dict[str, Any]:
    """The release's kind of `config.json`, with a key of ours only where a size isn't the original's."""
    decoder, vision = config.decoder, config.vision
    fields = {
        "architectures": ["OspreyLlamaForCausalLM"],
        "model_type": "osprey",
        "hidden_act": "silu",
        "hidden_size": decoder.dim,
        "intermediate_size": decoder.ffn_dim,
        "vocab_size": decoder.vocab_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "rms_norm_eps": decoder.norm_eps,
        "rope_scaling": None,
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": 0,
        "torch_dtype": torch_dtype,
        "transformers_version": "4.31.0",
        "mm_vision_tower": "open_clip_pytorch_model.bin",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": vision.dims[2],
        "use_mm_proj": True,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }
    if decoder.rope_theta != DecoderConfig.rope_theta:
        fields["rope_theta"] = decoder.rope_theta
    if decoder.head_dim * decoder.num_heads != decoder.dim:
        fields["head_dim"] = decoder.head_dim
    if vision.image_size != VisionConfig.image_size:
        fields["image_size"] = vision.image_size
    return fields


def tokenizer_files(*, sentencepiece: bool) -> dict[str, dict[str, Any]]:
    """The release's JSON files beside its tokenizer, by name; without them transformers can't open it."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings: dict[str, Any] = {"model_max_length": 2048, "padding_side": "right"}
    if sentencepiece:
        settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
        settings |= {"add_bos_token": True, "add_eos_token": False}
    else:
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {
        "tokenizer_config.json": special | settings,
        "special_tokens_map.json": special | {"pad_token": "<unk>"},
    }


def with_placeholders(config: OspreyConfig, *, mask_id: int, position_id: int) -> OspreyConfig:
    """The configuration with the tokenizer's ids of `<mask>` and `<pos>`.

    Raises ValueError where ordinary ids below them have no row in the embedding table.
    """
    rows = config.decoder.vocab_size
    if min(mask_id, position_id) > rows:
        raise ValueError(
            f"the tokenizer has {min(mask_id, position_id)} pieces before <mask> and <pos>, "
            f"but model.embed_tokens.weight only {rows} rows"
        )
    return dataclasses.replace(config, mask_token_id=mask_id, position_token_id=position_id)


def count_layers(found: Mapping[str, Shape], pattern: str) -> int:
    """One more than the largest number in the first group of the names that match."""
    numbers = (int(match[1]) for name in found if (match := re.fullmatch(pattern, name)))
    return max(numbers, default=-1) + 1


def integer_field(fields: Mapping[str, Any], key: str, default: int) -> int:
    """A field of `config.json`, the default where it is missing or null; ValueError for other values."""
    value = fields.get(key)
    if value is None:
        return default
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ValueError(f"config.json: {key} must be a positive integer, got {value!r}")


def number_field(fields: Mapping[str, Any], key: str, default: float) -> float:
    """The same for a number above zero."""
    value = fields.get(key)
    if value is None:
        return default
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise ValueError(f"config.json: {key} must be a positive number, got {value!r}")


def _rope_fields(fields: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = fields.get(key)
    if value is None or isinstance(value, Mapping):
        return value or {}
    raise ValueError(f"config.json: {key} must be a mapping, got {value!r}")
