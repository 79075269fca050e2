"""The plan of the house as rules over the syntax of its modules: who may import whom, and what stays where.

A rule is a function of a tree's root that lists what breaks it, a line for each culprit.
"""

import ast
import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path

PACKAGE = "osprey_jax"
PIPELINES = "data_pipelines"

LAYERS = (
    ("typing",),
    (
        "config",
        "prompt",
        "image",
        "masks",
        "region_files",
        "region_lines",
        "figure",
        "quantize",
        "lora",
        "sharding",
        "batch",
        "cluster",
        "directories",
        "compilation_cache",
        "gpu_targets",
        "ops",
    ),
    ("models", "sam"),
    (
        "loss",
        "optim",
        "metrics",
        "flops",
        "profiler",
        "watchdog",
        "checkpoint",
        "convert",
        "convert_rules",
        "convert_leaves",
        "torch_files",
        "generate",
        "sam.files",
        "convert_sam",
        "convert_sam_rules",
    ),
    ("vocabulary", "engine", "request"),
    ("recognize", "prompt_ids"),
    ("sam.predictor",),
    ("sam.candidates",),
    ("sam.everything",),
    ("sam.evaluation", "sam.training"),
    ("sam.train",),
    ("segments",),
    ("", "predictor"),  # "" is the package itself, which offers the predictor
    ("training_checkpoints", "train_config", "topologies", "hlo"),
    ("train_step", "train_data"),
    ("answers",),
    ("compile_topology", "training_summary", "evaluation"),
    ("train",),
    ("command_options",),
    ("describe", "label", "eval", "serve", "demo", "sam.demo"),
)
"""From the bottom up; a package's entry holds for what is in it, unless a longer entry does."""

NUMPY_ONLY = ("config", "prompt", "image", "masks", "region_files", "region_lines", "figure")
PIPELINES_MAY_USE = ("typing", "batch", *NUMPY_ONLY)
MAY_USE_PIPELINES = ("train", "train_data", "answers", "evaluation", "eval", "label", "demo", "sam.demo")
ACCELERATED = {"jax", "jaxlib", "flax", "optax", "orbax"}
TORCH = {"torch", "torchvision", "transformers", "timm", "open_clip", "safetensors.torch"}
MESH_NAMES = {"PartitionSpec"}
MESH_AXES = {"fsdp", "tensor"}
"""`data`, the third, is too common a word to tell."""
RAG_BAGS = {"utils", "util", "helpers", "misc"}
MAX_LINES = 450


@dataclasses.dataclass(frozen=True)
class Import:
    """One name that a module imports, absolute and dotted; `line` is for the messages."""

    name: str
    line: int
    in_function: bool
    for_types: bool  # under `if TYPE_CHECKING`


@dataclasses.dataclass(frozen=True)
class Module:
    """A file of a tree and what it imports."""

    name: str
    path: Path
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def place(self) -> str:
        """Its name inside the package."""
        return self.name.partition(".")[2]


def read_modules(root: Path, *packages: str) -> dict[str, Module]:
    """The modules of the packages by dotted name; a package's `__init__` has the package's name."""
    modules = {}
    for path in sorted(path for package in packages for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        tree = ast.parse(path.read_text(), filename=str(path))
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        modules[name] = Module(name, path, tree, tuple(imports_of(tree, package)))
    return modules


def imports_of(
    node: ast.AST, package: str, *, in_function: bool = False, for_types: bool = False
) -> Iterator[Import]:
    """Every name imported below a node of a module of `package`, relative ones made absolute."""
    for child in ast.iter_child_nodes(node):
        names = []
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            parents = package.split(".")
            parents = parents[: len(parents) + 1 - child.level] if child.level else []
            base = ".".join([*parents, *([child.module] if child.module else [])])
            names = [f"{base}.{alias.name}" for alias in child.names]
        yield from (Import(name, child.lineno, in_function, for_types) for name in names)
        yield from imports_of(
            child,
            package,
            in_function=in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda),
            for_types=for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)),
        )


