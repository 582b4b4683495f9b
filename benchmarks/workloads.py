"""Models and data of realistic proportions, the same for medm and its peers.

Random weights. Text lengths are log-normal (sigma 0.7, mean about 220 tokens), 12 % of the text is
labeled, 10 % of the samples have no image and 5 % have two: as in instruction data of medical VLMs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from medm.models.lvlm.configuration import LVLMConfig
from medm.models.lvlm.modeling import LVLMForConditionalGeneration
from medm.types import IGNORE_INDEX, Example

PAD, IMAGE = 0, 1
"""Token ids with a meaning; text is drawn from the ids above."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """One workload."""

    name: str
    vision: dict[str, Any]
    text: dict[str, Any]
    mean_text: int = 220
    longest_text: int = 800
    """Determines if the peer's padded batch of 16, with logits at every position, fits into a GPU
    of 139 GiB."""

    @property
    def image_size(self) -> int:
        """Side of the square input."""
        return int(self.vision["image_size"])

    @property
    def image_tokens(self) -> int:
        """Vision tokens of one image."""
        return (self.image_size // int(self.vision["patch_size"])) ** 2


def _text(layers: int, dim: int, heads: int, kv: int, mlp: int, vocabulary: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }


def _vision(layers: int, dim: int, heads: int, mlp: int, size: int, patch: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": dim,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "image_size": size,
        "patch_size": patch,
        "vision_use_head": False,
    }


WORKLOADS = {
    sizes.name: sizes
    for sizes in (
        Sizes("tiny", _vision(4, 192, 3, 768, 112, 14), _text(4, 256, 4, 4, 1024, 32_000)),
        Sizes("0.5B", _vision(12, 768, 12, 3072, 256, 16), _text(24, 896, 14, 2, 4864, 151_936)),
        Sizes("3B", _vision(12, 768, 12, 3072, 256, 16), _text(36, 2048, 16, 2, 11_008, 151_936)),
    )
}


def medm_model(
    sizes: Sizes, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> LVLMForConditionalGeneration:
    """Our model of a workload."""
    torch.manual_seed(0)
    config = LVLMConfig(
        text_config=LlamaConfig(**sizes.text).to_dict(),
        llm="auto",
        branches={
            "image": {
                "encoder": {
                    "name": "siglip",
                    "architecture": sizes.vision,
                    "layer": -1,
                    "tokens": "patch",
                },
                "connector": {"name": "mlp", "depth": 2, "activation": "gelu"},
                "channels": 3,
                "spatial": [sizes.image_size, sizes.image_size],
                "placeholder_id": IMAGE,
            }
        },
    )
    return LVLMForConditionalGeneration(config).to(device, dtype)


def stock_model(ours: LVLMForConditionalGeneration, sizes: Sizes) -> LlavaForConditionalGeneration:
    """Transformers' Llava with the same weights, tensor by tensor."""
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**sizes.vision).to_dict(),
        text_config=LlamaConfig(**sizes.text).to_dict(),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    parameter = next(ours.parameters())
    stock = LlavaForConditionalGeneration(config).to(parameter.device, parameter.dtype)
    copy_weights(ours, stock)
    return stock


def copy_weights(ours: LVLMForConditionalGeneration, stock: LlavaForConditionalGeneration) -> None:
    """From our model into the stock one."""
    stock.model.language_model.load_state_dict(ours.language_model.base_model.state_dict())
    stock.model.vision_tower.load_state_dict(
        {k.removeprefix("tower."): v for k, v in ours.branch("image").encoder.state_dict().items()},
        strict=False,
    )
    mlp = ours.branch("image").connector.state_dict()
    names = {"layers.0": "linear_1", "layers.2": "linear_2"}
    stock.model.multi_modal_projector.load_state_dict(
        {f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in mlp.items()}
    )


def make_examples(
    sizes: Sizes, count: int, *, seed: int = 0, generation: bool = False, drawn: bool = True
) -> list[Example]:
    """Samples after the processor: ids with placeholders, labels, and pixels if they are
    `drawn`.
    """
    rng = np.random.default_rng(seed)
    sigma = 0.7
    lengths = (
        rng.lognormal(np.log(sizes.mean_text) - sigma**2 / 2, sigma, count)
        .clip(16, sizes.longest_text)
        .astype(int)
    )
    images = rng.choice([0, 1, 2], size=count, p=[0.10, 0.85, 0.05])
    examples = []
    for length, number in zip(lengths, images, strict=True):
        text = rng.integers(2, sizes.text["vocab_size"], length).tolist()
        learned = max(2, round(0.12 * length))
        ids = [IMAGE] * (int(number) * sizes.image_tokens) + text
        labels = [IGNORE_INDEX] * (len(ids) - learned) + ids[-learned:]
        shape = (3, sizes.image_size, sizes.image_size)
        pixels = [rng.normal(size=shape).astype(np.float32) for _ in range(number if drawn else 0)]
        examples.append(
            Example(
                ids[:-learned] if generation else ids,
                [IGNORE_INDEX] * (len(ids) - learned) if generation else labels,
                {"image": pixels} if pixels else {},
            )
        )
    return examples


def tokens(examples: list[Example]) -> int:
    """Number of tokens that are not padding."""
    return sum(len(example.input_ids) for example in examples)
