"""SAM's configuration: one tree of frozen dataclasses, with presets by name."""

import dataclasses
from typing import Any

from osprey_jax.config import check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The image encoder, a ViT with windows. The defaults are those of ViT-B."""

    image_size: int = 1024
    """Side of the square input in pixels."""
    patch_size: int = 16
    dim: int = 768
    ffn_dim: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    window_size: int = 14
    """Side in patches of the windows that most layers attend within."""
    global_layers: tuple[int, ...] = (2, 5, 8, 11)
    """Layers that attend over the whole image, from 0."""
    out_dim: int = 256
    """Channels of an image's embedding, which are also those of prompts and of the decoder."""
    norm_eps: float = 1e-6
    """Of the norms inside the blocks; the others' is fixed."""

    def __post_init__(self) -> None:
        check_positive(dataclasses.replace(self, global_layers=()) if self.global_layers else self)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size})"
            )
        if self.dim % self.num_heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of num_heads ({self.num_heads})")
        if self.out_dim % 8:
            raise ValueError(f"out_dim must be a multiple of 8, got {self.out_dim}")
        if any(not 0 <= layer < self.num_layers for layer in self.global_layers):
            raise ValueError(f"global_layers must be of {self.num_layers} layers, got {self.global_layers}")

    @property
    def grid_size(self) -> int:
        """Side of an image's embedding, in patches."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.dim // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Prompt encoder and mask decoder, whose width is the encoder's `out_dim`."""

    num_layers: int = 2
    num_heads: int = 8
    ffn_dim: int = 2048
    attention_reduction: int = 2
    """What the width is divided by between tokens and image."""
    num_masks: int = 3
    """Masks for an ambiguous prompt; there is one more for a clear one."""
    iou_dim: int = 256
    iou_layers: int = 3
    mask_channels: int = 16
    """Channels of a mask prompt on its way to the embedding's width."""
    norm_eps: float = 1e-5
    """Of the norms inside the layers; transformers has 1e-6 there, the original torch's default."""

    def __post_init__(self) -> None:
        check_positive(self)
        if self.iou_layers < 2:
            raise ValueError(f"iou_layers must be at least 2, got {self.iou_layers}")
        if self.mask_channels % 4:
            raise ValueError(f"mask_channels must be a multiple of 4, got {self.mask_channels}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamConfig:
    """The whole model."""

    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()

    def __post_init__(self) -> None:
        dim, decoder = self.encoder.out_dim, self.decoder
        if dim % (decoder.num_heads * decoder.attention_reduction):
            raise ValueError(
                f"the encoder's out_dim ({dim}) must be a multiple of the decoder's num_heads times "
                f"attention_reduction ({decoder.num_heads} x {decoder.attention_reduction})"
            )

    @property
    def mask_size(self) -> int:
        """Side of predicted masks' logits, and of mask prompts."""
        return 4 * self.encoder.grid_size

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain JSON-able values; `osprey_jax.config.build` is the inverse."""
        return dataclasses.asdict(self)


def vit_b() -> SamConfig:
    """The release's `sam_vit_b_01ec64.pth`, which Osprey's demo uses."""
    return SamConfig()


def vit_l() -> SamConfig:
    """The release's `sam_vit_l_0b3195.pth`."""
    encoder = EncoderConfig(
        dim=1024, ffn_dim=4096, num_layers=24, num_heads=16, global_layers=(5, 11, 17, 23)
    )
    return SamConfig(encoder=encoder)


def vit_h() -> SamConfig:
    """The release's `sam_vit_h_4b8939.pth`."""
    encoder = EncoderConfig(
        dim=1280, ffn_dim=5120, num_layers=32, num_heads=16, global_layers=(7, 15, 23, 31)
    )
    return SamConfig(encoder=encoder)


def tiny() -> SamConfig:
    """About one million parameters on 96-pixel images: trains on a laptop, for demos and tests."""
    return SamConfig(
        encoder=EncoderConfig(
            image_size=96,
            patch_size=8,
            dim=128,
            ffn_dim=512,
            num_layers=4,
            num_heads=4,
            window_size=6,
            global_layers=(1, 3),
            out_dim=64,
        ),
        decoder=DecoderConfig(num_heads=4, ffn_dim=256, iou_dim=64),
    )


PRESETS = {"tiny": tiny, "vit_b": vit_b, "vit_l": vit_l, "vit_h": vit_h}
