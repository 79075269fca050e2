"""Whether Osprey-7B fits one TPU chip: its programs compiled for chips that needn't be here, by libtpu.

    pip install libtpu
    python -m benchmarks.tpu_memory [--regions 32] [--tokens 64] [v5e:int8 v6e:bfloat16]

A case is a chip and what the decoder's matrices are in ("bfloat16", "int8", "int8_dynamic", "int4"); all else
is bfloat16, and the extractor float32. For each case the engine's programs are compiled with the sizes that
describing so many regions of one image gives them. For each program a row tells what is in memory while it
runs: all parameters, what the engine keeps meanwhile (the tower's features, the prefix, the rows' caches),
and the program's own results and temporaries. GFLOP and GB read and written are the compiler's count, of
decoding that of one step. Exit status 1 if any of it is above the chip's limit.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

# Nothing runs; these keep libtpu from looking for a chip and for its neighbours.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from osprey_jax import engine, generate
from osprey_jax.config import osprey_7b
from osprey_jax.masks import MaskPyramid
from osprey_jax.models import osprey as network
from osprey_jax.quantize import SCHEMES

GIB = 1 << 30
LIMITS = {"v5e": 15.75, "v6e": 31.24}
"""GiB that programs may use, as the compiler's refusals state it."""
TEXT_TOKENS, REST_TOKENS = 53, 12
"""Of the demo's short question before and from the region on, by a tokenizer of 32,000 pieces."""


class Measured(NamedTuple):
    """A compiled program's needs in bytes."""

    arguments: int
    temporaries: int
    results: int
    """Without what is written into its arguments' memory."""
    flops: float
    accessed: float
    """Bytes read and written; as the operations, of one step where a program is a loop."""
    seconds: float


def compiled(device: Any, function: Callable, *args: Any, **options: Any) -> tuple[Measured, Any]:
    """Compiles a jitted function for the device; its needs, and the shapes of its results."""
    begin = time.monotonic()
    lowered = function.lower(*args, **options)
    program = lowered.compile()
    memory, cost = program.memory_analysis(), program.cost_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    measured = Measured(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        results,
        cost.get("flops", 0.0),
        cost.get("bytes accessed", 0.0),
        time.monotonic() - begin,
    )
    return measured, placed(lowered.out_info, device)


def placed(tree: Any, device: Any) -> Any:
    """The same shapes, on the device."""
    sharding = SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def size_of(device: Any, *trees: Any) -> int:
    """Bytes of arrays in the device's layout, padding included."""
    measured, _ = compiled(device, jax.jit(lambda *_: 0, keep_unused=True), *trees)
    return measured.arguments


def programs(
    device: Any, quantization: str | None, regions: int, tokens: int, limit: float
) -> Iterator[tuple]:
    """Compiles what describing takes, in order: name, needs, and bytes in memory at that time."""
    config, dtype = osprey_7b(), jnp.dtype("bfloat16")
    model = network.Osprey(config, dtype, scan_layers=False, quantization=quantization)
    boxed = network.abstract_params(config, dtype, quantization=quantization)
    params = {**boxed, "extractor": network.abstract_params(config, "float32")["extractor"]}
    params = jax.eval_shape(partial(network.unstack_params, blocks=False), params)
    params = placed(params, device)
    weights = size_of(device, params)

    def array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return placed(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), device)

    def padded(count: int, step: int) -> int:
        return -(-count // step) * step

    vision, room, places = config.vision, engine.FIRST_ROOM, engine.places_for(tokens)
    length = vision.num_image_tokens + TEXT_TOKENS
    fits = engine.fitting(
        model, limit * GIB - weights, prefix=length, rest=REST_TOKENS, limit=tokens, images=1
    )
    rows = engine.row_bucket(math.ceil(regions / math.ceil(regions / fits.rows)))
    masks = MaskPyramid(
        levels=tuple(array((1, rows, side, side), "bool") for side in vision.level_sizes),
        position=array((1, rows, *(config.extractor.position_size,) * 2), "float32"),
    )
    number = array((), "int32")
    keys = placed(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)), device)
    given = {"sampler": generate.Greedy(), "limit": number, "eos_id": number}
    compile_ = partial(compiled, device)

    images = array((1, vision.image_size, vision.image_size, 3), "float32")
    needs, (features, image_tokens) = compile_(generate.encode, model, params, images)
    yield "tower", needs, weights + size_of(device, images)
    kept = weights + size_of(device, features, image_tokens)
    ids = array((1, padded(length, engine.PREFIX_STEP)), "int32")
    needs, prefix = compile_(
        generate.prefill, model, params, ids, array((1,), "int32"), image_tokens, features, None
    )
    yield "prefix", needs, kept
    kept += size_of(device, prefix)
    ids = array((rows, padded(REST_TOKENS, engine.SUFFIX_STEP)), "int32")
    needs, answers = compile_(
        generate.begin, model, params, prefix, ids, array((rows,), "int32"), features, masks,
        keys=keys, room=room, places=places, **given,
    )  # fmt: skip
    yield "suffixes", needs, kept + size_of(device, masks)
    while True:
        needs, _ = compile_(
            generate.decode, model, params, prefix, answers,
            wanted=array((rows,), "bool"), enough=number, steps=number, **given,
        )  # fmt: skip
        own = size_of(device, answers)
        yield f"decode, {rows} × {room}", needs, kept + own
        if room == places:
            return
        roomier = min(room * engine.ROOM_GROWTH, places)
        needs, answers = compile_(
            generate.resize, answers, array((rows,), "int32"), more_slots=roomier - room
        )
        yield f"more room, {roomier}", needs, kept + own
        room = roomier


def main() -> int:
    """Prints a table for each case; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", default=["v5e:int8", "v6e:bfloat16"], metavar="CHIP:DTYPE")
    parser.add_argument("--regions", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="generated for a region at most")
    args = parser.parse_args()
    fits = True
    for case in args.cases:
        chip, _, name = case.partition(":")
        if chip not in LIMITS or name not in ("bfloat16", *SCHEMES):
            parser.error(f"{case}: a case is one of {', '.join(LIMITS)}, a colon, bfloat16 or a scheme")
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip}:1x1", chips_per_host_bounds=(1, 1, 1)
        )
        limit = LIMITS[chip]
        print(f"Osprey-7B, {name}, {args.regions} regions, on one {chip} chip with {limit} GiB; in GiB:")
        print(
            "program                arguments  temporaries  results  in memory  left"
            "      GFLOP        GB  compiled in"
        )
        for program, needs, kept in programs(
            topology.devices[0], None if name == "bfloat16" else name, args.regions, args.tokens, limit
        ):
            total = (kept + needs.temporaries + needs.results) / GIB
            fits &= total <= limit
            print(
                f"{program:<22} {needs.arguments / GIB:9.2f}  {needs.temporaries / GIB:11.2f}  "
                f"{needs.results / GIB:7.2f}  {total:9.2f}  {limit - total:4.1f}  "
                f"{needs.flops / 1e9:9.1f} {needs.accessed / 1e9:9.2f}  {needs.seconds:9.0f} s",
                flush=True,
            )
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
