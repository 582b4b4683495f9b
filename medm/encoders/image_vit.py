"""The original ViT (arXiv 2010.11929): under timm's names, as open_clip holds it in BiomedCLIP, and
as the image tower of BLIP under transformers' names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import BlipVisionConfig

from medm.encoders.plain_vit import ImageViT
from medm.errors import RecipeError
from medm.types import Config

_BLIP = r"^(?:vision_model\.)?encoder\.layers\.(\d+)\."


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
        (r"^(?:vision_model\.)?embeddings\.class_embedding$", "cls_token"),
        (r"^(?:vision_model\.)?embeddings\.position_embedding$", "positions"),
        (r"^(?:vision_model\.)?embeddings\.patch_embedding\.", "patches.0."),
        (_BLIP + r"self_attn\.qkv\.", r"blocks.\1.attention.qkv."),
        (_BLIP + r"self_attn\.projection\.", r"blocks.\1.attention.out."),
        (_BLIP + r"mlp\.fc1\.", r"blocks.\1.up."),
        (_BLIP + r"mlp\.fc2\.", r"blocks.\1.down."),
        (_BLIP + r"layer_norm([12])\.", r"blocks.\1.norm\2."),
    )
    ignored_keys: ClassVar = (
        r"^(text_model|text_projection|visual_projection|logit_scale)",
        r"^(vision_model\.)?(norm|head|post_layernorm)\.",
    )
    published_sizes: ClassVar = {
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "layer_norm_eps": 1e-6,
    }

    @classmethod
    def architecture_from(cls, published: Mapping[str, object]) -> Config:
        """Sizes of the tower, alone or as the `vision_config` of a dual encoder or of BLIP.

        Raises:
            RecipeError: another activation than the one that is computed here.
        """
        vision = published.get("vision_config")
        fields: Mapping[str, Any] = vision if isinstance(vision, Mapping) else published
        if published.get("model_type") == "blip":
            config = BlipVisionConfig(**fields)
            if config.hidden_act != cls.block_activation:
                raise RecipeError(
                    f"vit computes {cls.block_activation!r}, and the image tower of this BLIP has "
                    f"hidden_act {config.hidden_act!r}"
                )
            fields = config.to_dict()
        return super().architecture_from(fields)
