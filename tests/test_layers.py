"""The house: imports go down only, siblings never import each other, and what reads a recipe needs
no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "medm"

# fmt: off
LAYERS: list[set[str]] = [
    {
        "errors", "os_errors", "config", "registry", "types", "stopping", "children", "launcher", "distributed", "files", "limits",
        "slurm", "transformers_hook", "environment",
    },
    {"encoders", "text_encoders", "connectors", "llms", "heads", "knowledge", "imaging", "metrics"},
    {"models", "data"},
    {"objectives", "tasks"},
    {"training", "inference"},
    {"serving", "evaluation", "api"},
    {"cli"},
    {"__main__"},
]
# fmt: on
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FOUNDATION = LAYERS[0]

EXCEPTIONS: dict[tuple[str, str], str] = {
    (
        "medm",
        "transformers_hook",
    ): "`import medm` makes transformers' Auto classes open medm's folders",
    ("medm", "api"): "`medm.load`, imported when it is first used",
    (
        "medm.transformers_hook",
        "models",
    ): "registers the classes when transformers first meets a folder of medm",
}
"""(importer's module, imported room): why this one may look up or sideways."""

TORCH_FREE_MODULES = (
    "errors",
    "os_errors",
    "config",
    "registry",
    "types",
    "stopping",
    "children",
    "environment",
    "launcher",
    "files",
    "slurm",
    "limits",
    "cli",
)
HEAVY = ("torch", "transformers", "deepspeed", "monai", "peft", "SimpleITK")


@dataclass(frozen=True)
class Import:
    """One import of one module by another."""

    importer: str
    imported: str
    line: int
    names: tuple[str, ...] = ()
    """What is taken from it by `from ... import`."""


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, importer: str, *, is_package: bool) -> Iterator[Import]:
    """Every import of medm in a source text, wherever it stands."""

    def visit(node: ast.AST) -> Iterator[Import]:
        taken: tuple[str, ...] = ()
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = importer.split(".") if is_package else importer.split(".")[:-1]
                base = ".".join(
                    [*package[: len(package) - node.level + 1], *([base] if base else [])]
                )
            # `from medm import encoders` names a room in its second half
            names = [f"medm.{alias.name}" for alias in node.names] if base == "medm" else [base]
            taken = () if base == "medm" else tuple(alias.name for alias in node.names)
        else:
            names = []
        for name in names:
            if name.split(".")[0] == "medm":
                yield Import(importer, name, getattr(node, "lineno", 0), taken)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(source))


def all_imports() -> list[Import]:
    return [
        found
        for path in sorted(PACKAGE.rglob("*.py"))
        for found in imports_of(
            path.read_text("utf-8"), module_name(path), is_package=path.name == "__init__.py"
        )
    ]


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (parts[1] in LEVEL) else "medm"


def violation(found: Import) -> str | None:
    """What is wrong with an import, in a sentence; None where it is allowed."""
    source, target = room(found.importer), room(found.imported)
    if target == "medm" or source == target or (found.importer, target) in EXCEPTIONS:
        return None
    if source in FOUNDATION and target in FOUNDATION:
        return None
    if source == "medm":
        return (
            f"{found.importer}:{found.line} imports {found.imported}; the package itself loads no "
            "room"
        )
    if LEVEL[target] > LEVEL[source]:
        return f"{found.importer}:{found.line} imports {found.imported}, which stands above it"
    if LEVEL[target] == LEVEL[source]:
        return f"{found.importer}:{found.line} imports {found.imported}, its sibling"
    return None


def test_imports_go_down_only() -> None:
    wrong = [sentence for found in all_imports() if (sentence := violation(found))]
    assert not wrong, "\n".join(wrong)


def test_every_folder_of_the_package_has_its_place() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert folders | modules <= set(LEVEL), (
        f"give these a line in LAYERS: {sorted((folders | modules) - set(LEVEL))}"
    )


