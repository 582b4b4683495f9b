"""Private names of other libraries that medm overrides, calls or reads: each named and checked.

A private name may change in any release. `TABLE` names all of them, with place and reason. One
test checks that the installed release still has them; another finds uses in medm/ that TABLE lacks.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
LIBRARIES = {"transformers", "accelerate", "peft", "torch", "deepspeed", "liger_kernel"}
READ_AS_SOURCE = {"deepspeed", "liger_kernel"}
"""Libraries that are slow to import, or optional: their source text is searched instead."""
NAMED_TUPLE = {"_replace", "_asdict", "_fields", "_make"}
"""Public in spite of the underscore (collections.namedtuple)."""


@dataclass(frozen=True)
class PrivateInterface:
    """One private name of a library."""

    path: str
    """Dotted path from the library's top package to what is used."""
    used_in: tuple[str, ...]
    """Files of medm/ that use it."""
    why: str
    parameters: tuple[str, ...] | None = None
    """Names of all parameters; a last "..." allows more behind them. None: not called by medm."""
    keyword: str | None = None
    """A private parameter of a public function at `path`."""

    @property
    def name(self) -> str:
        """The private name as it stands in the source of medm."""
        return self.keyword or next(part for part in self.path.split(".") if is_private(part))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != ""


RESUMABLE = ("medm/training/resumable.py",)
TRAINER = ("medm/training/trainer.py",)

