"""Dual encoders in the layouts of OpenAI's CLIP, MetaCLIP, open_clip and UniMed-CLIP, under the
names of transformers' `CLIPModel`.

Towers that transformers' CLIP does not have keep their own names behind the prefix of the tower: a
BERT behind `text_model.`, a plain ViT of open_clip's `visual.trunk` behind `vision_model.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from medm.encoders.key_map import map_key

OPEN_CLIP = "open-clip"
"""`model_type` of the config that stands for the layout; no published file has it."""
_HEAD_WIDTH = 64
"""Of every head of the published towers, unless their config says another width."""

_BLOCK = (
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_NAMES = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.trunk\.", "vision_model."),
    (r"^visual\.head\.proj\.", "visual_projection."),
    (r"^(?:text|text_encoder)\.proj\.", "text_projection."),
    (r"^(?:text|text_encoder)\.(?:transformer\.)?(embeddings|encoder|pooler)\.", r"text_model.\1."),
    (r"^(?:text\.)?token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^(?:text\.)?positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^(?:text\.)?transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^(?:text\.)?ln_final\.", "text_model.final_layer_norm."),
    (r"^(?:text\.)?text_projection(?:\.weight)?$", "text_projection.weight"),
    (r"^(?:text\.)?(attn_mask|context_length|vocab_size|input_resolution)$", r"text_model.\1"),
)
_MATRICES = re.compile(r"^(visual\.proj|(text\.)?text_projection)$")
"""Stored as (in, out), where a linear layer has (out, in)."""


def is_open_clip(names: Mapping[str, object]) -> bool:
    """Return whether tensors are named as open_clip names those of a dual encoder."""
    return "visual.conv1.weight" in names or "visual.trunk.patch_embed.proj.weight" in names


def stock_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors under transformers' names, and for each name that of the file."""
    stock: dict[str, Tensor] = {}
    in_file: dict[str, str] = {}
    for name, tensor in tensors.items():
        new = map_key(name, _NAMES)
        value = tensor.T if _MATRICES.match(name) else tensor
        if ".encoder.layers." in new and "resblocks" in name:
            for pattern, replacement in _BLOCK:
                new = re.sub(pattern, replacement, new)
        if found := re.match(r"(.*)\.attn\.in_proj_(weight|bias)$", new):
            for part, rows in zip(("q", "k", "v"), value.chunk(3), strict=True):
                split = f"{found[1]}.self_attn.{part}_proj.{found[2]}"
                stock[split], in_file[split] = rows, name
            continue
        stock[new], in_file[new] = value, name
    return stock, in_file


def config_of(tensors: Mapping[str, Tensor], model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the fields that transformers' would have for such tensors.

    Args:
        tensors: under transformers' names.
        model_cfg: that of `open_clip_config.json`; empty where there is none, and then the
            activation is the quick GELU of OpenAI's, MetaCLIP's and UniMed-CLIP's files.
    """
    quick = bool(model_cfg.get("quick_gelu", not model_cfg))
    activation = "quick_gelu" if quick else "gelu"
    vision, text = dict(model_cfg.get("vision_cfg", {})), dict(model_cfg.get("text_cfg", {}))
    return {
        "model_type": OPEN_CLIP,
        "vision_config": _vision(tensors, int(vision.get("head_width", _HEAD_WIDTH)), activation),
        "text_config": _text(tensors, text, activation),
    }


def _vision(tensors: Mapping[str, Tensor], head: int, activation: str) -> dict[str, Any]:
    trunk = "vision_model.patch_embed.proj.weight" in tensors
    patches = tensors[
        "vision_model.patch_embed.proj.weight"
        if trunk
        else "vision_model.embeddings.patch_embedding.weight"
    ]
    positions = tensors[
        "vision_model.pos_embed" if trunk else "vision_model.embeddings.position_embedding.weight"
    ]
    inner = "vision_model.blocks.0.mlp.fc1.weight"
    if not trunk:
        inner = "vision_model.encoder.layers.0.mlp.fc1.weight"
    width, channels, patch = (int(patches.shape[axis]) for axis in (0, 1, 3))
    cells = round((positions.shape[-2] - 1) ** 0.5)
    sizes = {
        "hidden_size": width,
        "intermediate_size": len(tensors[inner]),
        "num_hidden_layers": _depth(tensors, r"^vision_model\.(?:blocks|encoder\.layers)\.(\d+)\."),
        "num_attention_heads": max(width // head, 1),
        "num_channels": channels,
        "patch_size": patch,
        "image_size": cells * patch,
    }
    return sizes if trunk else {**sizes, "hidden_act": activation}


def _text(
    tensors: Mapping[str, Tensor], text_cfg: Mapping[str, Any], activation: str
) -> dict[str, Any]:
    bert = tensors.get("text_model.embeddings.word_embeddings.weight")
    if bert is not None:
        return {
            "model_type": "bert",
            "vocab_size": len(bert),
            "hidden_size": bert.shape[1],
            "num_attention_heads": max(bert.shape[1] // _HEAD_WIDTH, 1),
            "num_hidden_layers": _depth(tensors, r"^text_model\.encoder\.layer\.(\d+)\."),
            "intermediate_size": len(
                tensors["text_model.encoder.layer.0.intermediate.dense.weight"]
            ),
            "max_position_embeddings": len(
                tensors["text_model.embeddings.position_embeddings.weight"]
            ),
            "type_vocab_size": len(tensors["text_model.embeddings.token_type_embeddings.weight"]),
        }
    words = tensors.get("text_model.embeddings.token_embedding.weight")
    if words is None:  # an image tower alone
        return {}
    vocabulary, width = words.shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_attention_heads": int(text_cfg.get("heads", max(width // _HEAD_WIDTH, 1))),
        "num_hidden_layers": _depth(tensors, r"^text_model\.encoder\.layers\.(\d+)\."),
        "intermediate_size": len(tensors["text_model.encoder.layers.0.mlp.fc1.weight"]),
        "max_position_embeddings": len(tensors["text_model.embeddings.position_embedding.weight"]),
        "hidden_act": activation,
        # The last two rows of the vocabulary begin and end a text.
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def _depth(tensors: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, name) for name in tensors)
    return 1 + max((int(one[1]) for one in found if one), default=-1)


def preprocessor_of(preprocess_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `preprocessor_config.json` that says what `open_clip_config.json` says."""
    filters = {"bilinear": 2, "bicubic": 3}
    names = {"mean": "image_mean", "std": "image_std"}
    found: dict[str, Any] = {
        new: preprocess_cfg[old] for old, new in names.items() if old in preprocess_cfg
    }
    if preprocess_cfg.get("interpolation") in filters:
        found["resample"] = filters[preprocess_cfg["interpolation"]]
    if preprocess_cfg:
        found["do_center_crop"] = preprocess_cfg.get("resize_mode", "shortest") == "shortest"
    return found