@pytest.mark.parametrize(
    ("importer", "source", "allowed"),
    [
        ("medm.connectors.mlp", "from medm.encoders.base import VisionEncoder", False),
        ("medm.connectors.mlp", "import medm.llms", False),
        ("medm.connectors.mlp", "from medm import llms", False),
        ("medm.connectors.mlp", "from ..encoders import base", False),
        ("medm.connectors.mlp", "def f():\n    from medm.models import lvlm", False),
        ("medm.connectors.mlp", "if TYPE_CHECKING:\n    from medm.data import sources", False),
        ("medm.registry", "from medm.connectors import CONNECTORS", False),
        ("medm.training.trainer", "from medm.inference import batch", False),
        ("medm.serving.worker", "from medm.evaluation import runner", False),
        ("medm.inference.batch", "from medm.evaluation.options import EvalOptions", False),
        ("medm.evaluation.runner", "from medm.inference.batch import infer", True),
        ("medm.connectors.mlp", "from .base import Connector", True),
        ("medm.connectors.mlp", "from medm.types import VisionFeatures", True),
        ("medm.models.lvlm.modeling", "from medm.encoders import ENCODERS", True),
        ("medm.registry", "from medm.config import Options", True),
        ("medm.cli.train", "from medm import __version__", True),
    ],
)
def test_the_rule_itself(importer: str, source: str, allowed: bool) -> None:
    found = list(imports_of(source, importer, is_package=False))
    assert found
    assert all(violation(item) is None for item in found) is allowed


def file_graph(files: dict[str, tuple[str, bool]]) -> dict[str, set[str]]:
    """The modules that each module imports, lazy and type-only imports included.

    Args:
        files: source text by module, and whether it is a package.
    """
    graph: dict[str, set[str]] = {}
    for module, (source, is_package) in files.items():
        found: set[str] = set()
        for item in imports_of(source, module, is_package=is_package):
            # `from medm.models import verified` means the module medm.models.verified, where there
            # is one
            members = {f"{item.imported}.{name}" for name in item.names}
            found |= {member for member in members if member in files}
            if item.imported in files and (not members or not members <= files.keys()):
                found.add(item.imported)
        graph[module] = found - {module}
    return graph


def cycle_of(graph: dict[str, set[str]]) -> list[str]:
    """The first cycle of a graph, as a path whose ends are equal; empty where there is none."""
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for imported in sorted(graph[module]):
            if cycle := walk(imported, (*path, module)):
                return cycle
        done.add(module)
        return []

    return next((cycle for module in sorted(graph) if (cycle := walk(module, ()))), [])


def test_no_file_imports_itself_through_others() -> None:
    """A file of a cycle can be neither read nor tested without the others; a lazy import only hides
    that."""
    files = {
        module_name(path): (path.read_text("utf-8"), path.name == "__init__.py")
        for path in PACKAGE.rglob("*.py")
    }
    graph = file_graph(files)
    for importer, target in EXCEPTIONS:
        room_modules = {name for name in graph[importer] if room(name) == target}
        graph[importer] -= room_modules
    assert not (cycle := cycle_of(graph)), "import cycle: " + " -> ".join(cycle)


@pytest.mark.parametrize(
    "second",
    [
        "from medm.data.first import one",
        "def f():\n    from medm.data import first",
        "if TYPE_CHECKING:\n    import medm.data.first",
        "from . import first",
    ],
)
def test_every_kind_of_cycle_is_found(second: str) -> None:
    files = {
        "medm.data": ("", True),
        "medm.data.first": ("from medm.data.second import two", False),
    }
    assert not cycle_of(
        file_graph(files | {"medm.data.second": ("from medm.data import other", False)})
    )
    assert cycle_of(file_graph(files | {"medm.data.second": (second, False)}))


def run_and_list_heavy(code: str) -> str:
    """The heavy libraries that are loaded after `code` has run in a fresh interpreter, as printed
    by it."""
    script = f"import sys\n{code}\nprint('HEAVY', sorted({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_tables_and_options_load_without_torch() -> None:
    """Names, options and recipes are read by people who wait for the answer."""
    rooms = [f"medm.{path.parent.name}" for path in sorted(PACKAGE.glob("*/__init__.py"))]
    options = [module_name(path) for path in sorted(PACKAGE.rglob("options.py"))]
    foundation = [f"medm.{name}" for name in TORCH_FREE_MODULES]
    code = "import importlib\n" + "\n".join(
        f"importlib.import_module({name!r})\nassert 'torch' not in sys.modules, 'loaded by ' + "
        f"{name!r}"
        for name in [*foundation, *rooms, *options]
    )
    assert run_and_list_heavy(code) == "HEAVY []"
