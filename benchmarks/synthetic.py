"""Models with random weights, of named sizes, and a scene to ask them about."""

import tempfile
from pathlib import Path

import jax
import numpy as np

from osprey_jax import quantize
from osprey_jax.checkpoint import flatten, unflatten
from osprey_jax.config import DecoderConfig, OspreyConfig, VisionConfig, osprey_7b
from osprey_jax.models.osprey import abstract_params, init_params
from osprey_jax.prompt import Tokenizer
from osprey_jax.typing import Params

SIZES = {
    # ConvNeXt-L at 512 pixels and a decoder of 0.17 billion parameters, embeddings included.
    "small": OspreyConfig(
        decoder=DecoderConfig(dim=1024, ffn_dim=2752, num_layers=8, num_heads=8, num_kv_heads=8)
    ),
    "7b": osprey_7b(),
    # To see in a minute whether this file works.
    "tiny": OspreyConfig(
        vision=VisionConfig(image_size=128, depths=(1, 1, 2, 1), dims=(16, 32, 48, 64)),
        decoder=DecoderConfig(dim=64, ffn_dim=128, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16),
    ),
}


def load_tokenizer(directory: str | None) -> Tokenizer:
    """A real one of 32,000 pieces: from a directory, or the one that mistral-common carries."""
    if directory is not None:
        return Tokenizer.load(directory)
    import mistral_common

    with tempfile.TemporaryDirectory() as copy:
        source = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
        (Path(copy) / "tokenizer.model").write_bytes(source.read_bytes())
        return Tokenizer.load(copy)


def random_params(config: OspreyConfig, dtype: str, *, eos_id: int, quantization: str | None) -> Params:
    """Fresh parameters made on the device, the extractor's in float32, the others of `dtype`.

    The head gives the logit 0 to `eos_id`, below the largest of the others. `quantization` is as in
    `Osprey`.
    """

    @jax.jit
    def make(key: jax.Array) -> Params:
        params = init_params(config, key)
        head = params["decoder"]["lm_head"]["kernel"]
        params["decoder"]["lm_head"]["kernel"] = head.at[:, eos_id].set(0.0)
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        return {**cast, "extractor": params["extractor"]}

    leaves = flatten(make(jax.random.key(0)))
    if quantization is None:
        return unflatten(leaves)
    targets = flatten(abstract_params(config, dtype, quantization=quantization))
    for path in list(leaves):
        if (scale := quantize.scale_path(path)) in targets:
            leaves[path], leaves[scale] = quantize.quantize_leaf(leaves[path], targets[path], targets[scale])
    return unflatten(leaves)


def synthetic_image(rng: np.random.Generator) -> np.ndarray:
    """A `(480, 640, 3)` uint8 picture of blurred blocks and noise."""
    blocks = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((80, 80, 1)))
    return np.clip(blocks + rng.normal(0, 12, blocks.shape), 0, 255).astype(np.uint8)


def ellipses(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Random ellipses as `(count, height, width)` bool masks."""
    rows, columns = np.mgrid[:height, :width]
    y, x = rng.uniform(0.1, 0.9, (2, count)) * np.array([[height], [width]])
    b, a = rng.uniform(0.03, 0.3, (2, count)) * np.array([[height], [width]])
    return np.stack([((rows - y[i]) / b[i]) ** 2 + ((columns - x[i]) / a[i]) ** 2 < 1 for i in range(count)])
