"""The text tower of SigLIP (arXiv 2303.15343) and SigLIP 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import SiglipTextConfig, SiglipTextModel

from medm.text_encoders.base import TextEncoder, TextFeatures


class SiglipTextEncoder(TextEncoder):
    """Bidirectional transformer; a text's vector is the last position, after a linear head.

    Published SigLIP models were trained on texts padded to `max_length` without a mask, so that the
    last position is usually padding. The mask is therefore not passed on, and every text must be
    padded to the same length as in training.

    Args:
        architecture: fields of `SiglipTextConfig`.
    """

    config_class: ClassVar = SiglipTextConfig
    key_map: ClassVar = (
        (r"^(?:text_model\.)?(embeddings|encoder|final_layer_norm|head)\.", r"tower.\1."),
    )
    ignored_keys = (r"^(vision_model|logit_scale|logit_bias)", r"position_ids$")
    pads_to_max_length: ClassVar[bool] = True

    def __init__(self, *, architecture: Mapping[str, Any]) -> None:
        super().__init__()
        config = SiglipTextConfig(**architecture)
        self.tower = SiglipTextModel(config)
        self.dim = int(config.projection_size or config.hidden_size)
        self.max_length = int(config.max_position_embeddings)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
        output = self.tower(input_ids=input_ids)
        return TextFeatures(output.last_hidden_state, output.pooler_output)
