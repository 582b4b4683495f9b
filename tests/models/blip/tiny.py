"""The smallest model of kind `blip` that is still real, and a batch of studies for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medm.config import validate
from medm.models import build
from medm.models.blip.modeling import MedmBlip
from medm.models.blip.options import BlipOptions
from medm.models.blip.processing import MedmBlipProcessor
from tests.models.dual_encoder.tiny import TEXT, VISION

IDS = torch.tensor([[2, 4, 5, 6, 3], [2, 7, 3, 0, 0], [2, 8, 9, 3, 0], [2, 12, 15, 3, 0]])
MASK = (IDS != 0).long()
LABELS = ["effusion", "mass"]
ANSWERS = {"closed": ["normal", "a mass"], "open": ["left", "right", "the brain"]}


def section(tokenizer: str, **changes: Any) -> dict[str, Any]:
    """The `model` section of a CLIP tower and a BERT; `image` and `text` are merged into it."""
    content: dict[str, Any] = {
        "kind": "blip",
        "image": {"encoder": {"name": "clip", "architecture": dict(VISION)}},
        "text": {"architecture": dict(TEXT), "tokenizer": tokenizer, "max_length": 12},
        "embed_dim": 8,
        "heads": ["itc", "itm", "lm", "labels"],
        "labels": LABELS,
        "queue": 6,
        "momentum": 0.9,
    }
    for tower in ("image", "text"):
        content[tower] |= changes.pop(tower, {})
    return content | changes


FUSION = {"heads": 2, "feed_forward": 16, "layers": 1, "dropout": 0.0}


def knowledge(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """A graph of three findings, and a memory of five texts."""
    nodes: list[dict[str, Any]] = [
        {"name": "effusion", "groups": ["chest"], "edges": []},
        {"name": "mass", "groups": ["chest"], "edges": ["brain"]},
        {"name": "brain", "groups": [], "edges": []},
    ]
    file = folder / "graph.json"
    file.write_text(json.dumps({"nodes": nodes}))
    fusion = FUSION | changes.pop("fusion", {})
    graph = {"name": "graph", "file": str(file), "dropout": 0.0, "fusion": fusion} | changes
    return [graph, {"name": "memory", "size": 5, "k": 2, "fusion": fusion}]


def make(content: dict[str, Any]) -> tuple[MedmBlip, MedmBlipProcessor]:
    """A model without dropout, so that a forward can be computed again."""
    torch.manual_seed(0)
    model, processor = build(validate(BlipOptions, content, source="test"))
    assert isinstance(model, MedmBlip)
    assert isinstance(processor, MedmBlipProcessor)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # of attention
    return model, processor


def studies(start: int = 0, stop: int = 4) -> dict[str, Any]:
    """Some studies of a batch of four; a batch without any holds no pixels."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(4, 3, 16, 16, generator=generator)
    rows = slice(start, stop)
    labels = IDS.masked_fill(MASK == 0, -100)
    labels[:, 0] = -100
    nan = float("nan")
    targets = torch.tensor([[1.0, 0.0], [nan, 1.0], [0.0, nan], [1.0, 1.0]])
    batch: dict[str, Any] = {
        "image_counts": torch.ones(4, dtype=torch.int64)[rows],
        "input_ids": IDS[rows],
        "attention_mask": MASK[rows],
        "labels": labels[rows],
        "label_targets": targets[rows],
        "owners": torch.tensor([11, 12, 13, 14])[rows],
        "question_ids": IDS.flip(0)[rows],
        "question_mask": MASK.flip(0)[rows],
        "answer_branches": torch.tensor([0, 0, 0, 1])[rows],
        "answer_targets": torch.tensor(
            [[1.0, 0, 0, 0, 0], [0.4, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0.5, 1]]
        )[rows],
        "knowledge_ids": torch.tensor([[2, 8, 3], [2, 15, 3], [0, 0, 0], [2, 12, 3]])[rows],
        "knowledge_mask": torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 0], [1, 1, 1]])[rows],
    }
    if stop > start:
        batch["pixels"] = {"image": pixels[rows]}
    return batch