TABLE = [
    PrivateInterface(
        "torch.distributed.distributed_c10d._set_pg_timeout",
        ("medm/distributed.py",),
        "transformers leaves ddp_timeout out where use_cpu is set; torch has no public setter",
        parameters=("timeout", "group"),
    ),
    # Trainer: overridden
    PrivateInterface(
        "transformers.Trainer._save_checkpoint",
        RESUMABLE,
        "checkpoints are staged, agreed on by all ranks, and committed by one rename",
        parameters=("self", "model", "trial"),
    ),
    PrivateInterface(
        "transformers.Trainer._save",
        RESUMABLE,
        "safetensors, config and processor; transformers adds training_args.bin, which is a pickle",
        parameters=("self", "output_dir", "state_dict"),
    ),
    PrivateInterface(
        "transformers.Trainer._load_from_checkpoint",
        RESUMABLE,
        "refuses missing and unknown tensors; transformers warns",
        parameters=("self", "resume_from_checkpoint", "model"),
    ),
    PrivateInterface(
        "transformers.Trainer._load_best_model",
        RESUMABLE,
        "waits for the checkpoint in work and verifies it",
        parameters=("self",),
    ),
    PrivateInterface(
        "transformers.Trainer._maybe_log_save_evaluate",
        TRAINER,
        "the only place that sees the gradient norm before a step is saved; a non-finite one stops",
        parameters=("self", "tr_loss", "grad_norm", "..."),
    ),
    PrivateInterface(
        "transformers.Trainer._prepare_input",
        TRAINER,
        "copies pinned memory to the GPU without waiting",
        parameters=("self", "data"),
    ),
    # Trainer: called
    PrivateInterface(
        "transformers.Trainer._prepare_inputs",
        TRAINER,
        "moves a held-out batch to the device as transformers' prediction_step does",
        parameters=("self", "inputs"),
    ),
    PrivateInterface(
        "transformers.Trainer._save_optimizer_and_scheduler",
        RESUMABLE,
        "state of DeepSpeed and FSDP, whose format is that of their engines",
        parameters=("self", "output_dir"),
    ),
    PrivateInterface(
        "transformers.Trainer._save_scaler",
        RESUMABLE,
        "the fp16 loss scale, where train() reads it on resume",
        parameters=("self", "output_dir"),
    ),
    PrivateInterface(
        "transformers.Trainer._save_rng_state",
        RESUMABLE,
        "random states of each rank, where train() reads them on resume",
        parameters=("self", "output_dir"),
    ),
    PrivateInterface(
        "transformers.Trainer.save_model",
        RESUMABLE,
        "a save inside a checkpoint pushes nothing to a hub",
        parameters=("self", "output_dir", "_internal_call"),
        keyword="_internal_call",
    ),
    PrivateInterface(
        "transformers.TrainingArguments._n_gpu",
        ("medm/training/arguments.py",),
        "keeps Trainer from wrapping the model in DataParallel; no public option does",
    ),
    # Models and configs of transformers
    PrivateInterface(
        "transformers.PreTrainedModel._init_weights",
        ("medm/models/base.py",),
        "parts initialize themselves; transformers must not do it again",
        parameters=("self", "module"),
    ),
    PrivateInterface(
        "transformers.PreTrainedModel._adjust_missing_and_unexpected_keys",
        ("medm/models/base.py",),
        "begins with fresh training-only state where a folder has none, before the report of "
        "missing weights",
        parameters=("self", "loading_info"),
    ),
    PrivateInterface(
        "transformers.PreTrainedModel._supports_sdpa",
        ("medm/models/lvlm/modeling.py",),
        "declares what the language model inside is allowed to use",
    ),
    PrivateInterface(
        "transformers.PreTrainedModel._supports_flash_attn",
        ("medm/models/lvlm/modeling.py",),
        "declares what the language model inside is allowed to use",
    ),
    PrivateInterface(
        "transformers.PreTrainedModel._supports_flex_attn",
        ("medm/models/lvlm/modeling.py",),
        "declares what the language model inside is allowed to use",
    ),
    PrivateInterface(
        "transformers.PreTrainedModel._supports_attention_backend",
        ("medm/llms/attention.py", "medm/models/lvlm/modeling.py"),
        "tells whether a model takes its attention from the table of attention functions",
    ),
    PrivateInterface(
        "transformers.PreTrainedConfig._attn_implementation",
        (
            "medm/heads/sam2_memory_modules.py",
            "medm/llms/attention.py",
            "medm/models/checkpoint.py",
            "medm/models/lvlm/build.py",
            "medm/models/lvlm/modeling.py",
        ),
        "the attention in use; cleared on loading, since a folder may name a kernel of a hub",
    ),
    PrivateInterface(
        "transformers.PreTrainedConfig._experts_implementation",
        ("medm/models/checkpoint.py",),
        "cleared on loading, since a folder may name a kernel of a hub",
    ),
    PrivateInterface(
        "transformers.PreTrainedConfig._name_or_path",
        (
            "medm/models/export/llava.py",
            "medm/models/lvlm/build.py",
            "medm/models/published/importing.py",
            "medm/models/published/source_configs.py",
        ),
        "cleared before saving: it is a path of the machine that built the model",
    ),
    PrivateInterface(
        "transformers.modeling_layers.GradientCheckpointingLayer._gradient_checkpointing_func",
        ("medm/training/parts.py",),
        "switches recomputation on in medm's own blocks, which no PreTrainedModel owns",
    ),
    PrivateInterface(
        "transformers.LlavaProcessor._get_num_multimodal_tokens",
        ("medm/models/export/stock_check.py",),
        "number of placeholders of an exported model, as vLLM asks for it",
        parameters=("self", "image_sizes", "..."),
    ),
    PrivateInterface(
        "transformers.utils.hub.cached_files",
        ("medm/models/published/weights.py",),
        "an optional file that is absent gives None and no error",
        parameters=("path_or_repo_id", "filenames", "..."),
        keyword="_raise_exceptions_for_missing_entries",
    ),
    # Auto classes (docs/decisions/007-transformers-hook.md)
    PrivateInterface(
        "transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content",
        ("medm/transformers_hook.py",),
        "the table of registered configs is replaced by one that asks medm",
    ),
    PrivateInterface(
        "transformers.models.auto.processing_auto.PROCESSOR_MAPPING._extra_content",
        ("medm/transformers_hook.py",),
        "the table of registered processors is replaced by one that asks medm",
    ),
    # torch
    PrivateInterface(
        "torch._assert_async",
        ("medm/connectors/moe.py", "medm/models/lvlm/scatter.py"),
        "checks on the GPU without waiting for it",
    ),
    PrivateInterface(
        "torch._dynamo.mark_static_address",
        ("medm/inference/kv_cache.py",),
        "the KV cache stays in place, so CUDA graphs do not copy it at each step",
        parameters=("t", "..."),
    ),
    PrivateInterface(
        "torch.nn.modules.batchnorm._BatchNorm",
        (
            "medm/encoders/batch_norm.py",
            "medm/encoders/efficientnet_lite.py",
            "medm/encoders/i3d_resnet.py",
        ),
        "base class of batch norm for any number of axes",
        parameters=("num_features", "eps", "momentum", "affine", "..."),
    ),
    PrivateInterface(
        "torch.ops.mkldnn._reorder_linear_weight",
        ("medm/inference/prepacked_head.py",),
        "packs the weight of the LM head once for all decode steps on a CPU",
        parameters=("self", "batch_size"),
    ),
    PrivateInterface(
        "torch.ops.mkldnn._linear_pointwise",
        ("medm/inference/prepacked_head.py",),
        "multiplies with the packed weight",
        parameters=("X", "W", "B", "attr", "scalars", "algorithm"),
    ),
    PrivateInterface(
        "torch.UntypedStorage._cdata",
        ("medm/models/activations.py",),
        "identity of a storage that also meta tensors have; data_ptr() is 0 for them",
    ),
    # Optional libraries
    PrivateInterface(
        "deepspeed.runtime.engine.DeepSpeedEngine._zero3_consolidated_16bit_state_dict",
        ("medm/training/deepspeed.py",),
        "weights in full size under ZeRO-3 without writing them to a file",
        parameters=("self", "..."),
    ),
    PrivateInterface(
        "liger_kernel.transformers._apply_liger_kernel_to_instance",
        ("medm/training/kernels.py",),
        "patches one language model; the public functions patch classes of transformers",
    ),
]

