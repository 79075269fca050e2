"""GPUs by name; none of it needs a compiler for them."""

import re

import pytest

from osprey_jax.gpu_targets import GPUS, memory_fraction, target_config
from osprey_jax.topologies import open_topology


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("foo", "no TPU slice foo: there are v4-32"),
        ("v9-8", "no TPU slice v9-8: there are v4-32"),
        ("v4-12", "no TPU slice v4-12: of v4 there are v4-8, v4-16"),
        ("v5e-2", "no TPU slice v5e-2: of v5e there are v5e-1, v5e-4"),
        ("v4:2x2", "v4:2x2: chips of v4 lie in 3 dimensions, not as 2x2"),
        ("v5e:2x2x2", "v5e:2x2x2: chips of v5e lie in 2 dimensions"),
        ("", "no TPU slice : there are"),
    ],
)
def test_what_is_no_slice_is_told_with_what_there_is(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told)}"):
        open_topology(name)


def test_a_host_has_no_three_gpus() -> None:
    with pytest.raises(ValueError, match="of h200 there are h200, h200-2, h200-4, h200-8"):
        open_topology("h200-3")


def test_without_a_plugin_the_error_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(**_: object) -> None:
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
    with pytest.raises(ValueError, match="pip install --no-deps jax-cuda12-pjrt=="):
        open_topology("h200")


def test_memory_follows_the_variables_that_jax_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert memory_fraction() == 0.75
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    assert memory_fraction() == 0.9
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "90")
    with pytest.raises(ValueError, match="XLA_PYTHON_CLIENT_MEM_FRACTION=90"):
        memory_fraction()


def test_the_cards_differ_in_name_memory_and_speed_alone() -> None:
    h100, h200 = (target_config(GPUS[name]).splitlines() for name in ("h100", "h200"))
    differ = [a.split(":")[0].strip() for a, b in zip(h100, h200, strict=True) if a != b]
    assert differ == ["device_memory_size", "memory_bandwidth", "l2_cache_size", "device_description_str"]
