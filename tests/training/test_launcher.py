"""The launchers that docs/training.md names, with real processes and real signals."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from medm.models import load
from medm.models.manifest import verify
from medm.training import checkpoints
from tests import tiny
from tests.launch import ROOT, environment, free_port, needs_compiler
from tests.planted import marks, plant

PLUGIN = """
import pathlib, sys, time
from medm.training import checkpoint_writer, run
from transformers import TrainerCallback

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if "--resume" not in sys.argv: time.sleep(0.2)

def write_slowly(files, write=checkpoint_writer.write_files):
    pathlib.Path("writing").touch()
    time.sleep(2)
    write(files)

checkpoint_writer.write_files = write_slowly
run._callbacks = lambda recipe, known=run._callbacks: [*known(recipe), Slow()]
"""
"""Steps that take long enough to be met by a signal, and checkpoints that take long to write."""


def recipe(folder: Path, **train: Any) -> Path:
    """A tiny language model and eight records; returns the recipe's file."""
    turns = [{"from": "human", "value": "Is there a mass?"}, {"from": "gpt", "value": "No."}]
    (folder / "train.json").write_text(json.dumps([{"conversations": turns}] * 8))
    content = {
        "model": {
            "llm": {"name": "smollm2", "path": str(tiny.save_llm("smollm2", folder / "llm"))}
        },
        "data": {"train": [{"path": str(folder / "train.json")}]},
        "parts": {"llm": {"tune": "full", "lr": 1e-3}},
        "train": {"use_cpu": True, "per_device_train_batch_size": 2, **train},
        "output_dir": str(folder / "out"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def wait_for(path: Path, process: subprocess.Popen[str], *, size: int = 0) -> None:
    """Wait until a process wrote a file of at least so many bytes."""
    until = time.monotonic() + 200
    while not (path.exists() and path.stat().st_size >= size) and time.monotonic() < until:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def test_a_script_that_is_stopped_saves_ends_and_continues(tmp_path: Path) -> None:
    """Two processes with workers, in a folder of planted modules: SIGTERM to the group, then
    signals while it saves."""
    output, planted = tmp_path / "out", plant(tmp_path)
    file = recipe(
        tmp_path, max_steps=40, save_strategy="no", logging_steps=1, dataloader_num_workers=1
    )
    (planted / "slow.py").write_text(PLUGIN)
    (tmp_path / "train.sh").write_text(
        f'set -euo pipefail\nsource "{ROOT}/scripts/launch.sh"\nlaunch train {file} --plugin ./slow.py "$@"\n'
    )
    command = ["bash", str(tmp_path / "train.sh")]
    options: dict[str, Any] = {"cwd": planted, "env": environment() | {"GPUS": "2"}, "text": True}
    run = subprocess.Popen(
        command, **options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    wait_for(
        output / "loss.jsonl", run, size=1
    )  # before the first step a stop ends the run at once
    os.killpg(run.pid, signal.SIGTERM)
    wait_for(planted / "writing", run)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(run.pid, number)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 75, err
    assert "Traceback" not in err
    assert err.count("again: the processes are already stopping") == 2
    (checkpoint,) = checkpoints.folders(output)
    verify(checkpoint)
    assert processes_with(tmp_path) == []
    done = subprocess.run([*command, "--resume"], **options, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"continuing from {checkpoint}" in done.stderr
    assert json.loads((output / "manifest.json").read_text())["step"] == 40
    assert marks(planted) == []


def processes_with(folder: Path) -> list[str]:
    """Command lines of running processes that name a folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_text()
        except OSError:
            continue
        if str(folder) in line:
            lines.append(line.replace("\0", " "))
    return lines


@needs_compiler
def test_the_documented_command_of_deepspeed_trains_in_two_processes(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    (line,) = [
        line
        for line in text.splitlines()
        if " deepspeed " in line and line.startswith("PYTHONSAFEPATH=1")
    ]
    variable, program, *words = shlex.split(line, comments=True)
    words[words.index("8")] = "2"
    words[words.index("recipe.yaml")] = str(recipe(tmp_path, deepspeed="zero2", save_strategy="no"))
    launcher = [
        str(Path(sys.executable).with_name(program)),
        "--master_port",
        str(free_port()),
        *words,
    ]
    planted = plant(tmp_path)
    done = subprocess.run(
        launcher,
        cwd=planted,
        env=environment() | dict([variable.split("=")]),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["step"] == 2, (
        "8 records, 2 on each of 2"
    )
    assert marks(planted) == []
    load(str(tmp_path / "out"))
