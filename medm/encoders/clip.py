"""CLIP vision tower (arXiv 2103.00020).

The blocks of transformers run up to the requested layer.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from medm.encoders.vit import HFViTEncoder
from medm.types import Config

logger = logging.getLogger(__name__)

_POSITIONS = re.compile(r"^(?!text_model\.)(?:\w+\.)?embeddings\.position_embedding\.weight$")


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

    def rename_published(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Published tensors, the table of positions resized where the architecture names another
        `image_size` than the file was trained at.

        As MetaCLIP and UniMed-CLIP begin a tower of 336 pixels with one of 224: bicubic with
        aligned corners, the class token's position as it is.
        """
        rows = (self.native_size // self.patch_size) ** 2 + 1
        name = next(filter(_POSITIONS.match, tensors), None)
        if name is None or len(tensors[name]) == rows:
            return tensors
        table = tensors[name].float()  # (1 + cells, dim)
        old, new = math.isqrt(len(table) - 1), math.isqrt(rows - 1)
        if old * old + 1 != len(table):
            return tensors  # no square: its shape is refused
        logger.warning("position embeddings are resized from %s to %s cells a side", old, new)
        grid = table[1:].T.unflatten(1, (old, old)).unsqueeze(0)
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=True)
        resized = torch.cat([table[:1], grid[0].flatten(1).T]).to(tensors[name].dtype)
        return {**tensors, name: resized}

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
