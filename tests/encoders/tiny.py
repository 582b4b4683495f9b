"""A tiny architecture for each registered encoder, as a recipe would write it, and the size of an
input that fits."""

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


VIT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VOLUME_VIT = VIT | {"image_size": [8, 16, 16], "patch_size": [4, 8, 8], "num_channels": 1}

TINY_ENCODERS = {
    "clip": Tiny(
        {"name": "clip", "architecture": VIT | {"image_size": 16, "patch_size": 8}, "tokens": "cls_patch"},
        pixels=(3, 16, 16),
    ),
    "siglip": Tiny({"name": "siglip", "architecture": VIT | {"image_size": 16, "patch_size": 8}}, pixels=(3, 16, 24)),
    "hf-vision": Tiny(
        {
            "name": "hf-vision", "tokens": "prefix_patch", "pooled": True,
            "architecture": VIT
            | {"model_type": "dinov2_with_registers", "image_size": 16, "patch_size": 8, "mlp_ratio": 2},
        },
        pixels=(3, 16, 24),
    ),
    "internvit": Tiny(
        {
            "name": "internvit", "tokens": "prefix_patch",
            "architecture": VIT | {"image_size": [16, 16], "patch_size": [8, 8], "attention_bias": True},
        },
        pixels=(3, 16, 24),
    ),
    "m3d-clip": Tiny({"name": "m3d-clip", "architecture": VOLUME_VIT, "norm": "after"}, pixels=(1, 8, 16, 16)),
    "medm-clip": Tiny({"name": "medm-clip", "architecture": VOLUME_VIT, "tokens": "cls_patch"}, pixels=(1, 8, 16, 24)),
    "eva-clip": Tiny(
        {
            "name": "eva-clip", "architecture": VIT | {"image_size": 16, "patch_size": 8}, "tokens": "cls_patch",
            "ln_vision": "learned",
        },
        pixels=(3, 24, 16),
    ),
    "vit": Tiny(
        {"name": "vit", "architecture": VIT | {"image_size": 16, "patch_size": 8}, "tokens": "cls_patch"},
        pixels=(3, 24, 16),
    ),
    "i3d-resnet": Tiny(
        {"name": "i3d-resnet", "architecture": {"layers": [1, 1, 2, 1], "width": 4}}, pixels=(1, 20, 40, 33)
    ),
    "slices": Tiny(
        {"name": "slices", "encoder": {"name": "siglip", "architecture": VIT | {"image_size": 16, "patch_size": 8}}},
        pixels=(3, 3, 16, 16),
    ),
    "resnet": Tiny(
        {
            "name": "resnet",
            "architecture": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1]},
        },
        pixels=(3, 37, 48),
    ),
    "densenet": Tiny(
        {
            "name": "densenet",
            "architecture": {"init_features": 8, "growth_rate": 4, "block_config": [2, 1, 2], "bn_size": 2},
        },
        pixels=(3, 70, 48),
    ),
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
