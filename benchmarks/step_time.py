"""Training steps here and in torch, interleaved: the same weights, batch and optimizer.

    python -m benchmarks.step_time [--steps 20] [--threads 2] [--decoder 0.1b --rows 4]

The model is that of `configs/tiny.py`, or has a decoder of 0.1 B parameters instead of its own.
The torch side is transformers' ConvNext and Llama (scaled-dot-product attention) around a batched extractor,
with torch's fused AdamW. Both sides start from the same weights and get the loader's arrays; the first losses
must agree before anything is timed. Prints each side's median step and the median ratio of neighbours.
"""

import argparse
import statistics
import sys
import tempfile
import time

import jax
import numpy as np
import torch
from torch.nn import functional as F

from configs import tiny as tiny_config
from data_pipelines.pipeline import make_loader
from data_pipelines.shapes import Shapes, train_tokenizer
from osprey_jax import sharding, train_step
from osprey_jax.batch import Batch, to_device
from osprey_jax.optim import AdamW, init_state
from osprey_jax.prompt import IMAGE_TOKEN_ID, Tokenizer
from tests.parity.bridge import Pair
from tests.parity.reference import OspreyReference, ReferenceConfig

DECODERS = {
    "tiny": {},
    "0.1b": {"dim": 768, "ffn_dim": 2560, "num_layers": 12, "num_heads": 12, "num_kv_heads": 12},
}
"""In what a decoder differs from the tiny one."""


def pair_with(decoder: str) -> Pair:
    """Torch's and our model in the sizes of `configs/tiny.py`, with the same random weights."""
    model = tiny_config.get_config().model
    model.decoder.update(DECODERS[decoder])
    return Pair.of(
        ReferenceConfig(
            depths=tuple(model.vision.depths),
            dims=tuple(model.vision.dims),
            extractor_dim=model.extractor.dim,
            position_size=model.extractor.position_size,
            image_size=model.vision.image_size,
            **{
                name: model.decoder[name]
                for name in ("vocab_size", "dim", "ffn_dim", "num_layers", "num_heads", "num_kv_heads")
            },
        )
    )


def shapes_batch(pair: Pair, rows: int) -> Batch:
    """The first batch of the tiny configuration, of so many rows."""
    config = tiny_config.get_config()
    with tempfile.TemporaryDirectory() as directory:
        train_tokenizer(directory)
        loader = make_loader(
            [Shapes(size=pair.config.vision.image_size)],
            Tokenizer.load(directory),
            pair.config,
            batch_size=rows,
            buckets=config.data.buckets,
            seed=0,
            num_steps=1,
        )
        batch, _ = next(loader)
        loader.close()
    return batch


def torch_loss(reference: OspreyReference, batch: Batch) -> torch.Tensor:
    """The loss of a batch: the mean over its dialogues."""
    levels = [torch.from_numpy(np.asarray(level)[:, 0]).float() for level in batch.masks.levels]
    ids, weights = torch.from_numpy(batch.input_ids).long(), torch.from_numpy(batch.loss_weights)
    places = torch.from_numpy(batch.positions).long()
    seen = torch.from_numpy(batch.segment_ids).long()
    features = reference.tower(torch.from_numpy(batch.images[:, 0]).permute(0, 3, 1, 2))

    extractor = reference.mask_extractor
    linears = (extractor.res2, extractor.res3, extractor.res4, extractor.res5)
    pooled = [
        torch.einsum("bcyx,bryx->brc", level, inside) / (inside.sum((2, 3))[..., None] + 1e-8)
        for level, inside in zip(features, levels, strict=True)
    ]
    summed = torch.stack([linear(x) for linear, x in zip(linears, pooled, strict=True)]).sum(0)
    first, second, third = extractor.mask_linear.layers
    position = third(
        F.relu(second(F.relu(first(torch.from_numpy(np.asarray(batch.masks.position)[:, 0]).flatten(2)))))
    )

    named = ids == reference.config.mask_id
    used = torch.arange(position.shape[1]) < named.sum(1, keepdim=True)
    words = ids.where((ids >= 0) & (ids < reference.config.vocab_size), 0)  # 0 where a visual token goes
    embedded = reference.llama.model.embed_tokens(words)
    embedded = embedded.masked_scatter(
        (ids == IMAGE_TOKEN_ID)[..., None], reference.project(features[2]).flatten(0, 1)
    )
    embedded = embedded.masked_scatter(named[..., None], extractor.feat_linear(summed)[used])
    at_position = (ids == reference.config.position_id)[..., None]
    embedded = embedded.masked_scatter(at_position, position[used])
    logits = reference.llama(
        inputs_embeds=embedded, attention_mask=(seen != 0).long(), position_ids=places, use_cache=False
    ).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), words[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum() / weights.sum()


def main() -> int:
    """Runs both sides in turns and prints what they took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--decoder", choices=DECODERS, default="tiny")
    parser.add_argument("--rows", type=int, default=16, help="of a batch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pair = pair_with(args.decoder)
    batch = shapes_batch(pair, args.rows)

    reference = pair.reference.train()
    reference.llama.set_attn_implementation("sdpa")
    theirs = torch.optim.AdamW(
        reference.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

    def torch_step() -> float:
        theirs.zero_grad()
        loss = torch_loss(reference, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        theirs.step()
        return loss.item()

    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1)
    ours = AdamW(
        peak_learning_rate=1e-5,
        warmup_steps=0,
        total_steps=1000,
        b1=0.9,
        b2=0.95,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    update = jax.jit(train_step.make_update(pair.model, ours, accumulation=1), donate_argnums=0)
    # Compiled, for donated buffers must not be shared.
    state = jax.jit(lambda params: init_state(params, (".*",), frozen_dtype="float32"))(pair.params)

    def jax_step() -> float:
        nonlocal state
        state, numbers = update(state, to_device(batch, mesh))
        return numbers["loss"].item()

    with sharding.use_mesh(mesh):
        start = time.perf_counter()
        first = jax_step()
        compiled = time.perf_counter() - start
        expected = torch_step()
        if abs(first - expected) > 1e-4 * expected:
            print(f"error: the first losses differ: {first} here, {expected} in torch", file=sys.stderr)
            return 1
        for step in (jax_step, torch_step):
            step()
        seconds: dict[str, list[float]] = {"here": [], "torch": []}
        for number in range(args.steps):
            turns = (("here", jax_step), ("torch", torch_step))
            for name, step in turns if number % 2 else reversed(turns):
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)

    ratios = [a / b for a, b in zip(seconds["here"], seconds["torch"], strict=True)]
    rows, length = batch.input_ids.shape
    print(f"{rows} dialogues of {length} places, {args.steps} steps each, {jax.default_backend()}")
    print(f"loss of the first step: {first:.6f} here, {expected:.6f} in torch")
    print(f"here   {statistics.median(seconds['here']):.3f} s a step (compiled in {compiled:.0f} s)")
    print(f"torch  {statistics.median(seconds['torch']):.3f} s a step, {torch.get_num_threads()} threads")
    print(f"ratio  {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
