"""What `benchmarks.inference` looks at beside the clock: runs, programs, stages, bytes and operations."""

import contextlib
import dataclasses
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import monitoring

from osprey_jax import engine
from osprey_jax.models.convnext import ConvNeXt
from osprey_jax.models.llama import Cache, Llama
from osprey_jax.typing import Params

STAGES = {"encode": "tower", "prefill": "prefix", "begin": "suffix", "decode": "decode", "resize": "decode"}
"""The engine's compiled functions, by what they are for; the suffix includes the first token."""


@dataclasses.dataclass
class Counts:
    """What ran on the device."""

    tower_calls: int = 0
    prefix_prefills: int = 0
    prefix_places: int = 0
    """Rows times padded length."""
    suffix_batches: int = 0
    suffix_rows: int = 0
    suffix_places: int = 0
    decode_steps: int = 0
    row_steps: int = 0
    """Rows that the decode steps had, rows that only fill a batch included."""
    prefix_cache_bytes: int = 0
    own_cache_bytes: int = 0
    """The largest that the rows of a batch had, together."""


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], Counts]]:
    """Counts calls of tower and decoder as they run, inside of compiled programs and their loops, too.

    Gives a function that returns what ran since it was last called. Programs are traced anew on the way in
    and on the way out, for counting is compiled into them.
    """
    counts = Counts()

    def take() -> Counts:
        jax.effects_barrier()
        taken = dataclasses.replace(counts)
        for field in dataclasses.fields(counts):
            setattr(counts, field.name, 0)
        return taken

    def tower() -> None:
        counts.tower_calls += 1

    def prefix(rows: int, length: int, cache: int) -> None:
        counts.prefix_prefills += 1
        counts.prefix_places += rows * length
        counts.prefix_cache_bytes = max(counts.prefix_cache_bytes, cache)

    def suffix(rows: int, length: int, cache: int) -> None:
        counts.suffix_batches += 1
        counts.suffix_rows += rows
        counts.suffix_places += rows * length
        counts.own_cache_bytes = max(counts.own_cache_bytes, cache)

    def step(rows: int, length: int, cache: int) -> None:
        counts.decode_steps += 1
        counts.row_steps += rows * length
        counts.own_cache_bytes = max(counts.own_cache_bytes, cache)

    def intercept(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__" and isinstance(context.module, ConvNeXt):
            jax.debug.callback(tower)
        if context.method_name == "__call__" and isinstance(context.module, Llama):
            rows, length, _ = args[0].shape
            kind = step if length == 1 else prefix if kwargs.get("prefix") is None else suffix
            jax.debug.callback(functools.partial(kind, rows, length, cache_bytes(kwargs["cache"])))
        return call(*args, **kwargs)

    jax.clear_caches()
    with nn.intercept_methods(intercept):
        yield take
    jax.clear_caches()


def cache_bytes(cache: Cache) -> int:
    """Bytes of keys and values."""
    leaves = jax.tree.leaves((cache.keys, cache.values))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@dataclasses.dataclass
class Compiled:
    """Programs that JAX compiled or took from its persistent cache."""

    count: int = 0
    hits: int = 0
    """Those that came from the persistent cache."""
    seconds: float = 0.0
    names: list[str] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def compilations() -> Iterator[Compiled]:
    """Counts programs by what JAX tells its listeners, those of single operations included."""
    compiled = Compiled()

    def on_duration(event: str, seconds: float, **details: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.count += 1
            compiled.seconds += seconds
            compiled.names.append(str(details.get("fun_name", "?")))

    def on_event(event: str, **_: str | int) -> None:
        compiled.hits += event == "/jax/compilation_cache/cache_hits"

    monitoring.register_event_duration_secs_listener(on_duration)
    monitoring.register_event_listener(on_event)
    try:
        yield compiled
    finally:
        monitoring.unregister_event_duration_listener(on_duration)
        monitoring.unregister_event_listener(on_event)


@dataclasses.dataclass
class Stages:
    """Where the engine's time goes."""

    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    step_cost: dict[str, float] = dataclasses.field(default_factory=dict)
    """XLA's estimate for one step of the first batch: `flops` and `bytes accessed`."""


@contextlib.contextmanager
def staged() -> Iterator[Stages]:
    """Times each of the engine's compiled functions, to its end."""
    stages, originals = Stages(), {name: getattr(engine, name) for name in STAGES}

    def wrap(name: str) -> Callable:
        function = originals[name]

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if name == "decode" and not stages.step_cost:
                # A loop's body is counted once, whatever the number of its turns.
                stages.step_cost = cost(function, *args, **kwargs)
            start = time.perf_counter()
            result = jax.block_until_ready(function(*args, **kwargs))
            stages.seconds[STAGES[name]] += time.perf_counter() - start
            return result

        return run

    for name in originals:
        setattr(engine, name, wrap(name))
    try:
        yield stages
    finally:
        for name, function in originals.items():
            setattr(engine, name, function)


def cost(function: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
    """XLA's estimate of what a program does: operations and bytes, where the platform gives them."""
    analysis = function.lower(*args, **kwargs).compile().cost_analysis()
    if isinstance(analysis, list):  # one for each program, in some releases
        analysis = analysis[0]
    return {name: float(analysis[name]) for name in ("flops", "bytes accessed") if name in (analysis or {})}


def step_weights(params: Params) -> int:
    """Bytes that a decode step reads of the weights: the decoder without its embedding table."""
    decoder = {name: leaf for name, leaf in params["decoder"].items() if name != "embed_tokens"}
    return sum(leaf.nbytes for leaf in jax.tree.leaves(decoder))


def machine_limits(dtype: str) -> dict[str, float]:
    """Bytes a second that a sum reads and a product copies, operations a second of a product of matrices."""
    small = jax.default_backend() == "cpu"
    side = 4096 if small else 16384
    numbers, square = jnp.ones(1 << (28 if small else 30), jnp.float32), jnp.ones((side, side), dtype)

    def rate(work: float, function: Callable, *args: jax.Array) -> float:
        compiled, times = jax.jit(function), []
        for _ in range(6):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*args))
            times.append(time.perf_counter() - start)
        return work / min(times)

    return {
        "read_bytes_per_s": rate(numbers.nbytes, jnp.sum, numbers),
        "copy_bytes_per_s": rate(2 * numbers.nbytes, lambda x: x * 2, numbers),
        "flops_per_s": rate(2 * side**3, jnp.matmul, square, square),
    }
