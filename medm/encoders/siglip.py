"""SigLIP vision tower (arXiv 2303.15343) and fixed-resolution SigLIP 2 (arXiv 2502.14786).

Both have the same layout.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from medm.encoders.vit import HFViTEncoder


class SiglipEncoder(HFViTEncoder):
    """SigLIP ViT: every token is a patch. Output of the chosen block, before the final layer norm.

    The pooled vector is that of the attention pooling head, which is SigLIP's image embedding.
    """

    key_map: ClassVar = (
        (r"^(?:vision_model\.)?(embeddings|encoder|post_layernorm|head)\.", r"tower.\1."),
    )
    ignored_keys: ClassVar = (
        r"^(text_model|logit_scale|logit_bias)",
        r"position_ids$",
    )
    config_class: ClassVar = SiglipVisionConfig
    tower_class: ClassVar = SiglipVisionModel
    has_class_token: ClassVar[bool] = False
    head_field: ClassVar[str | None] = "vision_use_head"

    def embed(self, pixels: Tensor, *, interpolate: bool) -> Tensor:
        return self.tower.embeddings(pixels, interpolate_pos_encoding=interpolate)

    def pool(self, hidden: Tensor) -> Tensor:
        return self.tower.head(self.tower.post_layernorm(hidden))
