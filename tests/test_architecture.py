"""The arrows between the sections of the package, by parsing its imports: see docs/decisions.md.

Imports under ``if TYPE_CHECKING:`` do not count; imports inside functions do.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fipo_megatron"

ENTRY_POINTS = frozenset({"train", "evaluate", "convert", "cli"})
LAYERS = (
    ("report", "slurm", "stress", "compare"),
    ("trainer", "preflight"),
    ("plan",),
    ("actor", "rollout", "reward", "evaluation", "observe", "checkpoint", "moments"),
    ("data", "weights", "config"),
    ("algorithm", "storage", "testing"),
)
"""Sections below the entry points, highest first. A section imports from its own layer and from lower ones."""

FORBIDDEN = {
    ("report", "trainer"): "a report reads the files of runs",
    ("report", "actor"): "a report reads the files of runs",
    ("rollout", "actor"): "an engine is given weights as tensors or files, whoever trains them",
    ("rollout", "reward"): "the sampler is given a function that scores",
    ("observe", "actor"): "what is observed are numbers",
    ("observe", "trainer"): "what is observed are numbers",
    ("evaluation", "actor"): "an evaluation needs an engine, not a trainer",
    ("evaluation", "trainer"): "an evaluation needs an engine, not a trainer",
}
"""Arrows that the layers would allow, and why they are forbidden."""

ALONE = frozenset({"algorithm", "storage", "testing"})
"""Sections that import nothing else of the package."""

OUTSIDE = {
    "algorithm": ("megatron", "torch.distributed", "torch.cuda", "transformer_engine"),
    "data": ("megatron", "torch.distributed", "torch.cuda", "transformer_engine"),
    "weights": ("megatron", "torch.cuda", "transformer_engine", "torch.distributed"),
    "config": ("megatron", "torch.distributed", "torch.cuda", "transformer_engine"),
}
"""Modules of other packages that a section does not import."""

ALLOWED = {
    (
        "fipo_megatron.algorithm.future_kl",
        "torch.distributed",
    ): "context-parallel ranks exchange the sums of their chunks",
    (
        "fipo_megatron.algorithm.loss_statistics",
        "torch.distributed",
    ): "statistics are reduced over the ranks of a batch",
    ("fipo_megatron.weights.torch_dist", "torch.distributed"): "torch_dist is a format of torch.distributed.checkpoint",
}
"""Exceptions to OUTSIDE, and why. An entry that nothing needs fails a test."""

NAMELESS = frozenset({"__init__", "__main__"})
"""File names that are the same in every directory."""


@dataclass(frozen=True)
class Modules:
    """The modules of a package and what they import at run time.

    Attributes:
        name: The package.
        files: Path of each module.
        imports: Dotted names that each module imports: modules of the package as they are, others with the imported
            name, which may be a module or an attribute.
    """

    name: str
    files: dict[str, Path]
    imports: dict[str, frozenset[str]]

    @classmethod
    def read(cls, root: Path) -> Modules:
        files = {}
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        imports = {}
        for name, path in files.items():
            found = imported_names(ast.parse(path.read_text(encoding="utf-8")), name, path.name == "__init__.py")
            # `from package.module import function` imports the module.
            imports[name] = frozenset(
                one if one in files or not one.startswith(f"{root.name}.") else one.rpartition(".")[0] for one in found
            )
        return cls(root.name, files, imports)

    def section(self, module: str) -> str:
        """Returns the name below the package: a section, an entry point, or the empty string for the package itself."""
        return module.partition(".")[2].partition(".")[0]

    def inner(self) -> list[tuple[str, str]]:
        """Returns the imports of modules of the package by modules of the package."""
        return [(one, other) for one, found in self.imports.items() for other in sorted(found) if other in self.files]


def imported_names(tree: ast.Module, module: str, is_package: bool) -> set[str]:
    """Returns the dotted names that a module imports when it is loaded or its functions run, or uses in full."""
    found = set()
    for node in run_time_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".") if is_package else module.split(".")[:-1]
            above = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (above, node.module)))
            found |= {f"{origin}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"torch(\.\w+)+", chain := ast.unparse(node)):
            found.add(chain)
    return found


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yields all nodes except those under ``if TYPE_CHECKING:``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from run_time_nodes(other)
            continue
        yield child
        yield from run_time_nodes(child)


def wrong_arrows(modules: Modules) -> list[str]:
    """Returns imports that lead up the layers, into another entry point, or are forbidden."""
    level = {section: number for number, layer in enumerate(LAYERS) for section in layer}
    wrong = []
    for one, other in modules.inner():
        origin, target = modules.section(one), modules.section(other)
        if origin == target or not target:
            continue
        if origin in ENTRY_POINTS:
            allowed = target in level or origin == "cli"
        else:
            allowed = target in level and level[target] >= level.get(origin, -1)
            allowed = allowed and (origin, target) not in FORBIDDEN and origin not in ALONE
        if not allowed:
            wrong.append(f"{one} -> {other}")
    return wrong


def outside_imports(modules: Modules) -> list[tuple[str, str]]:
    """Returns imports of other packages that a section must not have, as module and forbidden package."""
    return [
        (module, forbidden)
        for module, found in modules.imports.items()
        for forbidden in OUTSIDE.get(modules.section(module), ())
        if any(name == forbidden or name.startswith(f"{forbidden}.") for name in found)
    ]


def circle(modules: Modules) -> list[str]:
    """Returns modules that import each other in a circle; empty if there is none."""
    arrows = {module: [other for one, other in modules.inner() if one == module] for module in modules.files}
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for other in arrows[module]:
            if found := visit(other, [*path, module]):
                return found
        finished.add(module)
        return []

    return next((found for module in arrows if (found := visit(module, []))), [])


def similar_names(modules: Modules) -> list[tuple[str, str]]:
    """Returns modules with the same file name, or with names that differ by one letter; a plural does."""
    named = sorted((path.stem, module) for module, path in modules.files.items() if path.stem not in NAMELESS)
    return [
        (one, other)
        for number, (stem, one) in enumerate(named)
        for other_stem, other in named[number + 1 :]
        if differ_by_at_most_one(stem, other_stem)
    ]


def differ_by_at_most_one(one: str, other: str) -> bool:
    """Returns whether one letter added, removed or replaced makes the words equal."""
    short, long = sorted((one, other), key=len)
    if len(long) - len(short) > 1:
        return False
    same = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    return short[same + (len(short) == len(long)) :] == long[same + 1 :]


def root_modules(modules: Modules) -> set[str]:
    """Returns the names of files in the root of the package."""
    root = modules.files[modules.name].parent
    return {path.stem for path in modules.files.values() if path.parent == root} - NAMELESS


@pytest.fixture(scope="module")
def package():
    return Modules.read(PACKAGE)


def test_every_section_has_a_layer(package):
    known = {section for layer in LAYERS for section in layer}
    sections = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert sections == known


def test_imports_follow_the_arrows(package):
    assert not wrong_arrows(package)


def test_sections_leave_other_packages_alone(package):
    assert not [one for one in outside_imports(package) if one not in ALLOWED]


def test_every_exception_is_needed(package):
    assert set(ALLOWED) <= set(outside_imports(package))


def test_no_modules_import_each_other_in_a_circle(package):
    assert not circle(package)


def test_file_names_are_unlike(package):
    assert not similar_names(package)


def test_the_root_holds_entry_points_only(package):
    assert root_modules(package) <= ENTRY_POINTS


@pytest.fixture
def made_up(tmp_path):
    """Writes a small package from the text of its files; returns its modules."""

    def write(files):
        for name, text in ({"__init__": ""} | files).items():
            path = tmp_path / "fipo_megatron" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Modules.read(tmp_path / "fipo_megatron")

    return write


def test_wrong_arrows_are_noticed(made_up):
    modules = made_up(
        {
            "train": "from fipo_megatron.trainer import trainer\nimport fipo_megatron.evaluate",
            "evaluate": "from fipo_megatron.rollout import engine",
            "cli": "from fipo_megatron import evaluate, train",
            "trainer/trainer": "from fipo_megatron.actor.actor import MegatronActor",
            "actor/actor": "def f():\n    from fipo_megatron.trainer import trainer",
            "rollout/engine": "from fipo_megatron.actor import actor\nfrom fipo_megatron.data import batch",
            "data/batch": "import typing\nif typing.TYPE_CHECKING:\n    from fipo_megatron.actor import actor",
            "data/packing": "from ..actor import actor",
            "algorithm/policy_loss": "import fipo_megatron.storage.atomic",
            "storage/atomic": "import os",
        }
    )
    assert wrong_arrows(modules) == [
        "fipo_megatron.actor.actor -> fipo_megatron.trainer.trainer",
        "fipo_megatron.algorithm.policy_loss -> fipo_megatron.storage.atomic",
        "fipo_megatron.data.packing -> fipo_megatron.actor.actor",
        "fipo_megatron.rollout.engine -> fipo_megatron.actor.actor",
        "fipo_megatron.train -> fipo_megatron.evaluate",
    ]


def test_imports_of_other_packages_are_noticed(made_up):
    modules = made_up(
        {
            "algorithm/policy_loss": "import torch\nfrom torch import distributed",
            "algorithm/future_kl": "import torch\ndef f():\n    torch.cuda.empty_cache()",
            "config/files": "def f():\n    import megatron.core",
            "data/batch": "if TYPE_CHECKING:\n    import megatron.core\nelse:\n    import torch.cuda",
            "actor/actor": "import megatron.core, torch.distributed",
            "weights/tables": "import megatronic",
        }
    )
    assert outside_imports(modules) == [
        ("fipo_megatron.algorithm.future_kl", "torch.cuda"),
        ("fipo_megatron.algorithm.policy_loss", "torch.distributed"),
        ("fipo_megatron.config.files", "megatron"),
        ("fipo_megatron.data.batch", "torch.cuda"),
    ]


def test_circles_are_noticed(made_up):
    straight = {"data/a": "import fipo_megatron.data.b", "data/b": "from fipo_megatron.data import c", "data/c": ""}
    assert circle(made_up(straight)) == []
    found = circle(made_up(straight | {"data/c": "def f():\n    from fipo_megatron.data.a import g"}))
    assert found == ["fipo_megatron.data.a", "fipo_megatron.data.b", "fipo_megatron.data.c", "fipo_megatron.data.a"]


def test_names_and_files_in_the_root_are_noticed(made_up):
    names = ["train", "helpers", "actor/weight", "rollout/weights", "actor/__init__", "data/__init__"]
    names += ["report/__main__", "report/summary", "evaluation/summary", "data/batch", "data/match", "data/catches"]
    modules = made_up(dict.fromkeys(names, ""))
    assert root_modules(modules) == {"train", "helpers"}
    assert [(one.rpartition(".")[2], other.rpartition(".")[2]) for one, other in similar_names(modules)] == [
        ("batch", "match"),
        ("summary", "summary"),
        ("weight", "weights"),
    ]
