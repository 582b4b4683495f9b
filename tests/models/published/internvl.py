"""Folders in InternVL's own layout, tiny and random: InternVL, and Sa2VA with its mask head."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    InternVLConfig,
    InternVLForConditionalGeneration,
)

from medm.encoders.internvit import InternViTEncoder
from tests.encoders.internvit import original_config, original_projector, original_tower
from tests.tiny import llm_architecture, make_tokenizer

TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "[SEG]", "<p>", "</p>", "<vp>", "</vp>"]
"""Special tokens of the published tokenizers: InternVL's, and those that Sa2VA adds."""


@dataclass(frozen=True)
class Published:
    """A folder, and the modules whose weights it holds."""

    folder: Path
    tower: nn.Module
    projector: nn.Module
    llm: Any
    tensors: dict[str, Tensor]
    projection: nn.Sequential | None = None
    """From the state at `[SEG]` to the prompt of the mask head."""

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Tokens (items, 4, D) of pixels (items, 3, 16, 16), 2 x 2 of a grid of 4 x 4 side by
        side."""
        states = self.tower(pixel_values=pixels).last_hidden_state[:, 1:]
        cells = states.reshape(len(pixels), 2, 2, 2, 2, -1)  # rows, in a square, columns, in it
        return self.projector(cells.transpose(2, 3).flatten(1, 2).flatten(2))


def write_published(
    folder: Path,
    *,
    head: dict[str, Tensor] | None = None,
    prompt_dim: int = 6,
    template: str = "internvl2_5",
    **config: Any,
) -> Published:
    """Write a folder as InternVL (without `head`) or Sa2VA (with its tensors) is published.

    Args:
        folder: to write.
        head: tensors of SAM 2 under Meta's names.
        prompt_dim: width of its prompts.
        template: in the config.
        config: further fields of the config.
    """
    torch.manual_seed(3)
    tokenizer = make_tokenizer("qwen2.5")
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    tokenizer.chat_template = None
    sizes = llm_architecture(
        "qwen2.5", vocab_size=len(tokenizer), tie_word_embeddings=False, eos_token_id=257,
        rope_theta=5000.0,
    )  # fmt: skip
    vision = original_config()
    stock: Any = InternVLForConditionalGeneration(
        InternVLConfig(text_config=sizes, vision_config=InternViTEncoder.architecture_from(vision))
    ).eval()
    llm: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes)).eval()
    with torch.no_grad():
        for parameter in [*stock.parameters(), *llm.parameters()]:
            parameter.add_(0.2 * torch.randn_like(parameter))
    tower, projector = stock.model.vision_tower, stock.model.multi_modal_projector
    tensors = {f"vision_model.{k}": v for k, v in original_tower(tower.state_dict()).items()}
    tensors |= original_projector(projector.state_dict())
    tensors |= {f"language_model.{k}": v for k, v in llm.state_dict().items()}
    projection = None
    if head is not None:
        width = sizes["hidden_size"]
        projection = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, prompt_dim), nn.Dropout(0.0)
        )
        tensors |= {f"text_hidden_fcs.{k}": v for k, v in projection.state_dict().items()}
        tensors |= {f"grounding_encoder.sam2_model.{k}": v for k, v in head.items()}
    folder.mkdir(parents=True)
    kind = "InternVLChat" if head is None else "Sa2VAChat"
    described = {
        "model_type": "internvl_chat" if head is None else "sa2va_chat",
        "architectures": [f"{kind}Model"],
        "auto_map": {"AutoModel": f"modeling_{kind.lower()}.{kind}Model"},
        "vision_config": vision,
        # transformers 4 wrote every setting of generation into a config.
        "llm_config": {
            **sizes, "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "float32",
            "temperature": 1.0, "top_k": 50, "num_beams": 1, "bad_words_ids": None,
        },
        "select_layer": -1, "force_image_size": 16, "downsample_ratio": 0.5, "ps_version": "v2",
        "template": template, "dynamic_image_size": True, "use_thumbnail": True,
        "min_dynamic_patch": 1, "max_dynamic_patch": 6, "pad2square": False, "use_backbone_lora": 0,
        "use_llm_lora": 0, "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**described, **config}))
    kept = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    for name in ("modeling_sa2va_chat.py", "configuration_sa2va_chat.py"):
        (folder / name).write_text("raise SystemExit('code of a repository was run')\n")
    return Published(folder, tower, projector, llm, kept, projection)
