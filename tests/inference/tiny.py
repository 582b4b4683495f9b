"""A tiny model folder and annotation files to answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from medm.config import validate
from medm.models import build
from medm.models.lvlm.options import LVLMOptions
from tests.tiny import lvlm_section, save_llm


def build_tiny(
    folder: Path,
    *,
    family: str = "qwen2.5",
    encoder: str = "siglip",
    connector: dict[str, Any] | None = None,
    tasks: Sequence[str] = (),
    **options: Any,
) -> tuple[Any, Any]:
    """A random model with one image branch, and its processor."""
    section = lvlm_section(
        save_llm(family, folder / "llm"), family=family, encoder=encoder, **options
    )
    section["tasks"] = list(tasks)
    if connector is not None:
        section["branches"]["image"]["connector"] = connector
    torch.manual_seed(1)
    model, processor = build(validate(LVLMOptions, section, source="test"))
    awaken(model)
    return model, processor


def awaken(model: torch.nn.Module) -> None:
    """Larger weights: a fresh model repeats one token whatever it is asked; this one has to
    look."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.mul_(2.0 if "embed_tokens" in name else 12.0)


def save_tiny(folder: Path, **options: Any) -> Path:
    """The same, saved."""
    model, processor = build_tiny(folder, **options)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"


def save_image(file: Path, seed: int, *, size: tuple[int, int] = (20, 24)) -> None:
    """Noise in colour."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(file)


def write_records(folder: Path, records: list[Any], name: str = "in.json") -> Path:
    """An annotation file."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return file


def questions(folder: Path, count: int, *, images: int = 3) -> list[dict[str, Any]]:
    """Records of unlike lengths about a few images; every fifth is text only."""
    for number in range(images):
        save_image(folder / f"{number}.png", number)
    records: list[dict[str, Any]] = []
    for index in range(count):
        text = "What is seen here" + " exactly" * (index % 7) + "?"
        record: dict[str, Any] = {
            "id": f"q{index}",
            "conversations": [{"from": "human", "value": text}],
        }
        if index % 5:
            record["image"] = [f"{index % images}.png"]
            record["conversations"][0]["value"] = f"<image>\n{text}"
        records.append(record)
    return records


def read_output(file: Path) -> list[dict[str, Any]]:
    """The lines of a finished run."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
