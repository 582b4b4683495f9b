"""Tiny architectures of the registered mask heads, by name.

A name with a slash is a variant of the head before it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from medm.heads import HEADS
from medm.heads.base import MaskHead
from medm.models.mask_heads import construct_head
from medm.types import Kind
from tests.encoders.tiny import TINY_ENCODERS

NOT_FOR_CONSTRUCTORS = {"name", "path", "image_size"}

TINY_SAM2: dict[str, Any] = {
    "vision_config": {
        "backbone_channel_list": [64, 32, 16, 8],
        "fpn_hidden_size": 128,
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 8,
            "blocks_per_stage": [1, 2, 2, 1],
            "embed_dim_per_stage": [8, 16, 32, 64],
            "num_attention_heads_per_stage": [1, 2, 4, 8],
            "window_size_per_stage": [8, 4, 4, 2],
            "global_attention_blocks": [4],
        },
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    },
    "prompt_encoder_config": {"hidden_size": 128, "image_size": 128},
    "mask_decoder_config": {
        "hidden_size": 128,
        "mlp_dim": 48,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 32,
    },
}
"""Hiera and mask decoder of 128 pixels."""

TINY_MEMORY: dict[str, Any] = {
    "memory_attention_hidden_size": 128,
    "memory_attention_num_layers": 2,
    "memory_attention_feed_forward_hidden_size": 48,
    "memory_encoder_hidden_size": 128,
    "mask_downsampler_embed_dim": 128,
    "memory_fuser_embed_dim": 128,
    "memory_fuser_intermediate_dim": 48,
    "num_maskmem": 4,
    "max_object_pointers_in_encoder": 5,
}
"""Memory beside `TINY_SAM2`: four memories, five pointers."""


TINY_SAM: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_dim": 24,
        "image_size": 64,
        "patch_size": 16,
        "window_size": 2,
        "global_attn_indexes": [1],
        "num_pos_feats": 16,
        "output_channels": 32,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 16},
    "mask_decoder_config": {
        "hidden_size": 32,
        "mlp_dim": 24,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    },
}
"""ViT and mask decoder of 64 pixels."""


_DETR = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_layers": 1}
TINY_SAM3: dict[str, Any] = {
    "vision_config": {
        "backbone_config": {
            "model_type": "sam3_vit_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 112,
            "patch_size": 14,
            "window_size": 4,
            "global_attn_indexes": [1],
            "pretrain_image_size": 56,
        },
        "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    },
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 32,
    },
    "detr_encoder_config": _DETR,
    "detr_decoder_config": {**_DETR, "num_queries": 7},
    "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 2},
}
"""ViT, DETR and mask decoder of 112 pixels."""


class TinyHead(NamedTuple):
    """A head as a recipe would write it, and its input."""

    block: dict[str, Any]
    pixels: tuple[int, ...]
    """(C, *spatial)."""


TINY_HEADS: dict[str, TinyHead] = {
    "dot-product": TinyHead(
        {"architecture": {"dim": 6, "features": 5, "channels": [4, 8], "strides": [2]}}, (1, 12, 8)
    ),
    "dot-product/siglip": TinyHead(
        {
            "architecture": {"dim": 6, "features": 5},
            "encoder": TINY_ENCODERS["siglip"].block,
        },
        (3, 16, 24),
    ),
    "dot-product/m3d-clip": TinyHead(
        {
            "architecture": {"dim": 6, "features": 5, "upsample": [1, 2, 4]},
            "encoder": TINY_ENCODERS["m3d-clip"].block,
        },
        (1, 8, 16, 16),
    ),
    "vista3d": TinyHead(
        {"architecture": {"width": 8, "blocks_down": [1, 1, 1]}, "patch": [8, 8, 8]}, (1, 8, 12, 8)
    ),
    "sam": TinyHead({"architecture": TINY_SAM}, (3, 64, 64)),
    "sam3": TinyHead({"architecture": TINY_SAM3}, (3, 112, 112)),
    "sam2": TinyHead({"architecture": TINY_SAM2 | TINY_MEMORY}, (3, 128, 128)),
}


def build_head(name: str, **options: Any) -> MaskHead:
    """Build a registered head, or a variant of one, as a recipe with these options would."""
    registered = registered_name(name)
    block = HEADS.entry(registered).options.model_validate(
        {"name": registered, **TINY_HEADS[name].block, **options}
    )
    entry = {"name": registered, **block.model_dump(exclude=NOT_FOR_CONSTRUCTORS)}
    kind: Kind = "image" if len(TINY_HEADS[name].pixels) == 3 else "volume"
    sizes = HEADS.get(registered).architecture_for(kind, block.architecture)
    return construct_head(entry | {"architecture": sizes})


def registered_name(name: str) -> str:
    """Return the registered name of a head or of a variant."""
    return name.partition("/")[0]
