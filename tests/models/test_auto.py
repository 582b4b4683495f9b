"""`import medm` is enough for transformers' Auto classes: whichever is imported first, whatever is opened first."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import medm.models
from medm import transformers_hook
from medm.config import validate
from medm.models.lvlm.options import LVLMOptions
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
    "import medm\nsys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != '_AfterImport']\n"
    "from medm.models import load, load_processor"
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

# Each order in a process of its own, where neither medm nor transformers was imported; what is slow to load was.
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


def test_auto_classes_open_a_folder_in_any_order(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(folder), json.dumps(ORDERS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("found ")]
    expected = [
        [str(number), EXPECTED[expression]]
        for number, (_, expressions) in enumerate(ORDERS)
        for expression in expressions
    ]
    assert found == expected
    assert "Auto classes do not open" not in done.stderr


def test_importing_medm_imports_no_tensor_library() -> None:
    script = "import sys, medm; hasattr(medm, 'nothing'); print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("teach", "module"),
    [
        ("_teach_configs", SimpleNamespace(CONFIG_MAPPING=object())),
        ("_teach_configs", SimpleNamespace(CONFIG_MAPPING=SimpleNamespace(_extra_content=[]))),
        ("_teach_configs", SimpleNamespace()),
        ("_teach_processors", SimpleNamespace()),
        ("_teach_processors", SimpleNamespace(AutoProcessor=SimpleNamespace(register=lambda only_one: None))),
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
