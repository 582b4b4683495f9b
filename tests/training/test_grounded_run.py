"""A run that learns words and masks is killed, and its continuation writes the same model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from medm.training import checkpoints
from medm.training.recipe import load_recipe
from medm.training.run import train
from tests import tiny

KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from medm.cli import main
import medm.training.run as run

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

known = run._callbacks
run._callbacks = lambda recipe: [*known(recipe), Kill()]
main(sys.argv[1:])
"""


def records(folder: Path) -> list[dict[str, Any]]:
    """Replies with 0, 1 and 3 masks of noise; one target is absent."""
    rng, found = np.random.default_rng(0), []
    for index in range(12):
        noise = rng.integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
        Image.fromarray((noise[..., 0] > 127).astype(np.uint8)).save(folder / f"{index}-mask.png")
        masks = [f"{index}-mask.png", None, f"{index}-mask.png"][: (0, 1, 3)[index % 3]]
        reply = " ".join(["Seen:", *["one [SEG]"] * len(masks)])
        turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": reply}]
        record: dict[str, Any] = {"image": [f"{index}.png"], "conversations": turns}
        found.append(record | ({"masks": masks} if masks else {}))
    return found


def recipe_file(folder: Path, output_dir: Path) -> Path:
    """A run of six steps with packing, dropout and points that are drawn."""
    architecture = {"dim": 6, "features": 5, "channels": [4, 8], "strides": [2]}
    model = tiny.lvlm_section(folder / "llm") | {
        "masks": {"head": {"name": "dot-product", "architecture": architecture, "image_size": 16}}
    }
    llm = {"tune": "lora", "r": 4, "lr": 1e-3, "dropout": 0.1, "new_tokens": "train"}
    new = ("image.connector", "masks.encoder", "masks.decoder", "masks.projection")
    masks = {"name": "segmentation", "points": 50, "presence": 0.5}
    content: dict[str, Any] = {
        "model": model,
        "objective": {
            "terms": {
                "language": {"objective": {"name": "language-modeling"}},
                "masks": {"objective": masks},
            }
        },
        "data": {
            "train": [{"path": str(folder / "train.json"), "root": str(folder)}],
            "packing": True,
            "max_length": 256,
        },
        "parts": {"llm": llm, **{part: {"tune": "full", "lr": 1e-2} for part in new}},
        "train": {
            "use_cpu": True,
            "max_steps": 6,
            "per_device_train_batch_size": 1,
            "save_steps": 2,
            "logging_steps": 1,
        },
        "output_dir": str(output_dir),
    }
    path = output_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_killed_run_with_masks_continues_bit_for_bit(tmp_path: Path) -> None:
    tiny.save_llm("qwen2.5", tmp_path / "llm")
    (tmp_path / "train.json").write_text(json.dumps(records(tmp_path)))
    whole = train(load_recipe(recipe_file(tmp_path, tmp_path / "whole")))
    logged = [json.loads(line) for line in (tmp_path / "whole/loss.jsonl").read_text().splitlines()]
    curve = [entry["loss/masks"] for entry in logged if "loss/masks" in entry]
    assert len(curve) == 6 and min(curve) == 0 < min(curve[2:5])  # steps with and without masks

    cut = recipe_file(tmp_path, tmp_path / "cut")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "train", str(cut)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "cut" / "config.json").exists()
    assert [path.name for path in checkpoints.folders(tmp_path / "cut")] == ["checkpoint-2"]
    torch.rand(7)  # what a new process drew before
    resumed = train(load_recipe(cut), resume=True)
    assert resumed.finished
    before, after = (
        load_file(outcome.output_dir / "model.safetensors") for outcome in (whole, resumed)
    )
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
