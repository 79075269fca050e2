"""`Sam`: an image once, then points, boxes or masks about it; masks out, which stay on the device."""

from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from osprey_jax.compilation_cache import use_compilation_cache
from osprey_jax.image import ImageLike, load_image
from osprey_jax.sam import files
from osprey_jax.sam.config import SamConfig
from osprey_jax.sam.network import SamNetwork
from osprey_jax.sam.prompt_places import encode_prompts
from osprey_jax.sam.surface import masks_of, surface
from osprey_jax.sam.transforms import Frame, frame, preprocess
from osprey_jax.typing import Array, ArrayLike, Bool, Float, Int, Params

MAX_PROMPTS = 64
"""Prompts that are decoded at a time."""


class Embedding(NamedTuple):
    """What `Sam.encode` makes of an image."""

    features: Float[Array, "Y X D"]
    where: Frame


class Prediction(NamedTuple):
    """Masks for `N` prompts, on the device; `M` is 3 with `multimask`, otherwise 1."""

    masks: Bool[Array, "N M h w"]
    iou: Float[Array, "N M"]
    """Each mask's intersection over union with the truth, as the model expects it."""
    logits: Float[Array, "N M Y X"]
    """Of `mask_size`: `logits[:, m]` are mask prompts."""


class Sam:
    """A promptable segmenter, ready to use.

    Methods raise ValueError (FileNotFoundError for a path that isn't there) that says what of their
    arguments is wrong.
    """

    def __init__(self, config: SamConfig, params: Params, *, dtype: str = "float32"):
        """`params` as `sam.network.init_params` makes them; `dtype` is what is computed in."""
        self.config, self.params = config, jax.device_put(params)
        self.network = SamNetwork(config, jnp.dtype(dtype))

    @classmethod
    def load(cls, directory: Path | str, dtype: str = "float32") -> "Sam":
        """Loads a checkpoint made by `convert_torch_ckpt.py --sam` or by training.

        `dtype`, "float32" or "bfloat16", is that of parameters and arithmetic. What is compiled from then on
        is kept for other processes: see `compilation_cache`.
        """
        use_compilation_cache()
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
        config, params = files.load(directory, dtype)
        return cls(config, params, dtype=dtype)

    def encode(self, image: ImageLike) -> Embedding:
        """The embedding of an image (a path, a Pillow image or an `(h, w, 3)` uint8 array)."""
        picture, side = load_image(image), self.config.encoder.image_size
        pixels = preprocess(picture, side=side)
        [features] = _encode(self.network, self.params, pixels[None])
        return Embedding(features, frame((picture.shape[0], picture.shape[1]), side))

    def predict(
        self,
        embedding: Embedding,
        *,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        boxes: ArrayLike | None = None,
        masks: ArrayLike | None = None,
        multimask: bool = True,
    ) -> Prediction:
        """Masks for `N` prompts about an image, each of points, a box, a mask or several of them.

        Args:
          embedding: the image's, from `encode`.
          points: `(N, P, 2)`, x and y in pixels of the image.
          labels: `(N, P)`, for each point 1 if it is inside of what is meant, 0 if outside, -1 for none,
            where prompts have unequally many. All 1 by default.
          boxes: `(N, 4)`, x0, y0, x1 and y1 in pixels of the image.
          masks: `(N, Y, X)` logits of a prediction before.
          multimask: three masks for each prompt, from parts to wholes: for a single point, which may mean
            several things. Otherwise one.
        """
        config = self.config
        places, kinds, dense = encode_prompts(
            embedding.where,
            points=points,
            labels=labels,
            boxes=boxes,
            masks=masks,
            mask_size=config.mask_size,
        )
        at, size = surface(embedding.where, config), embedding.where.size
        parts = []
        for start in range(0, len(places), MAX_PROMPTS):
            count = min(MAX_PROMPTS, len(places) - start)
            padding = (1 << (count - 1).bit_length()) - count  # so that few programs are compiled
            chosen = slice(start, start + count)
            logits, iou = self.decode(
                embedding,
                np.pad(places[chosen], ((0, padding), (0, 0), (0, 0))),
                np.pad(kinds[chosen], ((0, padding), (0, 0))),
                None if dense is None else jnp.pad(dense[chosen], ((0, padding), (0, 0), (0, 0))),
                multimask=multimask,
            )
            wanted = np.arange(count * logits.shape[1])
            inside = masks_of(logits.reshape(-1, *logits.shape[2:]), wanted, at, size)
            inside = inside.reshape(count, logits.shape[1], *size)
            parts.append(Prediction(inside, iou[:count], logits[:count]))
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

    def decode(
        self,
        embedding: Embedding,
        places: Float[np.ndarray, "N T 2"],
        kinds: Int[np.ndarray, "N T"],
        masks: ArrayLike | None = None,
        *,
        multimask: bool,
    ) -> tuple[Float[Array, "N M Y X"], Float[Array, "N M"]]:
        """Logits and expected IoUs for what `encode_prompts` makes, in one batch."""
        return _decode(
            self.network, self.params, embedding.features, places, kinds, masks, multimask=multimask
        )


@partial(jax.jit, static_argnums=0)
def _encode(network: SamNetwork, params: Params, images: Array) -> Array:
    return cast(Array, network.apply({"params": params}, images, method="encode"))


@partial(jax.jit, static_argnums=0, static_argnames="multimask")
def _decode(
    network: SamNetwork,
    params: Params,
    features: Array,
    places: Array,
    kinds: Array,
    masks: Array | None,
    *,
    multimask: bool,
) -> tuple[Array, Array]:
    found = network.apply({"params": params}, features, places, kinds, masks, method="decode")
    logits, iou = cast(tuple[Array, Array], found)
    chosen = slice(1, None) if multimask else slice(0, 1)
    return logits[:, chosen], iou[:, chosen]
