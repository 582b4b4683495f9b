"""DeepSpeed's own launcher, with the command that docs/training.md gives."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

from medm.models import load
from tests import tiny
from tests.launch import ROOT, environment, free_port, needs_compiler


@needs_compiler
def test_the_documented_command_trains_in_two_processes(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("deepspeed ")]
    words = shlex.split(line, comments=True)
    words[words.index("8")] = "2"
    words[words.index("recipe.yaml")] = str(tmp_path / "recipe.yaml")
    turns = [{"from": "human", "value": "Is there a mass?"}, {"from": "gpt", "value": "No."}]
    (tmp_path / "train.json").write_text(json.dumps([{"conversations": turns}] * 8))
    recipe = {
        "model": {"llm": {"name": "smollm2", "path": str(tiny.save_llm("smollm2", tmp_path / "llm"))}},
        "data": {"train": [{"path": str(tmp_path / "train.json")}]},
        "parts": {"llm": {"tune": "full", "lr": 1e-3}},
        "train": {"deepspeed": "zero2", "use_cpu": True, "per_device_train_batch_size": 2, "save_strategy": "no"},
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    launcher = [str(Path(sys.executable).with_name(words[0])), "--master_port", str(free_port()), *words[1:]]
    done = subprocess.run(
        launcher, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["step"] == 2, "8 records, 2 on each of 2"
    load(str(tmp_path / "out"))
