"""What may not be written in medm: ways by which an untrusted file runs code, and libraries that
are not there.

Annotation files, images, archives and checkpoints are untrusted input. A rule that is only
remembered gets forgotten.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("medm", "scripts", "examples", "benchmarks", "docs")

MAY_TORCH_LOAD = {"medm/models/published/weights.py", "medm/training/checkpoints.py"}
"""The modules that read torch files, always with `weights_only=True`."""
MAY_EXTRACT = {"examples/quickstart/fetch.py": "its archives are pinned by SHA-256"}

FORBIDDEN_IMPORTS = {
    "pickle": "runs code of the file's author",
    "cloudpickle": "runs code of the file's author",
    "dill": "runs code of the file's author",
    "joblib": "reads pickles",
    "shelve": "reads pickles",
    "marshal": "is not safe on untrusted data",
    "torchvision": "is not a dependency: no CPU build matches every torch",
    "timm": "needs torchvision",
    "open_clip": "needs torchvision",
    "evaluate": "fetches metric code from a hub when it runs",
}
HARMLESS_IMPORTS = [("pickle", ["UnpicklingError"])]
"""What `torch.load(weights_only=True)` raises on a file that would run code."""
FORBIDDEN_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "yaml.load": "may build any object; use medm.config.read_yaml",
    "yaml.unsafe_load": "builds any object",
    "yaml.full_load": "may build any object",
    "torch.hub.load": "fetches and runs code",
}
FORBIDDEN_METHODS = {
    "extractall": "writes wherever the archive says; check every member's path and size"
}
FORBIDDEN_TRUE = {
    "trust_remote_code": "runs code of a checkpoint's author",
    "allow_pickle": "runs code of the file's author",
    "shell": "lets file names be commands",
    "unsafe_load": "reads pickles",
}


def problems(source: str, place: str) -> Iterator[str]:
    """Every forbidden thing in a source text, one sentence each."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module, [a.name for a in node.names]) in HARMLESS_IMPORTS
        ):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            for top in {module.split(".")[0] for module in modules} & set(FORBIDDEN_IMPORTS):
                yield f"{place}:{line} imports {top}, which {FORBIDDEN_IMPORTS[top]}"
        elif isinstance(node, ast.Call):
            yield from _call_problems(node, place)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if (
                    isinstance(key, ast.Constant)
                    and key.value in FORBIDDEN_TRUE
                    and _is_true(value)
                ):
                    yield f"{place}:{line} sets {key.value}, which {FORBIDDEN_TRUE[key.value]}"
        elif isinstance(node, ast.Attribute) and node.attr == "LOAD_TRUNCATED_IMAGES":
            yield f"{place}:{line} lets half an image pass for a whole one"


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _call_problems(node: ast.Call, place: str) -> Iterator[str]:
    name, keywords = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
    if name in FORBIDDEN_CALLS:
        yield f"{place}:{node.lineno} calls {name}, which {FORBIDDEN_CALLS[name]}"
    sifted = place in MAY_EXTRACT or (
        "filter" in keywords and ast.unparse(keywords["filter"]) == "'data'"
    )  # tarfile's
    if isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN_METHODS and not sifted:
        yield (
            f"{place}:{node.lineno} calls {node.func.attr}, which "
            f"{FORBIDDEN_METHODS[node.func.attr]}"
        )
    for key in FORBIDDEN_TRUE.keys() & keywords.keys():
        if _is_true(keywords[key]):
            yield f"{place}:{node.lineno} passes {key}=True, which {FORBIDDEN_TRUE[key]}"
    opens = (
        place.startswith("medm/") and name.startswith("Auto") and name.endswith(".from_pretrained")
    )
    if opens and ast.unparse(keywords.get("trust_remote_code", ast.Constant(None))) != "False":
        yield (
            f"{place}:{node.lineno} leaves trust_remote_code open, and transformers asks on a "
            "terminal; pass False"
        )
    if name == "torch.load":
        if place not in MAY_TORCH_LOAD:
            yield (
                f"{place}:{node.lineno} calls torch.load; only "
                f"{', '.join(sorted(MAY_TORCH_LOAD))} may"
            )
        elif "weights_only" not in keywords or not _is_true(keywords["weights_only"]):
            yield f"{place}:{node.lineno} calls torch.load without weights_only=True"


def test_nothing_forbidden_is_written() -> None:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    found = [
        sentence
        for path in files
        for sentence in problems(path.read_text("utf-8"), path.relative_to(ROOT).as_posix())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import UnpicklingError, loads",
        "from cloudpickle import loads",
        "import torchvision.transforms as T",
        "from timm import create_model",
        "import open_clip",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "eval(text)",
        "exec(text)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "yaml.load(text, Loader=yaml.Loader)",
        "archive.extractall(folder)",
        "ImageFile.LOAD_TRUNCATED_IMAGES = True",
        "AutoConfig.from_pretrained(path)",
    ],
)
def test_the_rule_sees(source: str) -> None:
    assert list(problems(source, "medm/data/sources.py"))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "np.load(path, allow_pickle=False)",
        "loader(trust_remote_code=False)",
        "AutoConfig.from_pretrained(path, trust_remote_code=False)",
        "subprocess.run([command], shell=False)",
        "def evaluate(): ...",
        "from medm.evaluation import runner",
        "from pickle import UnpicklingError",
        "archive.extractall(folder, filter='data')",
    ],
)
def test_the_rule_lets_pass(source: str) -> None:
    assert not list(problems(source, "medm/data/sources.py"))


def test_torch_load_is_safe_where_it_is_allowed() -> None:
    place = "medm/models/published/weights.py"
    assert not list(problems("torch.load(path, weights_only=True)", place))
    assert list(problems("torch.load(path)", place))
    assert list(problems("torch.load(path, weights_only=False)", place))
