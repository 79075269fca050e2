"""Compiled programs that outlive the process: JAX's persistent cache, on unless the user has settled it."""

import hashlib
import os
import platform
from pathlib import Path

import jax


def use_compilation_cache() -> str | None:
    """Lets JAX keep what it compiles from now on, small programs too; returns where, None if nowhere.

    A directory that is set already (`JAX_COMPILATION_CACHE_DIR` or `jax.config`) stays, with its limits, and
    `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing. Otherwise it is `osprey_jax/` in `$XDG_CACHE_HOME` or
    `~/.cache`, in it a directory for this kind of machine: XLA's programs for one CPU can crash on another,
    and homes are shared. It may be deleted at any time.
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    if (chosen := jax.config.jax_compilation_cache_dir) is not None:  # type: ignore[attr-defined]
        return os.fspath(chosen)
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = Path(caches) / "osprey_jax" / f"jax-{jax.__version__}-{_machine()}"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or none to write in
        return None
    if not os.access(directory, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", os.fspath(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return os.fspath(directory)


def _machine() -> str:
    """Short name of the processor's kind and abilities."""
    told = [platform.machine(), platform.processor()]
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text().splitlines()
        told += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.blake2b("\n".join(told).encode(), digest_size=6).hexdigest()
