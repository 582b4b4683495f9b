"""CLIP vision tower (arXiv 2103.00020).

The blocks of transformers run up to the requested layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from medm.encoders.vit import HFViTEncoder
from medm.types import Config


class CLIPEncoder(HFViTEncoder):
    """CLIP ViT. Output of the chosen block, before the final layer norm, as LLaVA uses it.

    The pooled vector is the class token behind the final layer norm; CLIP projects it to its
    embedding.
    """

    key_map: ClassVar = (
        (
            r"^(?:vision_model\.)?(embeddings|pre_layrnorm|encoder|post_layernorm)\.",
            r"tower.\1.",
        ),
    )
    ignored_keys: ClassVar = (
        r"^(text_model|text_projection|visual_projection|logit_scale)",
        r"position_ids$",
    )
    config_class: ClassVar = CLIPVisionConfig
    tower_class: ClassVar = CLIPVisionModel
    has_class_token: ClassVar[bool] = True

    def embed(self, pixels: Tensor, *, interpolate: bool) -> Tensor:
        return self.tower.pre_layrnorm(
            self.tower.embeddings(pixels, interpolate_pos_encoding=interpolate)
        )

    def pool(self, hidden: Tensor) -> Tensor:
        return self.tower.post_layernorm(hidden[:, 0])

    @classmethod
    def preprocess_from(
        cls,
        published: Mapping[str, object],
        architecture: Mapping[str, object],
        image_size: int | None = None,
    ) -> Config:
        return {
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
            "fit": "crop",
        } | (super().preprocess_from(published, architecture, image_size))
