"""What one step of training a promptable segmenter is: its loss and its update.

Reference: Kirillov et al., Segment Anything, arXiv 2304.02643, appendix A.
Differs: regions that a click may mean are known, so each of them is asked for, and the expected IoU is that
with the nearest one. A click on what no region covers has that as its mask, but 0 as its IoU, so everything
mode doesn't find it. One corrective click instead of eleven. `losses` tells what differs there.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon

from osprey_jax.checkpoint import flatten, unflatten
from osprey_jax.sam.config import SamConfig
from osprey_jax.sam.losses import distances
from osprey_jax.sam.network import SamNetwork, init_params
from osprey_jax.sam.prompt_encoder import PADDING
from osprey_jax.sam.prompts import Examples, Mix
from osprey_jax.sam.transforms import MEAN, STD, THRESHOLD, bilinear_matrix
from osprey_jax.typing import Array, Bool, Float, Int, Params

FROZEN = "prompt_encoder/frequencies"
"""As in the original, the frequencies of places stay what they were drawn as."""
CROSS_ENTROPY = 5.0
"""Weight beside dice, whose weight is 1, as is that of the squared error of the expected IoU."""
SINGLE_OF_POINT, SEVERAL_OF_OTHERS = 1.0, 0.3
"""Weights of the outputs that a prompt isn't meant for: one mask of a point, three of a box or a pair."""
SHARPNESS = 2.0
"""What the projections of queries by place are scaled with at the start."""
FREQUENCY = 0.5
"""What the frequencies of places are scaled with: with lower ones, near places are alike from the start."""
ADAM = ("patch_embed", "mask_conv", "hypernetworks", "iou_head")
"""Parts of the paths of kernels that Adam updates: those that begin or end the network."""
RELAXED = 0.02
"""Weight of the mean over masks for ambiguous prompts beside the best one, so that none is left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a segmenter is trained."""

    steps: int = 3600
    batch_size: int = 4
    """Images of a step."""
    peak_learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    seed: int = 0
    max_regions: int = 7
    """Regions that an image may have."""
    mix: Mix = dataclasses.field(default_factory=Mix)

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name in ("seed", "warmup_steps", "weight_decay") else 1e-9
            if name != "mix" and value < least:
                raise ValueError(f"{name} must be {'positive' if least else 'at least 0'}, got {value}")

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Muon for matrices, Adam for the rest, with a warm-up and cosine decay.

        With AdamW alone these scenes took about five times as many steps.
        """
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.peak_learning_rate, self.warmup_steps, max(self.steps, self.warmup_steps + 1)
        )
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            muon(
                rate,
                weight_decay=self.weight_decay,
                adam_b2=0.98,
                consistent_rms=0.2,
                muon_weight_dimension_numbers=_matrices,
            ),
        )


def _matrices(params: Params) -> Params:
    """For each leaf, what is a matrix's rows and what its columns; None where it is none."""

    def parted(path: str, leaf: Array) -> MuonDimensionNumbers | None:
        if not path.endswith("kernel") or any(name in path for name in ADAM):
            return None
        inputs = 1
        if path.endswith(("attn/proj/kernel", "out_proj/kernel")):
            inputs = 2
        elif path.endswith("neck_conv2/kernel"):
            inputs = 3
        return MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, leaf.ndim)))

    return unflatten({path: parted(path, leaf) for path, leaf in flatten(params).items()})


@flax.struct.dataclass
class State:
    """All that a step changes or needs."""

    step: Int[Array, ""]
    """Updates made so far."""
    params: Params
    moments: optax.OptState


