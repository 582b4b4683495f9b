"""A recipe with an image and a volume branch, run by one process or by each of several (see
test_mixed.py).

Images, volumes, both and neither come in an order in which processes differ in what they see.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from medm.config import validate
from medm.distributed import end_rank, leave_group
from medm.models.lvlm.modeling import LVLMForConditionalGeneration
from medm.training.recipe import Recipe
from medm.training.run import train
from tests import tiny
from tests.encoders.tiny import TINY_ENCODERS

STEPS = 6
MEDIA = Path(__file__).parents[2] / "docs" / "examples_media"
KINDS: list[dict[str, str]] = [
    {"image": "disc_left.png"}, {"volume": "ball_left.nii.gz"}, {},
    {"image": "disc_right.png", "volume": "ball_right.nii.gz"},
]  # fmt: skip
ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    # every weight is spread over the processes, however small
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def write_inputs(folder: Path) -> None:
    """Language model, records and DeepSpeed's file; by one process before the others read them."""
    tiny.save_llm("qwen2.5", folder / "llm")
    records = []
    for number in range(2 * STEPS):
        files = KINDS[number % len(KINDS)]
        marks = "".join(f"<{branch}>\n" for branch in files)
        turns = [
            {"from": "human", "value": f"{marks}Number {number}?"},
            {"from": "gpt", "value": f"It is {number}."},
        ]
        records.append({**files, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "zero3.json").write_text(json.dumps(ZERO3))


def recipe(folder: Path, output: Path, *, batch: int, deepspeed: bool) -> Recipe:
    section = tiny.lvlm_section(folder / "llm")
    section["branches"]["volume"] = {
        "encoder": TINY_ENCODERS["slices"].block,
        "connector": {"name": "attention-pooling", "heads": 2},
        "preprocess": {"size": [3, 16, 16]},
    }
    parts = ["llm", "image.encoder", "image.connector", "volume.encoder", "volume.connector"]
    value: dict[str, Any] = {
        "model": section,
        "data": {
            "train": [{"path": str(folder / "data.json"), "root": str(MEDIA)}],
            "eval": [{"path": str(folder / "data.json"), "root": str(MEDIA)}],
            "cache": {"dir": str(folder / "cache"), "max_gb": 0.1},
        },
        "parts": dict.fromkeys(parts, "full"),
        "train": {
            "use_cpu": True, "max_steps": STEPS, "per_device_train_batch_size": batch, "learning_rate": 1e-3,
            "logging_steps": 1, "save_strategy": "no", "deepspeed": str(folder / "zero3.json") if deepspeed else None,
            "eval_strategy": "steps", "eval_steps": STEPS,
        },
        "monitors": [
            {"task": {"name": "custom", "path": str(folder / "data.json"), "metrics": ["token-f1"]},
             "data": str(MEDIA), "batch_size": 2, "limit": 5, "samples": 5, "max_new_tokens": 6}
        ],
        "output_dir": str(output),
    }  # fmt: skip
    return validate(Recipe, value, source="tests")


def watch(seen: list[list[str]], norms: list[dict[str, float]]) -> None:
    """Note the branches of every forward pass of the training, and before every step the gradient
    norm of every part."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.utils import safe_get_full_grad

    embed, step = LVLMForConditionalGeneration.embed, DeepSpeedEngine.step

    def noting_embed(
        self: Any, input_ids: Any, pixels: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if self.training:
            seen.append(sorted(pixels or {}))
        return embed(self, input_ids, pixels, *args, **kwargs)

    def noting_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        entry = {}
        for part, module in self.module.parts().items():
            gradients = [safe_get_full_grad(parameter) for parameter in module.parameters()]
            missing = sum(gradient is None for gradient in gradients)
            entry[part] = (
                float("nan")
                if missing
                else float(torch.stack([g.norm() for g in gradients]).norm())
            )
        norms.append(entry)
        return step(self, *args, **kwargs)

    LVLMForConditionalGeneration.embed = noting_embed  # type: ignore[method-assign]
    DeepSpeedEngine.step = noting_step


def main(folder: Path) -> None:
    seen: list[list[str]] = []
    norms: list[dict[str, float]] = []
    watch(seen, norms)
    outcome = train(recipe(folder, folder / "out", batch=1, deepspeed=True))
    result = {"finished": outcome.finished, "seen": seen, "norms": norms}
    (folder / f"result-{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_group()
    end_rank(0)
