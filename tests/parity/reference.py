"""A PyTorch Osprey for parity tests, put together out of torch and transformers' own ConvNeXt and Llama.

It follows SPEC (what the original computes) and shares no code with `osprey_jax`, so that an agreement of the
two means something. Weights are random and scaled such that every part shows in the logits. The writers below
lay the same weights out on disk as the public files do: the release, open_clip's tower, Vicuna, stage 1's
projector.

Reference: Yuan et al., Osprey: Pixel Understanding with Visual Instruction Tuning, arXiv 2312.10032.
Axes: B batch, T tokens, D width, V vocabulary, R regions, C channels, Y X feature rows and columns; h w are a
mask's or an image's own rows and columns, S the side of the tower's input.
"""

import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextModel, LlamaConfig, LlamaForCausalLM

Image = np.ndarray | None  # uint8 (h, w, 3)
Masks = np.ndarray | Tensor | None  # bool or float (R, h, w)

IMAGE_ID = -200
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
VISION_PREFIX = "model.vision_tower.vision_tower."
TRUNK_PREFIX = VISION_PREFIX + "visual.trunk."
UNUSED = re.compile(r"visual\.trunk\.head\.|visual\.head\.|\.rotary_emb\.inv_freq$")

# Rewritten in this order, from the names of this module to those of the release.
_RENAMES = (
    (r"^llama\.", ""),
    (r"^projector\.", "model.mm_projector."),
    (r"^convnext\.embeddings\.patch_embeddings\.", TRUNK_PREFIX + "stem.0."),
    (r"^convnext\.embeddings\.layernorm\.", TRUNK_PREFIX + "stem.1."),
    (r"^convnext\.encoder\.", TRUNK_PREFIX),
    (r"\.downsampling_layer\.", ".downsample."),
    (r"(stages\.\d+)\.layers\.", r"\1.blocks."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"(blocks\.\d+)\.layernorm\.", r"\1.norm."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.layer_scale_parameter$", ".gamma"),
)


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """Sizes of a reference model; the defaults build in a second."""

    depths: tuple[int, ...] = (1, 1, 2, 1)
    dims: tuple[int, ...] = (16, 32, 48, 64)
    extractor_dim: int = 24
    position_size: int = 112
    image_size: int = 512
    vocab_size: int = 32000
    dim: int = 32
    ffn_dim: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int | None = None  # dim / num_heads, as in every released model
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @property
    def mask_id(self) -> int:
        """Id of `<mask>`: the first one past the embedding table."""
        return self.vocab_size

    @property
    def position_id(self) -> int:
        """Id of `<pos>`: the second one past the embedding table."""
        return self.vocab_size + 1


class _MaskExtractor(nn.Module):
    """Parameters of the mask-aware extractor, under the release's names."""

    def __init__(self, config: ReferenceConfig):
        super().__init__()
        width = config.extractor_dim
        self.res2, self.res3, self.res4, self.res5 = (nn.Linear(size, width) for size in config.dims)
        self.feat_linear = nn.Linear(width, config.dim)
        sizes = (config.position_size**2, width, width, config.dim)
        self.mask_linear = nn.Module()
        self.mask_linear.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))


