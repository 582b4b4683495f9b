"""`import medm` is enough for transformers' Auto classes, whichever is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import medm.models
from medm.config import validate
from medm.models.lvlm.options import LVLMOptions
from tests import tiny

OPEN = """
model = AutoModelForImageTextToText.from_pretrained({folder!r})
processor = AutoProcessor.from_pretrained({folder!r})
print(type(model).__name__, type(processor).__name__)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import medm\nfrom transformers import AutoProcessor, AutoModelForImageTextToText",
        "from transformers import AutoProcessor, AutoModelForImageTextToText\nimport medm",
        # Each of these meets the Auto module while something else is half imported.
        "import medm\nimport peft\nfrom transformers import Trainer, AutoProcessor, AutoModelForImageTextToText",
    ],
)
def test_auto_classes_open_a_checkpoint(imports: str, llms: dict[str, Path], tmp_path: Path) -> None:
    section = tiny.lvlm_section(llms["smollm2"], family="smollm2")
    model, processor = medm.models.build(validate(LVLMOptions, section, source="test"))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    script = imports + OPEN.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["LVLMForConditionalGeneration", "LVLMProcessor"], done.stderr[-2000:]


def test_importing_medm_imports_no_tensor_library() -> None:
    script = "import sys, medm; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
