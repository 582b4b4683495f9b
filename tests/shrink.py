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
from medm.models.blip.options import BlipOptions
from medm.models.dual_encoder.options import DualEncoderOptions
from medm.models.lvlm.options import MaskOptions
from medm.training.recipe import load_recipe
from tests import tiny
from tests.encoders.tiny import TINY_ENCODERS
from tests.heads.tiny import TINY_HEADS
from tests.models.dual_encoder.tiny import TEXT, save_tokenizer

DOCS = Path(__file__).parents[1] / "docs"


def overrides(name: str, folder: Path, *, steps: int = 2) -> list[str]:
    """What to append to `medm train NAME`. The tiny language model or tokenizer is saved below
    `folder`."""
    recipe = load_recipe(find(name))
    result = [
        "train.deepspeed=null",
        "train.bf16=false",
        "train.use_cpu=true",
        "train.per_device_train_batch_size=2",
        "train.gradient_accumulation_steps=1",
        "train.dataloader_num_workers=0",
        f"train.max_steps={steps}",
    ]
    if recipe.model.kind == "dual-encoder":
        return result + dual_encoder_overrides(recipe.model, folder)
    if recipe.model.kind == "blip":
        return result + blip_overrides(recipe.model, folder)
    family = recipe.model.llm.name
    llm = folder / f"tiny-{family}"
    if not llm.exists():
        tiny.save_llm(family, llm, max_position_embeddings=2048)
    result.append(f"model.llm.path={llm}")
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
    if recipe.model.masks is not None:
        result += head_overrides(recipe.model.masks)
    return result


TINY_SEGRESNET = {
    "dim": 6,
    "features": 5,
    "init_filters": 8,
    "blocks_down": [1, 1],
    "blocks_up": [1],
}


def head_overrides(masks: MaskOptions) -> list[str]:
    """A tiny mask head in place of the published one; projection and targets stay."""
    block = masks.head.model_dump() | {"path": None, "image_size": None}
    tiny_head = TINY_HEADS[masks.head.name]
    block["architecture"] = tiny_head.block["architecture"]
    size = list(tiny_head.pixels[1:])
    if masks.head.name == "sam2":
        block["size"] = None
    elif masks.view == "volume" and masks.head.name == "dot-product":
        block["architecture"], size = TINY_SEGRESNET, [8, 8, 8]
    return [f"model.masks.head={json.dumps(block)}", f"model.masks.preprocess.size={size}"]


def dual_encoder_overrides(model: DualEncoderOptions, folder: Path) -> list[str]:
    """Tiny towers in place of the published ones; pooling and projections stay."""
    tokenizer = folder / "tiny-bert"
    if not tokenizer.exists():
        save_tokenizer(tokenizer)
    image = tiny_block(model.image.encoder.model_dump())
    text = model.text.encoder.model_dump() | {"path": None, "architecture": TEXT}
    result = [
        f"model.image.encoder={json.dumps(image)}",
        f"model.text.encoder={json.dumps(text)}",
        f"model.text.tokenizer={tokenizer}",
        "model.text.max_length=12",
        "model.embed_dim=20",
    ]
    if model.branch == "volume":
        size = list(TINY_ENCODERS[model.image.encoder.name].pixels[1:])
        result.append(f"model.image.preprocess.size={size}")
    return result


LABELS = ["left disc", "right disc"]
"""Findings of the example records of studies."""
TINY_FUSION = {"layers": 1, "heads": 2, "feed_forward": 16}


def blip_overrides(model: BlipOptions, folder: Path) -> list[str]:
    """Tiny towers and knowledge in place of the published ones; heads and flaws stay."""
    tokenizer = folder / "tiny-bert"
    if not tokenizer.exists():
        save_tokenizer(tokenizer)
    image = tiny_block(model.image.encoder.model_dump())
    text = {"path": None, "architecture": TEXT, "tokenizer": str(tokenizer), "max_length": 12}
    result = [
        "model.pretrained=null",
        f"model.image.encoder={json.dumps(image)}",
        f"model.text={json.dumps(text)}",
        "model.embed_dim=20",
        "train.load_best_model_at_end=false",
        "data.cache_features=null",
    ]
    if "itc" in model.heads:
        result.append("model.queue=6")
    if model.answers is not None:
        lists = {"file": None, "closed": ["yes", "no"], "open": ["left", "right"], "dim": 8}
        result.append(f"model.answers={json.dumps(model.answers.model_dump() | lists)}")
    if model.labels:
        result.append(f"model.labels={json.dumps(LABELS)}")
    for place, source in enumerate(model.knowledge):
        block = source.model_dump()
        block |= {"size": 5} if source.name == "memory" else {"heads": 2, "feed_forward": 16}
        block["fusion"] |= TINY_FUSION
        result.append(f"model.knowledge.{place}={json.dumps(block)}")
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
    model = load_recipe(find(name)).model
    if model.kind == "dual-encoder":
        stage, branches = "pairs", {model.branch}
    elif model.kind == "blip":
        stage = "study_questions" if model.answers is not None else "studies"
        branches = {"image"}
    else:
        stage = "pretrain" if name.endswith("/pretrain") else "finetune"
        stage = "masks" if model.masks is not None else stage
        branches = set(model.branches)
    return DOCS / f"example_{stage}{'_3d' if 'volume' in branches else ''}.json"