class OspreyReference(nn.Module):
    """Osprey with random float32 weights; `forward` has gradients, `logits` and `greedy` keep no graph.

    Under `torch.device("meta")` it has shapes and no weights, so one of 7 billion parameters costs nothing.
    """

    def __init__(self, config: ReferenceConfig, seed: int = 0):
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # the global generator stays where the caller left it
            sizes = {"depths": list(config.depths), "hidden_sizes": list(config.dims)}
            self.convnext = ConvNextModel(ConvNextConfig(**sizes, hidden_act="gelu"))
            self.convnext.layernorm = nn.Identity()  # only for pooled features, which Osprey doesn't use
            first, last = nn.Linear(config.dims[2], config.dim), nn.Linear(config.dim, config.dim)
            self.projector = nn.Sequential(first, nn.GELU(), last)
            self.mask_extractor = _MaskExtractor(config)
            rest = {"rope_theta": config.rope_theta, "attn_implementation": "eager"}
            self.llama = LlamaForCausalLM(LlamaConfig(**_llama_fields(config), **rest))
        self._randomise(seed)
        self.eval()

    @torch.no_grad()
    def _randomise(self, seed: int) -> None:
        """Draws all weights: unit gain mostly, no bias at zero, no norm at one, `gamma` in 0.1 to 0.5."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in sorted(self.named_parameters()):
            if name.endswith("layer_scale_parameter"):
                weight.uniform_(0.1, 0.5, generator=generator)
            elif name.endswith("embed_tokens.weight"):
                weight.normal_(0.0, 1.0, generator=generator)
            elif weight.ndim > 1:
                # Sharper attention, so that one region token shows among a thousand image tokens.
                gain = 1.6 if re.search(r"\.(q|k)_proj\.|lm_head|mask_extractor", name) else 1.0
                weight.normal_(0.0, gain * weight[0].numel() ** -0.5, generator=generator)
            elif name.endswith("weight"):
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.uniform_(-0.5, 0.5, generator=generator)

    def preprocess(self, image: np.ndarray) -> Tensor:
        """uint8 RGB (h, w, 3) to normalised pixels (1, 3, S, S): bicubic to the short edge, then bilinear."""
        size = self.config.image_size
        height, width = image.shape[:2]
        long = int(size * max(height, width) / min(height, width))
        new_size = (size, long) if width <= height else (long, size)
        resized = np.array(PIL.Image.fromarray(image).resize(new_size, PIL.Image.Resampling.BICUBIC))
        pixels = torch.from_numpy(resized).float() / 255.0
        pixels = (pixels - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
        return _resize(pixels.permute(2, 0, 1)[None], (size, size))

    def tower(self, pixels: Tensor) -> list[Tensor]:
        """Pixels (B, 3, S, S) to res2 … res5, each (B, C, Y, X), without a final norm."""
        features = self.convnext.embeddings(pixels)
        levels = []
        for stage in self.convnext.encoder.stages:
            features = stage(features)
            levels.append(features)
        return levels

    def project(self, res4: Tensor) -> Tensor:
        """res4 (B, C, Y, X) to image tokens (B, Y·X, D), row-major."""
        return self.projector(res4.flatten(2).transpose(1, 2))

    def pool(self, features: list[Tensor], masks: Tensor) -> list[Tensor]:
        """Means of each level (1, C, Y, X) over masks (R, h, w): a list of (R, C); an empty level gives 0."""
        pooled = []
        for level in features:
            inside = (_resize(masks[:, None], level.shape[-2:]) > 0).to(level.dtype)
            total = (level * inside).sum(dim=(2, 3))
            pooled.append(total / (inside.sum(dim=(2, 3)) + 1e-8))
        return pooled

    def extract(self, features: list[Tensor], masks: Tensor) -> tuple[Tensor, Tensor]:
        """Levels (1, C, Y, X) and float masks (R, h, w) to mask tokens and position tokens, each (R, D)."""
        extractor, size = self.mask_extractor, self.config.position_size
        linears = (extractor.res2, extractor.res3, extractor.res4, extractor.res5)
        pooled = self.pool(features, masks)
        mask_tokens = extractor.feat_linear(sum(f(x) for f, x in zip(linears, pooled, strict=True)))
        first, second, third = extractor.mask_linear.layers
        position = _resize(masks[:, None], (size, size)).flatten(1)
        return mask_tokens, third(F.relu(second(F.relu(first(position)))))

    def splice(
        self, ids: list[int], image_tokens: Tensor, mask_tokens: Tensor, position_tokens: Tensor,
        mask_id: int, position_id: int,
    ) -> Tensor:  # fmt: skip
        """Embeds ids to (1, T, D): -200 becomes all image tokens, placeholder k the token of region k.

        Raises ValueError where the number of `mask_id` or `position_id` differs from the number of regions.
        """
        for placeholder, tokens in ((mask_id, mask_tokens), (position_id, position_tokens)):
            if (count := ids.count(placeholder)) != len(tokens):
                raise ValueError(f"{count} ids {placeholder} in the prompt, {len(tokens)} regions")
        regions = {mask_id: iter(mask_tokens), position_id: iter(position_tokens)}
        pieces = []
        for token in ids:
            if token == IMAGE_ID:
                pieces.append(image_tokens.reshape(-1, self.config.dim))
            elif token in regions:
                pieces.append(next(regions[token])[None])
            else:
                pieces.append(self.llama.model.embed_tokens(torch.tensor([token])))
        return torch.cat(pieces)[None]

    def embed(self, image: Image, masks: Masks, ids: list[int]) -> Tensor:
        """Decoder input (1, T, D) of a prompt; without an image or masks, for prompts that name none."""
        image_tokens = mask_tokens = position_tokens = torch.zeros(0, self.config.dim)
        if image is not None:
            features = self.tower(self.preprocess(image))
            image_tokens = self.project(features[2])
            if masks is not None and len(masks):
                mask_tokens, position_tokens = self.extract(features, torch.as_tensor(masks).float())
        places = self.config.mask_id, self.config.position_id
        return self.splice(ids, image_tokens, mask_tokens, position_tokens, *places)

    def forward(self, image: Image, masks: Masks, ids: list[int]) -> Tensor:
        """uint8 image (h, w, 3), bool masks (R, h, w) and a prompt to logits (T, V), with gradients."""
        return self.llama(inputs_embeds=self.embed(image, masks, ids), use_cache=False).logits[0]

    @torch.no_grad()
    def logits(self, image: Image, masks: Masks, ids: list[int]) -> Tensor:
        """`forward` without gradients; T counts the image tokens."""
        return self.forward(image, masks, ids)

    @torch.no_grad()
    def greedy(
        self, image: Image, masks: Masks, ids: list[int], max_new_tokens: int, eos_id: int = 2
    ) -> list[int]:
        """Most likely continuation of a prompt, at most `max_new_tokens` ids; ends before `eos_id`."""
        output = self.llama(inputs_embeds=self.embed(image, masks, ids), use_cache=True)
        answer: list[int] = []
        while len(answer) < max_new_tokens:
            token = int(output.logits[0, -1].argmax())
            if token == eos_id:
                break
            answer.append(token)
            output = self.llama(input_ids=torch.tensor([[token]]), cache=output.cache, use_cache=True)
        return answer

    def release_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters themselves, with their gradients, under the release's names."""
        return {_release_name(name): weight for name, weight in self.named_parameters()}

    def release_state_dict(self) -> dict[str, Tensor]:
        """All weights under the release's names, its unused tensors included."""
        tensors: dict[str, Tensor] = {k: v.detach() for k, v in self.release_parameters().items()}
        width, head_dim = self.config.dims[-1], self.llama.config.head_dim
        generator = torch.Generator().manual_seed(1)
        unused = {"trunk.head.norm.weight": (width,), "trunk.head.norm.bias": (width,)}
        unused |= {"head.mlp.fc1.weight": (width, width), "head.mlp.fc1.bias": (width,)}
        unused |= {"head.mlp.fc2.weight": (width // 2, width)}
        for name, shape in unused.items():
            tensors[f"{VISION_PREFIX}visual.{name}"] = torch.randn(shape, generator=generator)
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        for layer in range(self.config.num_layers):
            name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            tensors[name] = 1.0 / self.config.rope_theta**exponent
        return tensors

    @torch.no_grad()
    def load_release_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes all weights from the release's names, whatever their dtype; unused tensors may be absent.

        Raises ValueError, and loads nothing, where names are missing or unknown or a shape differs.
        """
        targets = self.release_parameters()
        used = {name: tensor for name, tensor in tensors.items() if not UNUSED.search(name)}
        faults = [f"- {name}" for name in sorted(targets.keys() - used.keys())]
        faults += [f"+ {name}" for name in sorted(used.keys() - targets.keys())]
        for name in sorted(targets.keys() & used.keys()):
            if used[name].shape != targets[name].shape:
                faults.append(f"! {name}: {tuple(used[name].shape)}, expected {tuple(targets[name].shape)}")
        if faults:
            raise ValueError("missing (-), unknown (+), of another shape (!):\n" + "\n".join(faults))
        for name, weight in targets.items():
            weight.copy_(used[name])


def _release_name(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, half-pixel centres, no antialiasing: (B, C, h, w) to (B, C, *size)."""
    return F.interpolate(images, size=tuple(size), mode="bilinear", align_corners=False)


def _llama_fields(config: ReferenceConfig) -> dict[str, Any]:
    """Llama's own fields as transformers 4.31 wrote them, `rope_theta` apart."""
    fields = {"hidden_size": config.dim, "intermediate_size": config.ffn_dim, "vocab_size": config.vocab_size}
    fields |= {"num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads}
    fields |= {"num_hidden_layers": config.num_layers, "rms_norm_eps": config.norm_eps, "hidden_act": "silu"}
    fields |= {"max_position_embeddings": 4096, "initializer_range": 0.02, "pretraining_tp": 1}
    fields |= {"head_dim": config.head_dim} if config.head_dim else {}
    fields |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return fields | {"tie_word_embeddings": False, "use_cache": True}


def write_release(
    reference: OspreyReference, directory: Path | str, *, tokenizer_model: Path | str | None,
    num_shards: int = 2, safetensors: bool = False, dtype: torch.dtype | None = None, with_tower: bool = True,
) -> None:  # fmt: skip
    """Writes a directory laid out as the release: `config.json`, shards, their index and a tokenizer.

    `dtype` casts all but `inv_freq`; `with_tower=False` leaves out everything of the tower, its head
    included; without `tokenizer_model` no tokenizer is written.
    """
    fields = {
        "architectures": ["OspreyLlamaForCausalLM"],
        "model_type": "osprey",
        "image_aspect_ratio": "pad",
    }
    fields |= {"mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "open_clip_pytorch_model.bin"}
    fields |= {"mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_layer": -2}
    fields |= {"freeze_mm_mlp_adapter": False, "tune_mm_mlp_adapter": False, "use_mm_proj": True}
    tensors = reference.release_state_dict()
    if not with_tower:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(VISION_PREFIX)}
    directory = _write_config(reference, directory, fields, tokenizer_model, dtype)
    _write_shards(tensors, directory, num_shards, safetensors, dtype)


def write_vicuna(
    reference: OspreyReference, directory: Path | str, *, tokenizer_model: Path | str | None,
    num_shards: int = 1, dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Writes the decoder alone as a Llama checkpoint, which is where stage 2 starts from."""
    others = (VISION_PREFIX, "model.mm_projector.", "mask_extractor.")
    tensors = {k: v for k, v in reference.release_state_dict().items() if not k.startswith(others)}
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    directory = _write_config(reference, directory, fields, tokenizer_model, dtype)
    _write_shards(tensors, directory, num_shards, False, dtype)


def write_open_clip(reference: OspreyReference, path: Path | str) -> None:
    """Writes open_clip's file of the tower, with its head and a few tensors of a text tower, all unused."""
    release, start = reference.release_state_dict(), len(VISION_PREFIX)
    tensors = {k[start:]: v.clone() for k, v in release.items() if k.startswith(VISION_PREFIX)}
    text = {"positional_embedding": (7, 8), "text_projection": (8, 8), "logit_scale": ()}
    text |= {"token_embedding.weight": (11, 8), "ln_final.weight": (8,), "ln_final.bias": (8,)}
    block = {
        "ln_1.weight": (8,),
        "ln_1.bias": (8,),
        "attn.in_proj_weight": (24, 8),
        "attn.in_proj_bias": (24,),
    }
    text |= {f"transformer.resblocks.0.{name}": shape for name, shape in block.items()}
    torch.save(tensors | {name: torch.ones(shape) for name, shape in text.items()}, path)


def write_projector(reference: OspreyReference, path: Path | str) -> None:
    """Writes the projector alone, as stage 1 leaves it."""
    release = reference.release_state_dict()
    torch.save({k: v.clone() for k, v in release.items() if k.startswith("model.mm_projector.")}, path)


def read_shards(directory: Path | str) -> dict[str, Tensor]:
    """Reads all tensors of a checkpoint directory: through its index, else from its one file."""
    directory = Path(directory)
    for base in ("pytorch_model.bin", "model.safetensors"):
        index = directory / f"{base}.index.json"
        if index.exists():
            weight_map = json.loads(index.read_text())["weight_map"]
            shards = {file: _read_shard(directory / file) for file in set(weight_map.values())}
            return {name: shards[file][name] for name, file in weight_map.items()}
        if (directory / base).exists():
            return _read_shard(directory / base)
    raise ValueError(f"no weights in {directory}")


def _read_shard(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _write_config(
    reference: OspreyReference, directory: Path | str, fields: dict[str, Any],
    tokenizer_model: Path | str | None, dtype: torch.dtype | None,
) -> Path:  # fmt: skip
    """Writes `config.json` and the tokenizer's files as transformers 4.31 laid them out."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    fields = (
        fields | _llama_fields(reference.config) | {"rope_scaling": None, "transformers_version": "4.31.0"}
    )
    fields["torch_dtype"] = str(dtype or torch.float32).removeprefix("torch.")
    if reference.config.rope_theta != 10000.0:  # transformers 4.31 had no such field yet
        fields["rope_theta"] = reference.config.rope_theta
    _write_json(directory / "config.json", fields)
    if tokenizer_model is not None:
        shutil.copyfile(tokenizer_model, directory / "tokenizer.model")
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        _write_json(directory / "special_tokens_map.json", special | {"pad_token": "<unk>"})
        settings = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 2048, "padding_side": "right"}
        settings |= {"add_bos_token": True, "add_eos_token": False, "legacy": False}
        _write_json(directory / "tokenizer_config.json", special | settings)
    return directory


def _write_shards(
    tensors: dict[str, Tensor], directory: Path, num_shards: int, safetensors: bool, dtype: torch.dtype | None
) -> None:
    """Writes the weights as Hugging Face does: one shard alone has no index."""
    kept = {k: v.to(v.dtype if k.endswith("inv_freq") else dtype or v.dtype) for k, v in tensors.items()}
    stem, suffix = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    names, weight_map = list(kept), {}
    for shard in range(num_shards):
        part = names[len(names) * shard // num_shards : len(names) * (shard + 1) // num_shards]
        number = f"-{shard + 1:05d}-of-{num_shards:05d}" if num_shards > 1 else ""
        path = directory / f"{stem}{number}.{suffix}"
        weight_map |= dict.fromkeys(part, path.name)
        values = {name: kept[name].contiguous() for name in part}
        if safetensors:
            save_file(values, path, metadata={"format": "pt"})
        else:
            torch.save(values, path)
    if num_shards > 1:
        size = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(directory / f"{stem}.{suffix}.index.json", index)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