NAMES = {interface.name for interface in TABLE}


# What the installed libraries have ---------------------------------------------------------------


def source_problem(interface: PrivateInterface) -> str | None:
    """Search the source of a library without importing it; skip the test where it is absent."""
    library = interface.path.split(".")[0]
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        pytest.skip(f"{library} is not installed")
    *modules, name = [part for part in interface.path.split(".") if part.islower()]
    base = Path(spec.origin).parent.joinpath(*modules[1:])
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    source = file.read_text("utf-8") if file.is_file() else ""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return parameter_problem(interface, [argument.arg for argument in node.args.args])
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return None
    return f"{interface.path} is not defined in {file}"


def parameter_problem(interface: PrivateInterface, found: list[str]) -> str | None:
    expected = list(interface.parameters or ())
    if interface.parameters is None:
        return None
    if expected[-1] == "...":
        expected.pop()
        found = found[: len(expected)]
    if found == expected:
        return None
    return f"{interface.path}: expected the parameters {expected}, found {found}"


def parameters_of(value: Any) -> list[str]:
    """Names of parameters; of the first overload where `value` is an operator of torch."""
    if overload := getattr(value, "default", None):
        return [argument.name for argument in overload._schema.arguments]
    return list(inspect.signature(value).parameters)


def resolve(path: str) -> Any:
    """Import the longest module of a dotted path and follow the attributes behind it."""
    parts = path.split(".")
    value, position = importlib.import_module(parts[0]), 1
    for position in range(1, len(parts)):
        try:
            value = importlib.import_module(".".join(parts[: position + 1]))
        except ImportError:
            break
    else:
        position = len(parts)
    for part in parts[position:]:
        value = getattr(value, part)
    return value


def has(owner: Any, name: str) -> bool:
    """Whether a class or object has an attribute, those that its methods set on `self` included."""
    if hasattr(owner, name):
        return True
    classes = owner.__mro__ if isinstance(owner, type) else ()
    return any(name in names_on_self(cls) for cls in classes)


@functools.cache
def names_on_self(cls: type) -> set[str]:
    """Private names that methods of a library's class set or read on `self`."""
    if cls.__module__.split(".")[0] not in LIBRARIES:
        return set()
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # built in C
        return set()
    return set(re.findall(r"\bself\.(_(?!_)\w+)", source))


def problem(interface: PrivateInterface) -> str | None:
    """Say what the installed release lacks; None where medm's use still works."""
    if interface.path.split(".")[0] in READ_AS_SOURCE:
        return source_problem(interface)
    owner, _, name = interface.path.rpartition(".")
    try:
        holder = resolve(owner)
    except (ImportError, AttributeError) as error:
        return f"{owner} is gone ({error})"
    if not has(holder, name):
        return f"{interface.path} is gone"
    if interface.parameters is None and interface.keyword is None:
        return None
    found = parameters_of(getattr(holder, name))
    if interface.keyword is not None and interface.keyword not in found:
        return f"{interface.path} has no parameter {interface.keyword}, only {found}"
    return parameter_problem(interface, found)


@pytest.mark.parametrize("interface", TABLE, ids=lambda interface: interface.path)
def test_installed_release_has_it(interface: PrivateInterface) -> None:
    if interface.path.startswith("torch.ops.mkldnn"):
        torch = importlib.import_module("torch")
        if not torch.backends.mkldnn.is_available():
            pytest.skip("torch is built without oneDNN, and medm packs no head")
    assert (found := problem(interface)) is None, (
        f"{found}. medm uses it in {', '.join(interface.used_in)}: {interface.why}"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"path": "transformers.Trainer._write_checkpoint_files"},
        {"path": "transformers.NoSuchTrainer._save_checkpoint"},
        {"path": "transformers.no_such_module.Trainer._save_checkpoint"},
        {"path": "deepspeed.runtime.engine.DeepSpeedEngine._no_such_method"},
        {"parameters": ("self", "model")},
        {"parameters": ("self", "model", "trial", "metrics")},
        {"parameters": ("self", "trial", "model")},
        {"parameters": ("self", "trial", "...")},
        {"keyword": "_no_such_keyword"},
    ],
)
def test_a_release_without_it_is_noticed(change: dict[str, Any]) -> None:
    trainer = next(one for one in TABLE if one.path == "transformers.Trainer._save_checkpoint")
    assert problem(trainer) is None
    assert problem(replace(trainer, **change))


