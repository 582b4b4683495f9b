"""The original ViT (arXiv 2010.11929) under timm's names, as open_clip holds it in BiomedCLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from medm.encoders.plain_vit import ImageViT
from medm.types import Config


class ViTEncoder(ImageViT):
    """ViT-B/16 by default. Output of the chosen block, before the last layer norm.

    Args:
        architecture: see `PlainViT`.
        others: see `ViTOptions`.
    """

    key_map: ClassVar = (
        (r"^(?:vision_model\.)?cls_token$", "cls_token"),
        (r"^(?:vision_model\.)?pos_embed$", "positions"),
        (r"^(?:vision_model\.)?patch_embed\.proj\.", "patches.0."),
        (r"^(?:vision_model\.)?blocks\.(\d+)\.attn\.qkv\.", r"blocks.\1.attention.qkv."),
        (r"^(?:vision_model\.)?blocks\.(\d+)\.attn\.proj\.", r"blocks.\1.attention.out."),
        (r"^(?:vision_model\.)?blocks\.(\d+)\.mlp\.fc1\.", r"blocks.\1.up."),
        (r"^(?:vision_model\.)?blocks\.(\d+)\.mlp\.fc2\.", r"blocks.\1.down."),
        (r"^(?:vision_model\.)?blocks\.(\d+)\.(norm[12])\.", r"blocks.\1.\2."),
    )
    ignored_keys: ClassVar = (
        r"^(text_model|text_projection|visual_projection|logit_scale)",
        r"^(vision_model\.)?(norm|head)\.",
    )
    published_sizes: ClassVar = {
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }

    @classmethod
    def architecture_from(cls, published: Mapping[str, object]) -> Config:
        """Sizes of the tower, alone or as the `vision_config` of a dual encoder."""
        vision = published.get("vision_config")
        return super().architecture_from(vision if isinstance(vision, Mapping) else published)