def make_state(config: SamConfig, settings: Settings) -> State:
    """The state before the first step.

    Attention between a prompt and the image starts as a look-up by place: queries are projected as keys are,
    so like places find each other. From kernels that don't agree the network would first have to learn that.
    """
    params = flatten(init_params(config, jax.random.key(settings.seed)))
    for path, kernel in list(params.items()):
        if path.endswith(("to_image/q_proj/kernel", "image_to_token/q_proj/kernel")):
            params[path] = kernel * SHARPNESS
            params[path.replace("q_proj", "k_proj")] = jnp.copy(params[path])
    params[FROZEN] *= FREQUENCY
    tree = unflatten(params)
    return State(jnp.zeros((), jnp.int32), tree, settings.optimizer.init(tree))


def make_update(
    config: SamConfig, settings: Settings
) -> Callable[[State, Examples], tuple[State, dict[str, Array]]]:
    """The jit-compiled step: a state, which it takes over, and examples to the next one and some numbers.

    The numbers are the `loss` and mean IoUs in the batch: `click` (the best of three masks for each region),
    `box`, `pair` and `corrected`, that of clicks and boxes with one more click.
    """
    compute, optimizer = make_loss(config, settings), settings.optimizer

    @partial(jax.jit, donate_argnums=0)
    def update(state: State, examples: Examples) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)

        def loss(params: Params) -> tuple[Array, dict[str, Array]]:
            flat = flatten(params)
            flat[FROZEN] = jax.lax.stop_gradient(flat[FROZEN])
            return compute(unflatten(flat), examples, key)

        (value, numbers), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        with jax.numpy_dtype_promotion("standard"):  # optax has powers of a float and an integer
            changes, moments = optimizer.update(gradients, state.moments, state.params)
        params = cast(Params, optax.apply_updates(state.params, changes))
        return State(state.step + 1, params, moments), {"loss": value, **numbers}

    return update


class Judged(NamedTuple):
    """Losses of each of `P` prompts, and IoUs."""

    single: Float[Array, "P"]
    """Of the mask for clear prompts, compared with what the prompt was drawn for."""
    several: Float[Array, "P"]
    """Of the masks for ambiguous ones: mostly of the best for each region that may be meant."""
    expectation: Float[Array, "P"]
    """Squared error of all expected IoUs."""
    single_iou: Float[Array, "P"]
    several_iou: Float[Array, "P"]


def judge(
    logits: Float[Array, "P M h w"],
    iou: Float[Array, "P M"],
    regions: Float[Array, "R h w"],
    meant: Bool[Array, "P R"],
    chosen: Int[Array, "P"],
) -> Judged:
    """Compares masks, the one for clear prompts first, with regions, of which the last is no region."""
    found = distances(logits, regions)
    far = CROSS_ENTROPY * found.cross_entropy + found.dice
    nearest = (1 - RELAXED) * far[:, 1:].min(axis=1) + RELAXED * far[:, 1:].mean(axis=1)
    weights = meant.astype(jnp.float32)
    weights /= weights.sum(axis=1, keepdims=True)

    def first(x: Array) -> Array:
        return jnp.take_along_axis(x[:, 0], chosen[:, None], axis=1)[:, 0]

    truth = jnp.where(meant[:, None, :-1], found.iou[..., :-1], 0.0).max(axis=-1)
    return Judged(
        single=first(far),
        several=(nearest * weights).sum(axis=1),
        expectation=jnp.square(iou - truth).mean(axis=1),
        single_iou=first(found.iou),
        several_iou=(found.iou[:, 1:].max(axis=1) * weights).sum(axis=1),
    )


