"""Where arrays live: the mesh, one table from logical to mesh axes, and the shardings of parameters.

Models name logical axes and nothing else; this is the only place that knows the mesh. The mesh has three
axes: `data` holds whole copies of the parameters, `fsdp` splits parameters and batch, `tensor` splits heads
and widths.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from osprey_jax.typing import Params

MESH_AXES = ("data", "fsdp", "tensor")

Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = {
    # Activations.
    "batch": ("data", "fsdp"),
    "table_batch": ("data",),
    "table_embed": "fsdp",
    "activation_channels": None,
    "activation_embed": None,
    "activation_heads": "tensor",
    "activation_kv_heads": "tensor",
    "activation_ffn": "tensor",
    "activation_extractor": "tensor",
    "activation_vocab": "tensor",
    # Parameters. Each matrix is split once over fsdp and once over tensor.
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "qkv": None,
    "ffn": "tensor",
    "norm": None,
    "channels": "fsdp",
    "channels_in": None,
    "channels_ffn": "tensor",
    "projector": "tensor",
    "extractor": "tensor",
    "extractor_out": "fsdp",
    "scale_groups": None,
    "lora_rank": None,
    "pixels": "fsdp",
    "kernel_rows": None,
    "kernel_columns": None,
}
"""Logical axis → mesh axes; None keeps the axis whole."""

GENERATION_RULES: Rules = {
    **RULES,
    "batch": ("data",),
    "embed": None,
    "table_embed": None,
    **{
        f"{prefix}{axis}": ("fsdp", "tensor")
        for prefix in ("", "activation_")
        for axis in ("heads", "kv_heads", "ffn", "vocab")
    },
}
"""The same for generation, where the decoder's matrices are never gathered.

Each is split once, over both axes: what is split over `fsdp` for training alone would be gathered for every
token, or rather, as compilers do, once and for all, and then lie whole on each device.
"""


def make_mesh(
    *, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of `data * fsdp * tensor` devices, by default the first ones there are.

    Over several TPU slices, between which sending is slow, the `data` axis alone is spread: parameters are
    gathered inside a slice, and only gradients go between slices. Raises ValueError where there are fewer
    devices than that, or `data` doesn't divide by the slices.
    """
    sizes = (data, fsdp, tensor)
    devices = jax.devices() if devices is None else devices
    if min(sizes) < 1 or math.prod(sizes) > len(devices):
        named = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise ValueError(f"a mesh of {named} needs {math.prod(sizes)} devices, there are {len(devices)}")
    devices, types = devices[: math.prod(sizes)], (AxisType.Auto,) * 3
    # Chips that are of no several slices don't tell theirs.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices <= 1:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=types, devices=devices)
    if data % slices:
        raise ValueError(f"the mesh's data={data} doesn't divide by the {slices} slices that it spreads over")
    inside = data // slices, fsdp, tensor
    spread = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices)
    return Mesh(spread, MESH_AXES, axis_types=types)


def batch_shards(mesh: Mesh, rules: Rules = RULES) -> int:
    """How many parts a batch is split in."""
    return math.prod(mesh.shape[axis] for axis in rules["batch"] or ())


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules = RULES) -> Iterator[None]:
    """Makes the models' logical constraints on activations hold on `mesh` for what is traced inside."""
    with jax.set_mesh(mesh), nn.logical_axis_rules([*rules.items()]):
        yield


def partition_spec(axes: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
    """Mesh axes of an array with these logical axes.

    Raises ValueError for a name that the table lacks, and where two axes would be split over one mesh axis.
    """
    if unknown := [axis for axis in axes if axis not in rules]:
        raise ValueError(f"no sharding rule for the logical axes {unknown} of {tuple(axes)}")
    spec = [rules[axis] for axis in axes if axis is not None]
    used = [name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    if len(set(used)) < len(used):
        raise ValueError(f"logical axes {tuple(axes)} would use a mesh axis twice: {spec}")
    return PartitionSpec(*spec)


def param_shardings(boxed_params: Params, mesh: Mesh, rules: Rules = RULES) -> Params:
    """The sharding of every parameter, from its boxed logical axes (`models.osprey.boxed_params`).

    Raises ValueError for a parameter without logical axes, or whose sizes don't divide over the mesh.
    """

    def sharding(path: tuple, leaf: object) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(leaf, nn.LogicallyPartitioned):
            raise ValueError(f"parameter {name} names no logical axes")
        shape = leaf.value.shape
        if len(leaf.names) != len(shape):
            raise ValueError(f"parameter {name} of shape {shape} has the logical axes {leaf.names}")
        result = NamedSharding(mesh, partition_spec(leaf.names, rules))
        try:
            result.shard_shape(shape)
        except ValueError:
            sizes = dict(mesh.shape)
            raise ValueError(
                f"parameter {name} of shape {shape}, split as {tuple(result.spec)}, "
                f"doesn't divide over {sizes}"
            ) from None
        return result

    return jax.tree_util.tree_map_with_path(
        sharding, boxed_params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )
