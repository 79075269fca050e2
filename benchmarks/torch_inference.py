"""Describing regions in torch as the original does: for each region the whole image and the whole prompt.

transformers' ConvNext and Llama (scaled-dot-product attention, a cache) with the weights of `tests.parity`;
the image is preprocessed once, and the head sees last positions only. Runs on CPU in float32.
"""

import numpy as np
import torch

from osprey_jax.config import OspreyConfig
from osprey_jax.typing import Params
from tests.parity.bridge import our_config, our_params
from tests.parity.reference import OspreyReference, ReferenceConfig

_LOUDER = 8.0
"""Scales region tokens, so that answers about different regions differ."""


class TorchOsprey:
    """A model with random weights that never ends an answer by itself."""

    def __init__(self, config: OspreyConfig, *, eos_id: int, threads: int, seed: int = 0):
        """Sizes are `config`'s; the head gives the logit 0 to `eos_id`, below the largest of the others."""
        torch.set_num_threads(threads)
        vision, extractor, decoder = config.vision, config.extractor, config.decoder
        sizes = ReferenceConfig(
            depths=vision.depths,
            dims=vision.dims,
            image_size=vision.image_size,
            extractor_dim=extractor.dim,
            position_size=extractor.position_size,
            vocab_size=decoder.vocab_size,
            dim=decoder.dim,
            ffn_dim=decoder.ffn_dim,
            num_layers=decoder.num_layers,
            num_heads=decoder.num_heads,
            num_kv_heads=decoder.num_kv_heads,
            head_dim=decoder.head_dim,
        )
        if our_config(sizes) != config:
            raise ValueError(f"torch's side has no model of {config}")
        self._config, self._model = config, OspreyReference(sizes, seed)
        self._model.llama.set_attn_implementation("sdpa")
        extract = self._model.mask_extractor
        with torch.no_grad():
            self._model.llama.lm_head.weight[eos_id] = 0.0
            extract.feat_linear.weight *= _LOUDER
            extract.mask_linear.layers[2].weight *= _LOUDER

    def params(self) -> Params:
        """The same weights as parameters of ours, in NumPy arrays."""
        return our_params(self._model.release_state_dict(), self._config)

    def preprocess(self, image: np.ndarray) -> torch.Tensor:
        """uint8 `(h, w, 3)` to the tower's input."""
        return self._model.preprocess(image)

    @torch.inference_mode()
    def answer(self, pixels: torch.Tensor, mask: np.ndarray, ids: list[int], tokens: int) -> list[int]:
        """The `tokens` likeliest tokens, one after another, behind a prompt about one mask `(h, w)`."""
        model = self._model
        features = model.tower(pixels)
        region = model.extract(features, torch.from_numpy(mask[None]).float())
        places = model.config.mask_id, model.config.position_id
        embedded = model.splice(ids, model.project(features[2]), *region, *places)
        output = model.llama(inputs_embeds=embedded, use_cache=True, logits_to_keep=1)
        answer = [int(output.logits[0, -1].argmax())]
        while len(answer) < tokens:
            last = torch.tensor([answer[-1:]])
            output = model.llama(input_ids=last, cache=output.cache, use_cache=True, logits_to_keep=1)
            answer.append(int(output.logits[0, -1].argmax()))
        return answer
