"""One small run that nothing disturbs, made once, and the means to make others."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipelines.shapes.tokenizer import train_tokenizer
from tests.train.runs import ROOT, SMALL, Command, Start

QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
"""Compiling takes longer than running here; slower programs halve the time."""


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Arguments of a small run; in the names of overrides `__` stands for a dot."""
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(tokenizer)

    def arguments(workdir: Path, **overrides: object) -> list[str]:
        values = SMALL | {"data.tokenizer": str(tokenizer), "mesh.data": 1}
        values |= {key.replace("__", "."): value for key, value in overrides.items()}
        flags = [f"--config.{key}={value}" for key, value in values.items()]
        return [f"--config={ROOT / 'configs' / 'tiny.py'}", f"--workdir={workdir}", *flags]

    return arguments


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts the command on so many fake devices; programs are compiled once for all processes, and fast.

    Further keywords are environment variables.
    """
    environment = dict(os.environ)
    environment["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
        tmp_path_factory.mktemp("cache")
    )
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    processes = []

    def started(
        arguments: list[str], *, devices: int = 1, flags: str = QUICKLY, **variables: str
    ) -> subprocess.Popen:
        own = {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}", **variables}
        line = [sys.executable, "-m", "osprey_jax.train", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(line, cwd=ROOT, env=environment | own, **pipes))
        return processes[-1]

    yield started
    for process in processes:
        process.kill()


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, command: Command, start: Start
) -> tuple[Path, str, str]:
    """An undisturbed run: its directory, and what it wrote to stdout and stderr."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    process = start(command(workdir))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return workdir, out, err
