"""The smallest dual encoders that are still real, and a batch of pairs for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from medm.config import validate
from medm.models import build
from medm.models.dual_encoder.modeling import DualEncoder
from medm.models.dual_encoder.options import DualEncoderOptions
from medm.models.dual_encoder.processing import DualEncoderProcessor

WORDS = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "chest", "radiograph", "normal", "effusion", "of",
    "the", "knee", "brain", "left", "right", "mass",
)  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": len(WORDS), "max_position_embeddings": 12,
}  # fmt: skip
IDS = torch.tensor([[2, 4, 5, 6, 3], [2, 7, 3, 0, 0], [2, 8, 9, 3, 0], [2, 12, 15, 3, 0]])
MASK = (IDS != 0).long()


def save_tokenizer(folder: Path) -> str:
    """A tokenizer that is a word a token, with BERT's frame around each text."""
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=12,
    )  # fmt: skip
    fast.save_pretrained(folder)
    return str(folder)


def section(tokenizer: str, **changes: Any) -> dict[str, Any]:
    """The `model` section of a CLIP tower and a BERT; `image` and `text` are merged into it."""
    content: dict[str, Any] = {
        "kind": "dual-encoder",
        "image": {"encoder": {"name": "clip", "architecture": dict(VISION)}},
        "text": {
            "encoder": {"name": "bert", "architecture": dict(TEXT)},
            "tokenizer": tokenizer,
            "projection": "mlp",
        },
        "embed_dim": 20,
    }
    for tower in ("image", "text"):
        content[tower] |= changes.pop(tower, {})
    return content | changes


def options(content: dict[str, Any]) -> DualEncoderOptions:
    return validate(DualEncoderOptions, content, source="test")


def make(content: dict[str, Any]) -> tuple[DualEncoder, DualEncoderProcessor]:
    torch.manual_seed(0)
    model, processor = build(options(content))
    assert isinstance(model, DualEncoder)
    assert isinstance(processor, DualEncoderProcessor)
    return model, processor


def pairs(spatial: Sequence[int] = (16, 16), *, rows: int = 4, channels: int = 3) -> dict[str, Any]:
    """A batch of pairs, as the collator of pairs makes it."""
    torch.manual_seed(1)
    branch = "image" if len(spatial) == 2 else "volume"
    pixels = torch.randn(rows, channels, *spatial)
    return {
        "pixels": {branch: pixels},
        "input_ids": IDS[:rows],
        "attention_mask": MASK[:rows],
        "pair_labels": torch.arange(rows),
    }


def loss(output: Any) -> Tensor:
    """Contrast of the pairs, so that every row's gradient depends on every other row."""
    image, text = (
        torch.nn.functional.normalize(one, dim=-1)
        for one in (output.image_embeds, output.text_embeds)
    )
    logits = output.logit_scale * image @ text.T
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))