def is_in(name: str, packages: Collection[str]) -> bool:
    """Whether a dotted name is one of the packages or in one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def target(imported: str, modules: dict[str, Module]) -> str | None:
    """The module of the tree that an imported name is or is taken from."""
    while imported and imported not in modules:
        imported = imported.rpartition(".")[0]
    return imported or None


def edges(modules: dict[str, Module]) -> Iterator[tuple[Module, Module, Import]]:
    """Importer, imported and where, for all imports between these modules."""
    for module in modules.values():
        for imported in module.imports:
            found = target(imported.name, modules)
            if found is not None and found != module.name:
                yield module, modules[found], imported


def layer(place: str) -> int | None:
    """The layer of a module of the package, by its longest entry; None where nobody has placed it."""
    parts = place.split(".")
    for length in range(len(parts), 0, -1):
        for number, names in enumerate(LAYERS):
            if ".".join(parts[:length]) in names:
                return number
    return None


def at(module: Module, imported: Import) -> str:
    return f"{module.name}:{imported.line} imports {imported.name}"


def misplaced_modules(root: Path) -> list[str]:
    return [
        f"{module.name} is in no layer: place it in LAYERS"
        for module in read_modules(root, PACKAGE).values()
        if layer(module.place) is None
    ]


def upward_imports(root: Path) -> list[str]:
    """A package's own modules are none that are above it: it offers them."""
    placed = {k: m for k, m in read_modules(root, PACKAGE).items() if layer(m.place) is not None}
    return [
        f"{at(module, line)}, of a layer above"
        for module, other, line in edges(placed)
        if layer(other.place) > layer(module.place) and not other.name.startswith(f"{module.name}.")
    ]


def import_cycles(root: Path) -> list[str]:
    graph: dict[str, set[str]] = {}
    for module, other, _ in edges(read_modules(root, PACKAGE, PIPELINES)):
        graph.setdefault(module.name, set()).add(other.name)

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            more = graph.get(waiting.pop(), set()) - seen
            seen |= more
            waiting += more
        return seen

    return [f"{name} imports itself by way of others" for name in sorted(graph) if name in reach(name)]


def orbax_outside_checkpoint(root: Path) -> list[str]:
    return [
        f"{at(module, line)}: only checkpoint.py knows Orbax"
        for module in read_modules(root, PACKAGE, PIPELINES).values()
        for line in module.imports
        if is_in(line.name, {"orbax"}) and module.name != f"{PACKAGE}.checkpoint"
    ]


def stray_or_eager_torch(root: Path) -> list[str]:
    return [
        f"{at(module, line)}: only functions of torch_files.py do"
        for module in read_modules(root, PACKAGE, PIPELINES).values()
        for line in module.imports
        if is_in(line.name, TORCH) and not line.for_types
        if module.name != f"{PACKAGE}.torch_files" or not line.in_function
    ]


def jax_in_numpy_only_modules(root: Path) -> list[str]:
    return [
        f"{at(module, line)}: this module is NumPy only"
        for module in read_modules(root, PACKAGE).values()
        for line in module.imports
        if module.place in NUMPY_ONLY and is_in(line.name, ACCELERATED) and not line.for_types
    ]


def sharding_in_models_and_ops(root: Path) -> list[str]:
    return [
        f"{at(module, line)}: models and ops name logical axes only"
        for module, other, line in edges(read_modules(root, PACKAGE))
        if is_in(module.place, {"models", "ops"}) and other.place == "sharding"
    ]


def mesh_axes_outside_sharding(root: Path) -> list[str]:
    names = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name"}

    def word(node: ast.AST) -> str | None:
        if isinstance(node, ast.Constant) and node.value in MESH_AXES:
            return node.value
        name = getattr(node, names.get(type(node), ""), None)
        return name if name in MESH_NAMES else None

    return [
        f"{module.name}:{node.lineno} says {said}: only sharding.py knows the mesh"
        for module in read_modules(root, PACKAGE, PIPELINES).values()
        for node in ast.walk(module.tree)
        if module.name != f"{PACKAGE}.sharding" and (said := word(node))
    ]


def pipelines_across_their_fence(root: Path) -> list[str]:
    faults = []
    for module, other, line in edges(read_modules(root, PACKAGE, PIPELINES)):
        inside, into = (is_in(name, {PIPELINES}) for name in (module.name, other.name))
        if inside and not into and not is_in(other.place, PIPELINES_MAY_USE):
            faults.append(f"{at(module, line)}: data_pipelines may not")
        if into and not inside and not is_in(module.place, MAY_USE_PIPELINES):
            faults.append(f"{at(module, line)}: only train, label and eval may")
    return faults


def python_files(root: Path) -> Iterator[Path]:
    """Those that are ours, by their path in the tree."""
    yield from (path.relative_to(root) for path in sorted(root.glob("*.py")))
    for folder in (PACKAGE, PIPELINES, "benchmarks", "configs", "tests"):
        yield from (path.relative_to(root) for path in sorted((root / folder).rglob("*.py")))


def rag_bags(root: Path) -> list[str]:
    return [
        f"{path}: split by idea, not into a rag-bag"
        for path in python_files(root)
        if RAG_BAGS & {*path.parts, path.stem}
    ]


def long_files(root: Path) -> list[str]:
    return [
        f"{path} has {count} lines, more than {MAX_LINES}"
        for path in python_files(root)
        if (count := len((root / path).read_text().splitlines())) > MAX_LINES
    ]