# What medm uses ----------------------------------------------------------------------------------


class Use(NamedTuple):
    """A private name of a library in one file of medm."""

    file: str
    name: str


@dataclass
class ScannedClass:
    """A class of medm."""

    bases: list[str]
    """Dotted paths, as the imports of its file give them."""
    own: set[str]
    """Names that its body and its methods define."""


@dataclass
class ScannedFile:
    """What one file of medm defines and imports."""

    tree: ast.Module
    imports: dict[str, str] = field(default_factory=dict)
    """Local name to dotted path."""
    classes: dict[str, ScannedClass] = field(default_factory=dict)
    defined: set[str] = field(default_factory=set)
    """Every name that the file gives to something of its own."""


def scan_file(source: str) -> ScannedFile:
    found = ScannedFile(ast.parse(source))
    for node in ast.walk(found.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                found.imports[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found.imports[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.ClassDef):
            bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
            paths = [dotted(base, found.imports) for base in bases]
            found.classes[node.name] = ScannedClass(paths, defined_in(node))
    found.defined = defined_in(found.tree)
    return found


def module_name(path: str) -> str:
    """Return the module of a file: medm/data/__init__.py is medm.data."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def dotted(node: ast.expr, imports: Mapping[str, str]) -> str:
    """Return an expression like `nn.Module` as a dotted path, by the imports of its file."""
    first, _, rest = ast.unparse(node).partition(".")
    return ".".join(filter(None, [imports.get(first, first), rest]))


def defined_in(scope: ast.AST) -> set[str]:
    """Names of functions, classes, parameters and variables, and attributes set on `self`."""
    names: set[str] = set()
    for node in ast.walk(scope):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) in ("self", "cls")
        ):
            names.add(node.attr)
    return names


class Scan:
    """The private names of libraries that some source files use.

    Args:
        sources: source text by path below the repository's root.
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.files = {path: scan_file(source) for path, source in sources.items()}
        self.modules = {module_name(path): path for path in self.files}

    def uses(self) -> set[Use]:
        return {Use(path, name) for path in self.files for name in self._names(path)}

    def _names(self, path: str) -> Iterator[str]:
        file = self.files[path]
        for name in file.classes:
            own, bases = file.classes[name].own, self._library_bases(path, name)
            for one in filter(is_private, own):
                if any(has(base, one) for base in bases):
                    yield one
        yield from self._visit(path, file.tree, None)

    def _visit(self, path: str, node: ast.AST, cls: str | None) -> Iterator[str]:
        if isinstance(node, ast.ClassDef):
            cls = node.name
        for name in self._candidates(node):
            if self._is_of_a_library(path, node, name, cls):
                yield name
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imported_private_names(node)
        for child in ast.iter_child_nodes(node):
            yield from self._visit(path, child, cls)

    @staticmethod
    def _candidates(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg and is_private(node.arg):
            yield node.arg
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # An attribute that is named by a string: getattr(x, "_name"), config.pop("_name").
            if node.value in NAMES:
                yield node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
            "attrgetter",
            "operator.attrgetter",
        ):
            strings = [a.value for a in node.args if isinstance(a, ast.Constant)]
            yield from (text for text in strings if isinstance(text, str) and is_private(text))

    def _is_of_a_library(self, path: str, node: ast.AST, name: str, cls: str | None) -> bool:
        file = self.files[path]
        if not isinstance(node, ast.Attribute):
            return name not in file.defined
        receiver = ast.unparse(node.value)
        if cls is not None and receiver in ("self", "cls", "super()"):
            chain = self._chain(path, cls)
            bases = self._library_bases(path, cls)
            if receiver == "super()":
                chain = chain[1:]
            if any(name in self.files[p].classes[c].own for p, c in chain):
                return False
            return bool(bases) or name not in file.defined
        library = dotted(node.value, file.imports).split(".")[0]
        if receiver.split(".")[0] in file.imports and library not in LIBRARIES:
            return False
        return name not in NAMED_TUPLE and name not in file.defined

    def _chain(self, path: str, cls: str) -> list[tuple[str, str]]:
        """The class and its ancestors in medm, as file and name."""
        chain = [(path, cls)]
        for base in self.files[path].classes[cls].bases:
            if found := self._find(path, base):
                chain += self._chain(*found)
        return chain

    def _find(self, path: str, base: str) -> tuple[str, str] | None:
        """Follow a dotted path through re-exports to a class of medm."""
        if base in self.files[path].classes:
            return path, base
        module, _, name = base.rpartition(".")
        if module not in self.modules:
            return None
        target = self.modules[module]
        if name in self.files[target].classes:
            return target, name
        further = self.files[target].imports.get(name)
        return self._find(target, further) if further else None

    def _library_bases(self, path: str, cls: str) -> list[Any]:
        """Classes of the libraries that a class of medm stands on."""
        bases = {base for p, c in self._chain(path, cls) for base in self.files[p].classes[c].bases}
        return [resolve(base) for base in sorted(bases) if base.split(".")[0] in LIBRARIES]


def imported_private_names(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom):
        paths = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        paths = [alias.name for alias in node.names]
    for path in paths:
        if path.split(".")[0] in LIBRARIES:
            yield from (part for part in path.split(".") if is_private(part))


def test_table_names_every_use_in_medm() -> None:
    sources = {
        path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
        # sorted, so that a failure reads the same everywhere
        for path in sorted((ROOT / "medm").rglob("*.py"))
    }
    used = Scan(sources).uses()
    named = {Use(file, interface.name) for interface in TABLE for file in interface.used_in}
    unnamed, unused = sorted(used - named), sorted(named - used)
    assert not unnamed, f"give these an entry in TABLE, or use a public name: {unnamed}"
    assert not unused, f"remove these from TABLE, nothing uses them: {unused}"


BASE = "from transformers import Trainer\nclass Base(Trainer):\n    def _own(self): ...\n"
T = "from medm.base import Base\nclass T(Base):\n"
REEXPORTED = "from medm import Base\nclass T(Base):\n"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from torch.nn.modules.conv import _ConvNd", "_ConvNd"),
        ("import torch._inductor.config", "_inductor"),
        ("def f():\n    from torch._C import x", "_C"),
        ("import torch as t\nt._foreach_add(a, b)", "_foreach_add"),
        ("import torch\ntorch._dynamo.reset()", "_dynamo"),
        ("config._commit_hash = None", "_commit_hash"),
        ("model.config.get_text_config()._commit_hash", "_commit_hash"),
        ("getattr(config, '_commit_hash', None)", "_commit_hash"),
        ("setattr(config, '_commit_hash', None)", "_commit_hash"),
        ("config.pop('_name_or_path')", "_name_or_path"),
        ("cached_file(path, _commit_hash=None)", "_commit_hash"),
        (T + "    def _tune_save_checkpoint(self): ...", "_tune_save_checkpoint"),
        (T + "    def f(self):\n        self._wrap_model(1)",
         "_wrap_model"),
        (T + "    def _save(self):\n        super()._save()",
         "_save"),
        (REEXPORTED + "    def f(self):\n        self._signature_columns = []",
         "_signature_columns"),
        ("class Other:\n    def _tune(self): ...\nfrom medm.base import Base\nclass T(Base):\n"
         "    def f(self):\n        self._tune()", "_tune"),
        ("from torch import nn\nclass M(nn.Module):\n    _version = 3", "_version"),
        ("from torch.utils.data import Dataset\nclass D(Dataset[int]):\n    def f(self):\n"
         "        return self._is_protocol", "_is_protocol"),
    ],
)  # fmt: skip
def test_scan_finds(source: str, name: str) -> None:
    package = {"medm/base.py": BASE, "medm/__init__.py": "from medm.base import Base\n"}
    assert Use("medm/new.py", name) in Scan({**package, "medm/new.py": source}).uses()


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos._exit(0)",
        "from medm.base import _helper",
        "class A:\n    def _f(self): ...\n    def g(self, b):\n        b._f()\n        self._f()",
        "output._replace(metrics={})",
        "import torch\n__all__ = [torch.__version__]",
        T + "    def f(self):\n        self._own()",
        REEXPORTED + "    def _own(self):\n        super()._own()",
        "from torch import nn\nclass M(nn.Module):\n    def _mine(self):\n        self._also = 1",
        "def f(_seed): ...\nf(_seed=1)",
        "suffix = '_labels'",
        "for _ in range(3): ...",
    ],
)
def test_scan_lets_pass(source: str) -> None:
    package = {"medm/base.py": BASE, "medm/__init__.py": "from medm.base import Base\n"}
    assert Scan({**package, "medm/new.py": source}).uses() == set()
