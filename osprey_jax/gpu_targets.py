"""NVIDIA GPUs as XLA's compiler wants them described, for compiling without one.

What a card tells of itself (`GpuTargetConfigProto`), where it differs from its brochure. The chip is that of
an H100 SXM as XLA's autotuner tests state it; of its memory there are several readings, 84,978,434,048 bytes
in those tests and 84,942,979,072 elsewhere: the least stands here. An H200 has the same chip; PyTorch reads
143,156 MiB and 60 MiB of L2 from it, and its out-of-memory errors say 139.80 GiB (a few 139.72). Bandwidths
are NVIDIA's data sheets': 3.35 and 4.8 TB/s. None of it was measured by us.
"""

import os
from typing import NamedTuple


class Gpu(NamedTuple):
    """In what the cards differ."""

    name: str
    memory: int
    """Bytes that CUDA tells."""
    bandwidth: int
    """Bytes a second."""
    cache: int
    """Bytes of L2."""


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_350_000_000_000, 50 << 20),
    "h200": Gpu("NVIDIA H200", 143_156 << 20, 4_800_000_000_000, 60 << 20),
}
COUNTS = (1, 2, 4, 8)
"""Cards of one host, between which NVLink lies."""

FRACTION = 0.75
"""Of the memory, which JAX 0.10 takes unless told otherwise; no program gets more."""
MOST = 0.95
"""What may be asked for, by our judgement: contexts, kernels and libraries need memory of their own."""

HOPPER = """
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
"""


def target_config(gpu: Gpu) -> str:
    """The text of a `GpuTargetConfigProto`, with versions of CUDA and cuDNN that JAX 0.10 runs with."""
    return f"""
gpu_device_info {{{HOPPER}
  device_memory_size: {gpu.memory}
  memory_bandwidth: {gpu.bandwidth}
  l2_cache_size: {gpu.cache}
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 9 }}
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{gpu.name}"
"""


def memory_fraction() -> float:
    """Of a card's memory, how much JAX would take, by the environment variables that it reads, too.

    Raises ValueError where they hold no fraction.
    """
    for variable in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if text := os.environ.get(variable):
            try:
                fraction = float(text)
            except ValueError:
                fraction = 0.0
            if not 0 < fraction <= 1:
                raise ValueError(f"{variable}={text} is no fraction of a card's memory, as {MOST} is")
            return fraction
    return FRACTION
