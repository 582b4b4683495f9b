"""The text tower of CLIP (arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from medm.text_encoders.base import TextEncoder, TextFeatures


class CLIPTextEncoder(TextEncoder):
    """Causal transformer; a text's vector is the state of its end token after the final layer norm.

    Args:
        architecture: fields of `CLIPTextConfig`.
    """

    config_class: ClassVar = CLIPTextConfig
    key_map: ClassVar = (
        (r"^(?:text_model\.)?(embeddings|encoder|final_layer_norm)\.", r"tower.\1."),
    )
    ignored_keys = (
        r"^(vision_model|visual_projection|text_projection|logit_scale)",
        r"position_ids$",
    )

    def __init__(self, *, architecture: Mapping[str, Any]) -> None:
        super().__init__()
        config = CLIPTextConfig(**architecture)
        self.tower = CLIPTextModel(config)
        self.dim, self.max_length = int(config.hidden_size), int(config.max_position_embeddings)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
        output = self.tower(input_ids=input_ids, attention_mask=attention_mask)
        return TextFeatures(output.last_hidden_state, output.pooler_output)
