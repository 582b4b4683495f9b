"""Makes a shipped recipe small enough for a test: tiny random parts in place of the published ones,
two steps, one CPU.

Everything else of the recipe stays as it is: which parts are trained and how, schedule, templates,
limits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medm.cli.recipes import find
from medm.training.recipe import load_recipe
from tests import tiny
from tests.encoders.tiny import TINY_ENCODERS

DOCS = Path(__file__).parents[1] / "docs"


def overrides(name: str, folder: Path, *, steps: int = 2) -> list[str]:
    """What to append to `medm train NAME`. The tiny language model is saved below `folder`."""
    recipe = load_recipe(find(name))
    family = recipe.model.llm.name
    llm = folder / f"tiny-{family}"
    if not llm.exists():
        tiny.save_llm(family, llm, max_position_embeddings=2048)
    result = [
        f"model.llm.path={llm}",
        "train.deepspeed=null",
        "train.bf16=false",
        "train.use_cpu=true",
        "train.per_device_train_batch_size=2",
        "train.gradient_accumulation_steps=1",
        "train.dataloader_num_workers=0",
        f"train.max_steps={steps}",
    ]
    for branch, options in recipe.model.branches.items():
        result.append(
            f"model.branches.{branch}.encoder={json.dumps(tiny_block(options.encoder.model_dump()))}"
        )
        connector = options.connector.model_dump()
        if "unseen_task" in connector:  # the example records have tasks of their own
            result.append(f"model.branches.{branch}.connector.unseen_task=mean")
        if connector.get("resample", "none") != "none":  # a grid of 4 x 4, which its windows divide
            result.append(f"model.branches.{branch}.encoder.image_size=32")
        if branch == "volume":
            result.append(
                f"model.branches.volume.preprocess.size={list(TINY_ENCODERS[options.encoder.name].pixels[1:])}"
            )
    return result


def tiny_block(block: dict[str, Any]) -> dict[str, Any]:
    """An encoder's block with its options, a tiny architecture and no published weights."""
    small = {
        key: value
        for key, value in block.items()
        if key not in ("path", "architecture", "image_size")
    }
    small["architecture"] = TINY_ENCODERS[block["name"]].block.get("architecture", {})
    if "encoder" in block:
        small["encoder"] = tiny_block(block["encoder"])
    return small


def records(name: str) -> Path:
    """The example records that fit a shipped recipe: for its stage, with volumes where it reads
    them."""
    stage = "pretrain" if name.endswith("/pretrain") else "finetune"
    return (
        DOCS
        / f"example_{stage}{'_3d' if 'volume' in load_recipe(find(name)).model.branches else ''}.json"
    )
