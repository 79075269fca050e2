"""Loss and gradients of a batch of several dialogues, compared with the PyTorch reference's."""

import jax
import numpy as np
import pytest
import torch

from osprey_jax import train_step
from osprey_jax.batch import Batch
from osprey_jax.optim import partition
from tests.parity import bridge, reference, scenes

QUICKLY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Compiling takes longer than running here."""


def dialogues(pair: "bridge.Pair") -> list[tuple[np.ndarray, np.ndarray, list[int], list[bool]]]:
    """Images, masks, ids and which of the ids are answers, of dialogues that differ in everything."""
    found = []
    sizes = ((50, 70, 1, 0.5), (64, 64, 3, 0.1), (90, 40, 2, 0.9), (33, 80, 7, 0.3))
    for number, (height, width, regions, share) in enumerate(sizes):
        ids = scenes.prompt(pair.reference.config, regions, seed=number)
        rng = np.random.default_rng(number)
        text = [0 < token < pair.reference.config.vocab_size for token in ids]
        answers = [place > 0 and is_text and rng.random() < share for place, is_text in enumerate(text)]
        masks = scenes.region_masks(height, width)[-regions:]
        found.append((scenes.picture(height, width, seed=number), masks, ids, answers))
    return found


def batch_of(pair: "bridge.Pair") -> Batch:
    """The dialogues as one batch, padded to more than the longest and to the most regions."""
    examples = dialogues(pair)
    length = max(len(pair.expand(ids)) for _, _, ids, _ in examples) + 3
    shape = (len(examples), length)
    input_ids, labels = np.zeros(shape, np.int32), np.full(shape, -100, np.int32)
    weights, segments = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    pixels, pyramids = [], []
    for row, (image, masks, ids, answers) in enumerate(examples):
        expanded, place = np.array(pair.expand(ids)), ids.index(reference.IMAGE_ID)
        unlabelled = [False] * (len(expanded) - len(ids))
        marked = np.array(answers[:place] + unlabelled + answers[place:])
        input_ids[row, : len(expanded)], segments[row, : len(expanded)] = expanded, 1
        labels[row, : len(expanded)][marked] = expanded[marked]
        weights[row, : len(expanded)][marked] = 1 / marked.sum()
        missing = [(0, 0), (0, 7 - len(masks)), (0, 0), (0, 0)]
        pyramids.append(jax.tree.map(lambda x, missing=missing: np.pad(x, missing), pair.pyramid(masks)))
        pixels.append(pair.reference.preprocess(image).numpy().transpose(0, 2, 3, 1))
    return Batch(
        images=np.stack(pixels),
        masks=jax.tree.map(lambda *x: np.stack(x), *pyramids),
        input_ids=input_ids,
        labels=labels,
        loss_weights=weights,
        positions=np.arange(length, dtype=np.int32) * segments,
        segment_ids=segments,
        prefix_segment_ids=np.zeros(shape, np.int32),
    )


@pytest.fixture(scope="module")
def pair() -> "bridge.Pair":
    return bridge.Pair.of(reference.ReferenceConfig(image_size=64, vocab_size=61, num_kv_heads=2))


@pytest.fixture(scope="module")
def expected(pair: "bridge.Pair") -> tuple[float, dict[str, np.ndarray]]:
    """The reference's loss and gradients: each dialogue alone, as the original has them, averaged."""
    losses = []
    for image, masks, ids, answers in dialogues(pair):
        logits, place = pair.reference(image, masks, ids), ids.index(reference.IMAGE_ID)
        labels = [token if marked else -100 for token, marked in zip(ids, answers, strict=True)]
        labels[place:place] = [-100] * (len(logits) - len(ids))
        target = torch.tensor(labels[1:])
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], target, ignore_index=-100))
    pair.reference.zero_grad()
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = {name: weight.grad.numpy() for name, weight in pair.reference.release_parameters().items()}
    return loss.item(), gradients


@pytest.mark.parametrize("accumulation", [1, 4])
def test_loss_and_gradients_of_several_dialogues_equal_the_references(
    pair: "bridge.Pair", expected: tuple, accumulation: int
) -> None:
    gradients = jax.jit(
        train_step.make_gradients(pair.model, accumulation=accumulation), compiler_options=QUICKLY
    )
    loss, found = gradients(pair.params, {}, batch_of(pair))
    assert float(loss) == pytest.approx(expected[0], rel=1e-6)
    bridge.assert_gradients_agree(bridge.release_arrays(found), expected[1])


def test_gradients_beside_frozen_parameters_are_the_references_too(
    pair: "bridge.Pair", expected: tuple
) -> None:
    trained, frozen = partition(pair.params, ["projector/.*", "extractor/.*"])
    gradients = jax.jit(train_step.make_gradients(pair.model, accumulation=2), compiler_options=QUICKLY)
    _, found = gradients(trained, frozen, batch_of(pair))
    assert set(found) == {"projector", "extractor"}
    names = {name for name in expected[1] if "mm_projector" in name or "mask_extractor" in name}
    every = bridge.release_arrays({**jax.tree.map(np.zeros_like, pair.params), **found})
    bridge.assert_gradients_agree({k: every[k] for k in names}, {k: expected[1][k] for k in names})
