"""Tiny folders in the layouts of MedM-VL, written from their facts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, SiglipVisionConfig, SiglipVisionModel

from tests.encoders.test_volume_vit import m3d_shapes, random_state, whole_clip
from tests.inference.tiny import awaken
from tests.tiny import VIT

DIM = 32
"""Width of the tiny language models."""
M3D_SIZE, M3D_PATCH = (8, 16, 16), (4, 8, 8)


def write(folder: Path, llm: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """A published folder: config, tensors under MedM-VL's prefixes, the LLM's tokenizer. Returns
    the LLM."""
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(llm)
    awaken(model)
    language = {f"llm.{name}": tensor for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        language.pop("llm.lm_head.weight")
    save_file(
        {k: v.detach().clone().contiguous() for k, v in (language | tensors).items()},
        folder / "model.safetensors",
    )
    for file in llm.iterdir():
        if file.name.startswith("tokenizer"):
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    return model


def mlp(prefix: str, in_dim: int, depth: int = 2) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """MedM-VL's mlpNx_gelu and its tensors."""
    torch.manual_seed(5)
    layers: list[nn.Module] = [nn.Linear(in_dim, DIM)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(DIM, DIM)]
    module = nn.Sequential(*layers)
    return module, {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def siglip() -> SiglipVisionModel:
    torch.manual_seed(2)
    tower = SiglipVisionModel(SiglipVisionConfig(**VIT)).eval()
    awaken(tower)
    return tower


def vision_names(tower: nn.Module) -> dict[str, Tensor]:
    """As transformers 4 wrote them."""
    return {
        f"encoder_image.encoder.vision_model.{name}": tensor
        for name, tensor in tower.state_dict().items()
    }


def m3d_tower(size: Sequence[int] = M3D_SIZE) -> dict[str, Tensor]:
    """The tensors of an M3D-CLIP tower for volumes of a size."""
    cells = prod(side // patch for side, patch in zip(size, M3D_PATCH, strict=True))
    return random_state(m3d_shapes(cells=cells), seed=4)


def volume_names(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """M3D-CLIP with its text side, as MedM-VL saves it."""
    whole = whole_clip(tower)
    return {f"encoder_image3d.encoder.{name}": tensor for name, tensor in whole.items()}


def config_2d(*, llm: str, encoder: str) -> dict[str, Any]:
    """Generation C with a SigLIP: prefixed keys, the parts by their names.

    Args:
        llm: folder or id of the language model.
        encoder: folder or id of the tower.
    """
    return {
        "model_type": "lvlm", "lvlm_llm_type": "qwen2", "lvlm_llm_name_or_path": llm,
        "lvlm_encoder_image_type": "siglip", "lvlm_encoder_image_name_or_path": encoder,
        "lvlm_encoder_image_select_layer": -1, "lvlm_encoder_image_select_feature": "cls_patch",
        "lvlm_connector_image_type": "mlp", "lvlm_connector_image_name": "mlp2x_gelu",
        "lvlm_encoder_image3d_type": None,
    }  # fmt: skip


def config_ct(llm: Path, size: Sequence[int] = M3D_SIZE) -> dict[str, Any]:
    """Generation A with an M3D-CLIP, as MedM-VL-CT-3B-en: the configs of the parts are nested."""
    return {
        "llm_type": "llama3", "llm_name_or_path": "/somewhere/Llama-3.2-3B-Instruct",
        "llm_config": json.loads((llm / "config.json").read_text()),
        "encoder_image3d_type": "m3dclip",
        "encoder_image3d_config": {
            "img_size": list(size), "patch_size": list(M3D_PATCH), "in_channels": 1, "hidden_size": 24, "mlp_dim": 40,
            "num_layers": 3, "num_heads": 3, "encoder_image3d_select_layer": -1, "select_feature": "patch",
        },
        "connector_image3d_config": {"connector_type": "spatial_pooling", "connector_name": "mlp2x_gelu"},
    }  # fmt: skip
