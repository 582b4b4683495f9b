"""BLIP in the layout of its own code (`visual_encoder.*`, as MOTOR writes it, too), under the names
of transformers' `BlipPreTrainedModel`s.

Names of text encoder, decoder, projections and heads are the same in both layouts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from medm.encoders.key_map import map_key

BLIP = "blip"
"""`model_type` of transformers' folders, and of the config that stands for the other layout."""
VISION = "vision_model."
"""Beginning of the names of the image tower."""
_HEAD_WIDTH = 64
"""Of every head of the published models."""
_ORIGINAL = "visual_encoder."

_NAMES = (
    (r"^visual_encoder\.cls_token$", f"{VISION}embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", f"{VISION}embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", f"{VISION}embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", f"{VISION}post_layernorm."),
    (
        r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.",
        rf"{VISION}encoder.layers.\1.self_attn.projection.",
    ),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.", rf"{VISION}encoder.layers.\1.self_attn."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm", rf"{VISION}encoder.layers.\1.layer_norm"),
    (r"^visual_encoder\.blocks\.", f"{VISION}encoder.layers."),
    (r"^visual_encoder\.", VISION),
)


def is_blip(names: Mapping[str, object]) -> bool:
    """Return whether tensors are named as BLIP's own code names them."""
    return f"{_ORIGINAL}cls_token" in names


def stock_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors under transformers' names, and for each name that of the file."""
    stock: dict[str, Tensor] = {}
    in_file: dict[str, str] = {}
    for name, tensor in tensors.items():
        new = map_key(name, _NAMES)
        stock[new], in_file[new] = tensor, name
    return stock, in_file


def config_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a config with the fields that transformers' would have for such tensors.

    The files do not say them: heads are 64 wide, the norms add 1e-6 in the image tower and 1e-12
    in the text encoder, and the last two rows of the vocabulary are `[DEC]` and `[ENC]`.

    Args:
        tensors: under transformers' names.
    """
    positions = tensors[f"{VISION}embeddings.position_embedding"]
    width, channels, _, patch = tensors[f"{VISION}embeddings.patch_embedding.weight"].shape
    config: dict[str, Any] = {
        "model_type": BLIP,
        "vision_config": {
            "model_type": "blip_vision_model",
            "hidden_size": int(width),
            "intermediate_size": len(tensors[f"{VISION}encoder.layers.0.mlp.fc1.weight"]),
            "num_hidden_layers": _depth(tensors, rf"^{VISION}encoder\.layers\.(\d+)\."),
            "num_attention_heads": max(int(width) // _HEAD_WIDTH, 1),
            "num_channels": int(channels),
            "patch_size": int(patch),
            "image_size": round((positions.shape[1] - 1) ** 0.5) * int(patch),
            "layer_norm_eps": 1e-6,
        },
    }
    for front in ("text_encoder.", "text_decoder.bert."):
        words = tensors.get(f"{front}embeddings.word_embeddings.weight")
        if words is None:
            continue
        rows, hidden = words.shape
        config["text_config"] = {
            "model_type": "blip_text_model",
            "vocab_size": rows,
            "hidden_size": hidden,
            "encoder_hidden_size": int(width),
            "intermediate_size": len(tensors[f"{front}encoder.layer.0.intermediate.dense.weight"]),
            "num_hidden_layers": _depth(tensors, rf"^{front}encoder\.layer\.(\d+)\."),
            "num_attention_heads": max(hidden // _HEAD_WIDTH, 1),
            "max_position_embeddings": len(
                tensors[f"{front}embeddings.position_embeddings.weight"]
            ),
            "bos_token_id": rows - 2,
        }
        break
    return config


def _depth(tensors: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, name) for name in tensors)
    return 1 + max((int(one[1]) for one in found if one), default=-1)
