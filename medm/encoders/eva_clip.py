"""EVA-CLIP ViT-g/14 (arXiv 2211.07636), with the tensor names of `eva_vit_g.pth`.

BLIP-2, MiniGPT-4 and Uni-Med use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from medm.encoders import LayerNormAfter, VisionTokens
from medm.encoders.plain_vit import ImageViT, PlainViT
from medm.types import VisionFeatures


class EVACLIPEncoder(ImageViT):
    """ViT-g/14 of width 1408.

    BLIP-2, MiniGPT-4 and Uni-Med read the second to last of 40 blocks, which is `layer=-2`.

    Args:
        architecture: see `PlainViT`.
        others: see `EVACLIPOptions`.
    """

    key_map: ClassVar = (
        (r"^(?:visual_encoder\.)?cls_token$", "cls_token"),
        (r"^(?:visual_encoder\.)?pos_embed$", "positions"),
        (r"^(?:visual_encoder\.)?patch_embed\.proj\.", "patches.0."),
        (
            r"^(?:visual_encoder\.)?blocks\.(\d+)\.attn\.(q_bias|v_bias|qkv\.weight)$",
            r"blocks.\1.attention.\2",
        ),
        (r"^(?:visual_encoder\.)?blocks\.(\d+)\.attn\.proj\.", r"blocks.\1.attention.out."),
        (r"^(?:visual_encoder\.)?blocks\.(\d+)\.mlp\.fc1\.", r"blocks.\1.up."),
        (r"^(?:visual_encoder\.)?blocks\.(\d+)\.mlp\.fc2\.", r"blocks.\1.down."),
        (r"^(?:visual_encoder\.)?blocks\.(\d+)\.(norm[12])\.", r"blocks.\1.\2."),
    )
    ignored_keys: ClassVar = (
        r"^(visual_encoder\.)?(norm|fc_norm|head)\.",
        r"^(Qformer|query_tokens|opt_proj|t5_proj)",
    )
    truncated_keys: ClassVar[tuple[str, ...]] = (*PlainViT.truncated_keys, r"^ln_vision\.")

    published_sizes: ClassVar = {
        "image_size": 224,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_size": 1408,
        "intermediate_size": 6144,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
    }
    block_bias: ClassVar = "query-value"

    def __init__(
        self,
        *,
        architecture: Mapping[str, object],
        layer: int = -2,
        tokens: VisionTokens = "patch",
        ln_vision: LayerNormAfter = "plain",
    ) -> None:
        super().__init__(architecture=architecture, layer=layer, tokens=tokens)
        learned = ln_vision == "learned"
        self.ln_vision = (
            nn.Identity()
            if ln_vision == "none"
            else nn.LayerNorm(self.dim, elementwise_affine=learned)
        )

    def forward(self, pixels: Tensor) -> VisionFeatures:
        """pixels: (B, C, height, width)."""
        features = super().forward(pixels)
        return features._replace(tokens=self.ln_vision(features.tokens))
