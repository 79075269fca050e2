"""The model's configuration: one tree of frozen dataclasses, with presets by name."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

Config = TypeVar("Config")


def check_positive(config: Any) -> None:
    """Raises ValueError that names the first field with a number in it that isn't above zero."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not all(number > 0 for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{field.name} must be positive, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """ConvNeXt-CLIP trunk. The defaults are `convnext_large_d_320`."""

    image_size: int = 512
    """Side of the square input in pixels; a multiple of 32."""
    depths: tuple[int, ...] = (3, 3, 27, 3)
    """Blocks per stage; there are four stages, whose outputs are res2, res3, res4 and res5."""
    dims: tuple[int, ...] = (192, 384, 768, 1536)
    """Channels per stage."""
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if len(self.depths) != 4 or len(self.dims) != 4:
            raise ValueError(f"depths and dims name four stages each, got {self.depths} and {self.dims}")
        check_positive(self)
        if self.image_size % 32:
            raise ValueError(f"image_size must be a multiple of 32, got {self.image_size}")

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Side of res2, res3, res4 and res5, in feature rows."""
        return tuple(self.image_size // stride for stride in (4, 8, 16, 32))

    @property
    def num_image_tokens(self) -> int:
        """Tokens that one image occupies in a sequence: the positions of res4."""
        return self.level_sizes[2] ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractorConfig:
    """Mask-aware extractor."""

    dim: int = 1024
    """Width of the level projections and of the position MLP."""
    position_size: int = 112
    """Side of the position mask in pixels."""

    def __post_init__(self) -> None:
        check_positive(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Llama-style decoder. The defaults are Vicuna-7B v1.5."""

    vocab_size: int = 32000
    """Rows of the embedding table; the region placeholders' ids need no row."""
    dim: int = 4096
    ffn_dim: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_positive(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OspreyConfig:
    """The whole model: tower, extractor, projector (two layers, GELU) and decoder."""

    vision: VisionConfig = VisionConfig()
    extractor: ExtractorConfig = ExtractorConfig()
    decoder: DecoderConfig = DecoderConfig()
    mask_token_id: int = 32000
    """Id of `<mask>`, whose embedding is the region's mask token."""
    position_token_id: int = 32001
    """Id of `<pos>`, whose embedding is the region's position token."""

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain JSON-able values; `from_config` is the inverse."""
        return dataclasses.asdict(self)


def tiny() -> OspreyConfig:
    """About three million parameters on 96-pixel images: trains on a laptop, for demos and tests."""
    return OspreyConfig(
        vision=VisionConfig(image_size=96, depths=(2, 2, 2, 1), dims=(32, 64, 128, 192)),
        extractor=ExtractorConfig(dim=128, position_size=112),
        decoder=DecoderConfig(
            vocab_size=512, dim=128, ffn_dim=256, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=32
        ),
        mask_token_id=512,
        position_token_id=513,
    )


def osprey_7b() -> OspreyConfig:
    """The release: ConvNeXt-Large CLIP tower at 512 px, Vicuna-7B v1.5 decoder."""
    return OspreyConfig()


PRESETS = {"tiny": tiny, "osprey_7b": osprey_7b}


def preset(name: str) -> OspreyConfig:
    """The configuration called `name`; a ValueError lists the names there are."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; choose one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()


def from_config(values: Mapping[str, Any]) -> OspreyConfig:
    """Builds the tree from nested mappings, such as a parsed `config.json`; see `build`."""
    return build(OspreyConfig, values)


def build(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Builds a tree of frozen dataclasses from nested mappings.

    Missing keys take their defaults. Raises a ValueError that names every unknown key, or the first
    value of a wrong type, by its dotted path.
    """
    unknown = sorted(_unknown_keys(cls, values, ""))
    if unknown:
        raise ValueError(f"unknown config keys: {', '.join(unknown)}")
    return _build(cls, values, "")


def _unknown_keys(cls: type, values: Mapping[str, Any], prefix: str) -> list[str]:
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    found = []
    for key, value in values.items():
        if key not in fields:
            found.append(prefix + key)
        elif dataclasses.is_dataclass(fields[key]) and isinstance(value, Mapping):
            found += _unknown_keys(typing.cast(type, fields[key]), value, f"{prefix}{key}.")
    return found


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    return cls(**{key: _value(fields[key], value, prefix + key) for key, value in values.items()})


def _value(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{path} must be a mapping, got {value!r}")
        return _build(typing.cast(type, kind), value, f"{path}.")
    if isinstance(kind, types.GenericAlias):
        if not isinstance(value, list | tuple) or not all(_is_int(item) for item in value):
            raise ValueError(f"{path} must be a list of integers, got {value!r}")
        return tuple(value)
    if kind is int and not _is_int(value):
        raise ValueError(f"{path} must be an integer, got {value!r}")
    if kind is float and not (_is_int(value) or isinstance(value, float)):
        raise ValueError(f"{path} must be a number, got {value!r}")
    return kind(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
