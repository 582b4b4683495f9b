"""BERT (arXiv 1810.04805) and models of its layout, as transformers' `BertModel` computes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import BertConfig, BertModel

from medm.text_encoders.base import TextEncoder, TextFeatures


class BertTextEncoder(TextEncoder):
    """BERT with one vector per text.

    Args:
        architecture: fields of `BertConfig`.
        pool: see `medm.text_encoders.BertOptions`.
    """

    config_class: ClassVar = BertConfig
    key_map: ClassVar = ((r"^(?:bert\.)?(embeddings|encoder|pooler)\.", r"tower.\1."),)

    def __init__(self, *, architecture: Mapping[str, Any], pool: str = "cls") -> None:
        super().__init__()
        config = BertConfig(**architecture)
        self.tower = BertModel(config, add_pooling_layer=pool == "pooler")
        self.pool, self.dim = pool, int(config.hidden_size)
        self.max_length = int(config.max_position_embeddings)
        unused = (r"^cls\.", r"position_ids$")
        self.ignored_keys = unused if pool == "pooler" else (*unused, r"^(?:bert\.)?pooler\.")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
        output = self.tower(input_ids=input_ids, attention_mask=attention_mask)
        tokens = output.last_hidden_state  # (B, T, D)
        if self.pool == "pooler":
            return TextFeatures(tokens, output.pooler_output)
        if self.pool == "cls":
            return TextFeatures(tokens, tokens[:, 0])
        weights = attention_mask.to(tokens.dtype).unsqueeze(-1)  # (B, T, 1)
        return TextFeatures(tokens, (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1))
