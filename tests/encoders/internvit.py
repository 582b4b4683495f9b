"""InternVL's own layout of tower and projector, written from a model of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from medm.types import Config

SIZES: Config = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 16,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "norm_type": "layer_norm",
    "qkv_bias": True,
    "qk_normalization": False,
}


def original_config(**changes: object) -> Config:
    """The `config.json` of a tower in the original layout, with fields that are not read."""
    unread = {
        "model_type": "intern_vit_6b",
        "architectures": ["InternVisionModel"],
        "auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"},
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "drop_path_rate": 0.1,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "use_flash_attn": True,
        "torch_dtype": "float32",
    }
    return {**SIZES, **unread, **changes}


def original_tower(stock: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an `InternVLVisionModel` under the names of InternVL's code."""
    found: dict[str, Tensor] = {}
    for name, tensor in stock.items():
        name = name.replace("embeddings.cls_token", "embeddings.class_embedding")
        name = name.replace("embeddings.position_embeddings", "embeddings.position_embedding")
        name = name.replace("patch_embeddings.projection", "patch_embedding")
        name = name.replace("encoder.layer.", "encoder.layers.")
        name = name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        name = re.sub(r"lambda_(\d)", r"ls\1", name)
        name = name.replace("attention.projection_layer", "attn.proj")
        if ".attention.q_proj." in name:
            key, value = (
                stock[re.sub("encoder.layers", "encoder.layer", name).replace("q_proj", part)]
                for part in ("k_proj", "v_proj")
            )
            found[name.replace("attention.q_proj", "attn.qkv")] = torch.cat([tensor, key, value])
        elif not re.search(r"\.attention\.[kv]_proj\.", name):
            found[name.replace(".attention.", ".attn.")] = tensor
    return found


def original_projector(stock: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an `InternVLMultiModalProjector` under the names of InternVL's code."""
    places = {"layer_norm": 0, "linear_1": 1, "linear_2": 3}
    return {
        f"mlp1.{places[name.split('.')[0]]}.{name.split('.')[1]}": tensor
        for name, tensor in stock.items()
    }
