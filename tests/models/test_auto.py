"""`import medm` is enough for transformers' Auto classes: whichever is imported first, whatever is
opened first."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest
from transformers import AutoTokenizer, PreTrainedConfig

import medm.models
from medm import registry, transformers_hook
from medm.config import validate
from medm.models import MODELS
from medm.models.auto import register
from medm.models.base import ModelKind
from medm.models.lvlm.build import LVLM
from medm.models.lvlm.configuration import LVLMConfig
from medm.models.lvlm.options import LVLMOptions
from medm.registry import load_plugin, loaded_plugins
from tests import tiny

NAMES = "AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline"
FIRST_MEDM = f"import medm\nfrom transformers import {NAMES}"
FIRST_TRANSFORMERS = f"from transformers import {NAMES}\nimport medm"
# Meets the Auto modules while something else is half imported.
WITH_PEFT = f"import medm\nimport peft\nfrom transformers import Trainer, {NAMES}"
PROCESSOR = "type(AutoProcessor.from_pretrained(folder)).__module__"
MODEL = "type(AutoModelForImageTextToText.from_pretrained(folder)).__module__"
TOKENIZER = "hasattr(AutoTokenizer.from_pretrained(folder), 'added_tokens_encoder')"
CONFIG = "AutoConfig.from_pretrained(folder).model_type"
PIPELINE = "type(pipeline('image-text-to-text', model=folder, device='cpu').processor).__module__"

OWN = "type(load_processor(folder)).__module__"
WITHOUT_HOOK = (
    "import medm\nsys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "
    "'_AfterImport']\nfrom medm.models import load, load_processor"
)

ORDERS = [
    (FIRST_MEDM, [PROCESSOR, MODEL]),
    (FIRST_TRANSFORMERS, [PROCESSOR, PROCESSOR]),
    (WITH_PEFT, [MODEL, PROCESSOR]),
    (FIRST_MEDM, [TOKENIZER, PROCESSOR]),
    (FIRST_TRANSFORMERS, [CONFIG, PROCESSOR]),
    (FIRST_MEDM, [PIPELINE]),
    # medm's own way needs no hook, which a later transformers may not allow
    (WITHOUT_HOOK, [OWN, "type(load(folder)[0]).__module__"]),
]
EXPECTED = {
    PROCESSOR: "medm.models.lvlm.processing",
    MODEL: "medm.models.lvlm.modeling",
    TOKENIZER: "True",
    CONFIG: "medm-lvlm",
    PIPELINE: "medm.models.lvlm.processing",
    OWN: "medm.models.lvlm.processing",
    "type(load(folder)[0]).__module__": "medm.models.lvlm.modeling",
}

# Each order in a process of its own, where neither medm nor transformers was imported; what is slow
# to load was.
RUNNER = """
import json, os, sys
import torch.distributed.tensor, torch._dynamo.aot_compile, scipy.optimize
folder, orders = sys.argv[1], json.loads(sys.argv[2])
assert not {"medm", "transformers"} & set(sys.modules)
for number, (imports, expressions) in enumerate(orders):
    sys.stdout.flush()
    if not (child := os.fork()):
        exec(imports)
        for expression in expressions:
            print("found", number, eval(expression), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, f"order {number}: {imports}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, llms: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    section = tiny.lvlm_section(llms["smollm2"], family="smollm2")
    model, processor = medm.models.build(validate(LVLMOptions, section, source="test"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


Orders: TypeAlias = list[tuple[str, list[str]]]


def _found(folder: Path, orders: Orders) -> list[list[str]]:
    """Number of the order and what each of its expressions gives."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(folder), json.dumps(orders)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Auto classes do not open" not in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    return [line.split(maxsplit=2)[1:] for line in lines]


def _expected(orders: Orders, values: dict[str, str]) -> list[list[str]]:
    return [
        [str(number), values[expression]]
        for number, (_, expressions) in enumerate(orders)
        for expression in expressions
    ]


def test_auto_classes_open_a_folder_in_any_order(folder: Path) -> None:
    assert _found(folder, ORDERS) == _expected(ORDERS, EXPECTED)


KIND = Path(__file__).with_name("count_kind.py")
KIND_MODEL = "(type(m := AutoModel.from_pretrained(folder)).__name__, m.linear.in_features)"
KIND_PROCESSOR = "(type(p := AutoProcessor.from_pretrained(folder)).__name__, p.unit)"
KIND_CONFIG = "AutoConfig.from_pretrained(folder).width"
KIND_OWN = "tuple(type(part).__name__ for part in load(folder))"
KIND_EXPECTED = {
    KIND_MODEL: "('CountModel', 3)",
    KIND_PROCESSOR: "('CountProcessor', 'lesions')",
    KIND_CONFIG: "3",
    KIND_OWN: "('CountModel', 'CountProcessor')",
}


@pytest.fixture(scope="module")
def folder_of_another_kind(
    tmp_path_factory: pytest.TempPathFactory, llms: dict[str, Path]
) -> Iterator[Path]:
    """Saved by a kind of model that is no part of medm, while that kind is in the table."""
    folder = tmp_path_factory.mktemp("count")
    modules, plugins = set(sys.modules), loaded_plugins()
    with MODELS.temporary():
        load_plugin(KIND)
        kind = MODELS.get("count")
        tokenizer = AutoTokenizer.from_pretrained(llms["smollm2"])
        kind.model_class(kind.config_class(width=3)).save_pretrained(folder)
        kind.processor_class(tokenizer, unit="lesions").save_pretrained(folder)
        yield folder
    registry._plugins[:] = plugins
    for name in set(sys.modules) - modules:
        if name.startswith("medm_plugin_count_kind"):
            del sys.modules[name]


def test_medm_opens_the_folder_of_a_plug_in_kind(folder_of_another_kind: Path) -> None:
    folder = str(folder_of_another_kind)
    model, processor = medm.models.load(folder)
    assert (type(model).__name__, model.linear.in_features) == ("CountModel", 3)
    assert (type(processor).__name__, processor.unit) == ("CountProcessor", "lesions")
    assert medm.models.load_config(folder).width == 3
    assert medm.models.load_processor(folder).unit == "lesions"


def test_auto_classes_open_the_folder_of_a_plug_in_kind_in_any_order(
    folder_of_another_kind: Path, tmp_path: Path
) -> None:
    plugin = f"from medm.registry import load_plugin\nload_plugin({str(KIND)!r})\nimport medm"
    metadata = tmp_path / "count_kind-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: count-kind\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[medm.models]\ncount = count_kind:Count\n")
    package = f"sys.path[:0] = [{str(tmp_path)!r}, {str(KIND.parent)!r}]\nimport medm"
    auto = "from transformers import AutoConfig, AutoModel, AutoProcessor"
    own = "from medm.models import load"
    orders = [
        (f"{plugin}\n{auto}", [KIND_PROCESSOR, KIND_MODEL]),
        (f"{auto}\n{plugin}", [KIND_MODEL, KIND_PROCESSOR]),
        (f"{package}\n{auto}", [KIND_PROCESSOR, KIND_CONFIG]),
        (f"{auto}\n{package}", [KIND_CONFIG, KIND_PROCESSOR]),
        (f"{package}\n{own}", [KIND_OWN]),
    ]
    assert _found(folder_of_another_kind, orders) == _expected(orders, KIND_EXPECTED)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "lacks config_class, model_class, processor_class"),
        ({"config_class": LVLMConfig, "model_class": LVLM.model_class}, "lacks processor_class"),
        (
            {"config_class": PreTrainedConfig, "model_class": None, "processor_class": None},
            "PreTrainedConfig.model_type is ''; expected a name that begins with 'medm-'",
        ),
    ],
)
def test_a_kind_without_its_classes_is_refused(changes: dict[str, Any], words: str) -> None:
    class Incomplete(ModelKind):
        def build(self, options: Any) -> Any: ...

    for name, value in changes.items():
        setattr(Incomplete, name, value)
    with MODELS.temporary():
        MODELS.add("incomplete", Incomplete, "for the test")
        with pytest.raises(TypeError, match=f"model kind Incomplete.* {words}|Incomplete: {words}"):
            register()


def test_importing_medm_imports_no_tensor_library() -> None:
    script = (
        "import sys, medm; hasattr(medm, 'nothing'); print(sorted({'torch', 'transformers', "
        "'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("teach", "module"),
    [
        ("_patch_configs", SimpleNamespace(CONFIG_MAPPING=object())),
        ("_patch_configs", SimpleNamespace(CONFIG_MAPPING=SimpleNamespace(_extra_content=[]))),
        ("_patch_configs", SimpleNamespace()),
        ("_patch_processors", SimpleNamespace()),
        ("_patch_processors", SimpleNamespace(PROCESSOR_MAPPING=object())),
        (
            "_patch_processors",
            SimpleNamespace(PROCESSOR_MAPPING=SimpleNamespace(_extra_content=())),
        ),
    ],
)
def test_another_transformers_is_imported_all_the_same(
    teach: str, module: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """Its private table may be gone: importing it must not fail, and what does not work is said."""
    with caplog.at_level(logging.WARNING, logger="medm"):
        getattr(transformers_hook, teach)(module)
    (record,) = caplog.records
    assert "call medm.models.auto.register() first" in record.message
