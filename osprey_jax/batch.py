"""What one training step takes, and its way from a host to the devices of a mesh."""

import flax.struct
import jax
from jax.sharding import Mesh, NamedSharding

from osprey_jax.masks import MaskPyramid
from osprey_jax.sharding import partition_spec
from osprey_jax.typing import ArrayLike, Float, Int


@flax.struct.dataclass
class Batch:
    """Sequences of one padded length, with I images each: NumPy in the loader, on devices `jax.Array`."""

    images: Float[ArrayLike, "B I Y X 3"]
    """float32, preprocessed; in the order of their places in the sequence, rows with fewer end in zeros."""
    masks: MaskPyramid
    """Levels `(B, I, R, Y, X)` bool, position `(B, I, R, P, P)` float32; fewer regions end in zeros."""
    input_ids: Int[ArrayLike, "B T"]
    """int32; every place of the image holds `IMAGE_TOKEN_ID`."""
    labels: Int[ArrayLike, "B T"]
    """int32: the token at this very place where it is to be predicted, else `IGNORE_LABEL`."""
    loss_weights: Float[ArrayLike, "B T"]
    """float32: what the token at this very place weighs in the loss; 0 where there is no label."""
    positions: Int[ArrayLike, "B T"]
    """int32, counted from 0 in each segment."""
    segment_ids: Int[ArrayLike, "B T"]
    """int32: 0 for padding, from 1 for what shares attention."""
    prefix_segment_ids: Int[ArrayLike, "B T"]
    """int32: the segment that this one sees besides its own, 0 for none."""


def to_device(batch: Batch, mesh: Mesh) -> Batch:
    """Makes global arrays, split over the mesh's batch axes, of every host's part of a batch.

    Each host gives rows of its own, all the same number. Raises ValueError where the rows of this host don't
    divide over its devices.
    """
    sharding = NamedSharding(mesh, partition_spec(("batch",)))
    rows, hosts = len(batch.input_ids), jax.process_count()
    try:
        sharding.shard_shape((rows * hosts,))
    except ValueError:
        raise ValueError(
            f"a batch of {rows * hosts} doesn't divide over the mesh {dict(mesh.shape)} as {sharding.spec[0]}"
        ) from None
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
