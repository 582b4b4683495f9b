"""A tiny block for each registered text encoder, as a recipe would write it."""

from __future__ import annotations

from typing import Any

from medm.text_encoders import TEXT_ENCODERS
from medm.text_encoders.base import TextEncoder

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 16,
}
TINY_TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {"name": "bert", "architecture": SIZES},
    "clip-text": {
        "name": "clip-text",
        "architecture": {**SIZES, "bos_token_id": 58, "eos_token_id": 59},
    },
    "siglip-text": {"name": "siglip-text", "architecture": {**SIZES, "projection_size": 24}},
}


def build_text_encoder(block: dict[str, Any]) -> TextEncoder:
    """The encoder of a block, with random weights."""
    options = TEXT_ENCODERS.entry(block["name"]).options.model_validate(block)
    return TEXT_ENCODERS.get(block["name"])(**options.model_dump(exclude={"name", "path"}))
