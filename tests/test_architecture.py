"""The rules of the house: on this repository, on a tree that keeps them, on trees that break them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import house_rules

ROOT = Path(__file__).parents[1]

Rule = Callable[[Path], list[str]]


def write_tree(root: Path, sources: dict[str, str]) -> Path:
    for name, source in sources.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return root


BROKEN: list[tuple[Rule, dict[str, str], str]] = [
    (house_rules.misplaced_modules, {"osprey_jax/stray.py": ""}, "osprey_jax.stray is in no layer"),
    (house_rules.misplaced_modules, {"osprey_jax/odd/part.py": ""}, "osprey_jax.odd.part is in no layer"),
    (
        house_rules.upward_imports,
        {"osprey_jax/ops/norms.py": "from osprey_jax import models", "osprey_jax/models/__init__.py": ""},
        "osprey_jax.ops.norms:1 imports osprey_jax.models, of a layer above",
    ),
    (
        house_rules.upward_imports,
        {"osprey_jax/prompt.py": "def f():\n    from . import predictor", "osprey_jax/predictor.py": ""},
        "osprey_jax.prompt:2 imports osprey_jax.predictor",
    ),
    (
        house_rules.upward_imports,
        {"osprey_jax/config.py": "if TYPE_CHECKING:\n    import osprey_jax.loss", "osprey_jax/loss.py": ""},
        "osprey_jax.config:2 imports osprey_jax.loss",
    ),
    (
        house_rules.upward_imports,
        {"osprey_jax/sam/encoder.py": "from .predictor import Sam", "osprey_jax/sam/predictor.py": ""},
        "osprey_jax.sam.encoder:1 imports osprey_jax.sam.predictor.Sam",
    ),
    (
        house_rules.import_cycles,
        {
            "osprey_jax/ops/a.py": "from osprey_jax.ops.b import f",
            "osprey_jax/ops/b.py": "from osprey_jax.ops import c",
            "osprey_jax/ops/c.py": "def f():\n    import osprey_jax.ops.a",
        },
        "osprey_jax.ops.a imports itself",
    ),
    (
        house_rules.orbax_outside_checkpoint,
        {"osprey_jax/train.py": "from orbax.checkpoint import v1"},
        "osprey_jax.train:1 imports orbax.checkpoint.v1",
    ),
    (
        house_rules.orbax_outside_checkpoint,
        {"data_pipelines/pipeline.py": "import orbax"},
        "data_pipelines.pipeline:1 imports orbax",
    ),
    (
        house_rules.stray_or_eager_torch,
        {"osprey_jax/predictor.py": "def f():\n    import torch.nn as nn"},
        "osprey_jax.predictor:2 imports torch.nn",
    ),
    (
        house_rules.stray_or_eager_torch,
        {"osprey_jax/torch_files.py": "try:\n    from safetensors.torch import f\nexcept E:\n    pass"},
        "osprey_jax.torch_files:2 imports safetensors.torch.f",
    ),
    (
        house_rules.jax_in_numpy_only_modules,
        {"osprey_jax/image.py": "import jax.numpy as jnp"},
        "osprey_jax.image:1 imports jax.numpy",
    ),
    (
        house_rules.sharding_in_models_and_ops,
        {"osprey_jax/models/llama.py": "from osprey_jax.sharding import RULES", "osprey_jax/sharding.py": ""},
        "osprey_jax.models.llama:1 imports osprey_jax.sharding",
    ),
    (
        house_rules.mesh_axes_outside_sharding,
        {"osprey_jax/ops/a.py": "x = f('fsdp')"},
        "osprey_jax.ops.a:1 says fsdp",
    ),
    (
        house_rules.mesh_axes_outside_sharding,
        {"osprey_jax/train.py": "from jax.sharding import PartitionSpec as P"},
        "osprey_jax.train:1 says PartitionSpec",
    ),
    (
        house_rules.mesh_axes_outside_sharding,
        {"data_pipelines/pipeline.py": "spec = jax.sharding.PartitionSpec()"},
        "data_pipelines.pipeline:1 says PartitionSpec",
    ),
    (
        house_rules.pipelines_across_their_fence,
        {"data_pipelines/a.py": "from osprey_jax.ops.norms import norm", "osprey_jax/ops/norms.py": ""},
        "data_pipelines.a:1 imports osprey_jax.ops.norms.norm",
    ),
    (
        house_rules.pipelines_across_their_fence,
        {"osprey_jax/loss.py": "import data_pipelines.a", "data_pipelines/a.py": ""},
        "osprey_jax.loss:1 imports data_pipelines.a",
    ),
    (house_rules.rag_bags, {"tests/utils.py": ""}, "tests/utils.py: split by idea"),
    (house_rules.rag_bags, {"osprey_jax/utils/text.py": ""}, "osprey_jax/utils/text.py: split by idea"),
    (house_rules.long_files, {"benchmarks/run.py": "x = 1\n" * 451}, "benchmarks/run.py has 451 lines"),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in BROKEN))

SOUND = {
    "osprey_jax/__init__.py": "def __getattr__(name):\n    from osprey_jax import predictor",
    "osprey_jax/typing.py": "import jax",
    "osprey_jax/masks.py": "if TYPE_CHECKING:\n    from osprey_jax.typing import Array\nimport numpy",
    "osprey_jax/sharding.py": "from jax.sharding import PartitionSpec\nAXES = ('data', 'fsdp', 'tensor')",
    "osprey_jax/ops/resize.py": "import jax\nfrom osprey_jax.masks import bilinear_taps",
    "osprey_jax/models/llama.py": "from osprey_jax.ops import resize\nimport safetensors",
    "osprey_jax/checkpoint.py": "from orbax.checkpoint import v1",
    "osprey_jax/torch_files.py": "if TYPE_CHECKING:\n    import torch\ndef f():\n    import torch",
    "osprey_jax/predictor.py": "from osprey_jax import checkpoint\nfrom osprey_jax.models import llama",
    "osprey_jax/train.py": "import osprey_jax\nfrom data_pipelines import pipeline",
    "data_pipelines/pipeline.py": "from osprey_jax.masks import decode",
    "tests/test_long.py": "import torch\n" * 450,
    ".venv/lib/utils.py": "x = 1\n" * 500,
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rule(rule: Rule) -> None:
    assert rule(ROOT) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_tree_keeps_the_rule(rule: Rule, tmp_path: Path) -> None:
    assert rule(write_tree(tmp_path, SOUND)) == []


@pytest.mark.parametrize(
    ("rule", "sources", "fault"), BROKEN, ids=[f"{rule.__name__}-{fault}" for rule, _, fault in BROKEN]
)
def test_the_rule_finds_what_breaks_it(
    rule: Rule, sources: dict[str, str], fault: str, tmp_path: Path
) -> None:
    found = rule(write_tree(tmp_path, sources))
    assert any(line.startswith(fault) for line in found), found


def test_the_repository_is_read() -> None:
    """An empty reading would keep every rule."""
    places = {module.place for module in house_rules.read_modules(ROOT, house_rules.PACKAGE).values()}
    assert places >= {"", "typing", "config", "ops.attention", "models.osprey", "checkpoint", "predictor"}


def test_reading_data_does_not_import_jax() -> None:
    names = [f"osprey_jax.{name}" for name in house_rules.NUMPY_ONLY]
    program = f"import sys, {', '.join(names)}; print('jax' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout == "False\n"
