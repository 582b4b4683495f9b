"""A tiny architecture for each registered encoder, as a recipe would write it, and the size of an input that fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medm.encoders import ENCODERS
from medm.encoders.base import VisionEncoder

NOT_FOR_CONSTRUCTORS = {"name", "path", "image_size"}


@dataclass(frozen=True)
class Tiny:
    block: dict[str, Any]
    pixels: tuple[int, ...]
    """(C, *spatial) of one item."""


TINY_ENCODERS = {
    "efficientnet-lite": Tiny(
        {
            "name": "efficientnet-lite", "stages": [3, 5],
            "architecture": {"width": 0.1, "depth": 0.3, "stem": 8, "head": 16},
        },
        pixels=(3, 64, 48),
    ),
}  # fmt: skip


def build_encoder(block: dict[str, Any]) -> VisionEncoder:
    entry = ENCODERS.entry(block["name"])
    options = entry.options.model_validate(block)
    return ENCODERS.get(entry.name)(**options.model_dump(exclude=NOT_FOR_CONSTRUCTORS))