def corrective_clicks(
    predicted: Bool[Array, "P h w"], truth: Bool[Array, "P h w"], key: Array
) -> tuple[Float[Array, "P 2"], Int[Array, "P"]]:
    """A random pixel, x and y, where masks are wrong, and whether it belongs inside (1) or not (0).

    Where nothing is wrong it is a pixel of the true mask.
    """
    count, _, columns = truth.shape
    chance = jnp.where(predicted != truth, 1.0, jnp.where(truth, 1e-6, 0.0)).reshape(count, -1)
    place = jax.random.categorical(key, jnp.log(chance), axis=-1)
    labels = jnp.take_along_axis(truth.reshape(count, -1), place[:, None], axis=1)[:, 0]
    return jnp.stack([place % columns, place // columns], axis=-1).astype(jnp.float32), labels.astype(int)


def make_loss(
    config: SamConfig, settings: Settings
) -> Callable[[Params, Examples, Array], tuple[Array, dict[str, Array]]]:
    """The mean loss over a batch's images, a function of parameters, examples and a key, and its numbers."""
    network, mix, side = SamNetwork(config), settings.mix, config.encoder.image_size
    grow = jnp.asarray(bilinear_matrix(config.mask_size, side), jnp.float32)

    def at_full_size(logits: Array) -> Array:
        return jnp.einsum("hY,...YX,wX->...hw", grow, logits, grow)

    def of_image(
        params: Params, embedding: Array, example: Examples, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The sum over an image's prompts."""
        _, covered, places, kinds, pair_places, pair_kinds, meant, chosen = map(jnp.asarray, example)
        regions, count = covered.astype(jnp.float32), len(places)

        def decode(places: Array, kinds: Array, masks: Array | None = None) -> tuple[Array, Array]:
            found = network.apply({"params": params}, embedding, places, kinds, masks, method="decode")
            return cast(tuple[Array, Array], found)

        logits, iou = decode(places, kinds)
        short = judge(at_full_size(logits), iou, regions, meant[:count], chosen[:count])
        of_point = np.arange(count) < mix.points
        loss = (short.single * np.where(of_point, SINGLE_OF_POINT, 1.0).astype(np.float32)).sum()
        loss += (short.several * np.where(of_point, 1.0, SEVERAL_OF_OTHERS).astype(np.float32)).sum()
        loss += short.expectation.sum()

        pair_logits, pair_iou = decode(pair_places, pair_kinds)
        pairs = judge(at_full_size(pair_logits), pair_iou, regions, meant[count:], chosen[count:])
        loss += (pairs.single + SEVERAL_OF_OTHERS * pairs.several + pairs.expectation).sum()

        # One more click for the first click, of whose masks the best one goes back, and for the first box.
        click, box = 0, mix.points
        best = 1 + jnp.argmax(iou[click, 1:])
        before = jax.lax.stop_gradient(jnp.stack([logits[click, best], logits[box, 0]]))
        wanted = chosen[np.array([click, box])]
        predicted = at_full_size(before) > THRESHOLD
        place, label = corrective_clicks(predicted, covered[wanted], key)
        nowhere, none = jnp.zeros((1, 2)), jnp.full(1, PADDING)
        again_logits, again_iou = decode(
            jnp.stack(
                [
                    jnp.concatenate([places[click, :1], place[:1], nowhere]),
                    jnp.concatenate([place[1:], places[box]]),
                ]
            ),
            jnp.stack(
                [
                    jnp.concatenate([kinds[click, :1], label[:1], none]),
                    jnp.concatenate([label[1:], kinds[box]]),
                ]
            ),
            before,
        )
        alone = jax.nn.one_hot(wanted, len(regions), dtype=bool)
        again = judge(at_full_size(again_logits), again_iou, regions, alone, wanted)
        loss += (again.single + again.expectation).sum()

        return loss / count, {
            "click": short.several_iou[: mix.clicks].mean(),
            "box": short.single_iou[mix.points :].mean(),
            "pair": pairs.single_iou.mean(),
            "corrected": again.single_iou.mean(),
        }

    def of_batch(params: Params, examples: Examples, key: Array) -> tuple[Array, dict[str, Array]]:
        pixels = (examples.images.astype(jnp.float32) - MEAN[None, None, None]) / STD[None, None, None]
        embeddings = cast(Array, network.apply({"params": params}, pixels, method="encode"))
        keys = jax.random.split(key, len(pixels))
        losses, numbers = jax.vmap(partial(of_image, params))(embeddings, examples, keys)
        return losses.mean(), jax.tree.map(jnp.mean, numbers)

    return of_batch
