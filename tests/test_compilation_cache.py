"""Programs are compiled once for all processes, and where the user wants them kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import collections, json
import jax
from osprey_jax.compilation_cache import use_compilation_cache

events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rpartition("/")[2]]))
directory = use_compilation_cache()
assert jax.jit(lambda x: x * x + 1)(2.0) == 5
print(json.dumps({"directory": directory and str(directory), "hits": events["cache_hits"]}))
"""


def run(**settings: str) -> dict:
    """Compiles a small program in a process of its own, which has these and no other settings of a cache."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "XDG_CACHE"))
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _PROGRAM],
        env=environ | settings,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def kept(directory: Path) -> list[Path]:
    """Programs in a cache."""
    return list(directory.rglob("*-cache"))


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    first, second = (run(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    assert Path(first["directory"]).parent == tmp_path / "osprey_jax"
    assert first["hits"] == 0
    assert second["hits"] >= 1


@pytest.mark.parametrize("home", ["XDG_CACHE_HOME", "HOME"])
def test_what_cannot_be_written_is_not_used(tmp_path, home):
    (file := tmp_path / "file").touch()
    assert run(**{home: str(file)}) == {"directory": None, "hits": 0}


def test_a_directory_of_the_users_stays(tmp_path):
    mine = tmp_path / "mine"
    found = run(JAX_COMPILATION_CACHE_DIR=str(mine), XDG_CACHE_HOME=str(tmp_path / "other"))
    assert found["directory"] == str(mine)
    assert not (tmp_path / "other").exists()


def test_a_cache_that_is_switched_off_stays_off(tmp_path):
    found = run(JAX_ENABLE_COMPILATION_CACHE="false", XDG_CACHE_HOME=str(tmp_path))
    assert found["directory"] is None
    assert not kept(tmp_path)
