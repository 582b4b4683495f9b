"""Every text encoder of the table keeps the contract; the values are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
)

from medm.models.published.weights import PretrainedSource, load_module
from medm.text_encoders import TEXT_ENCODERS
from tests.text_encoders.tiny import SIZES, TINY_TEXT_ENCODERS, build_text_encoder

VISION = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Two texts of 5 and 3 tokens, ended by the end token of the CLIP tower."""
    ids = torch.tensor([[58, 3, 4, 5, 59], [58, 7, 59, 1, 1]])
    return ids, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_every_text_encoder_has_a_tiny_block() -> None:
    assert set(TINY_TEXT_ENCODERS) == set(TEXT_ENCODERS.names())


@pytest.mark.parametrize("name", sorted(TINY_TEXT_ENCODERS))
def test_shapes_and_gradients(name: str, batch: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    encoder = build_text_encoder(TINY_TEXT_ENCODERS[name])
    ids, mask = batch
    features = encoder(ids, mask)
    assert features.tokens.shape[:2] == (2, 5)
    assert features.pooled.shape == (2, encoder.dim)
    assert encoder.max_length == 16
    features.pooled.sum().backward()
    idle = [key for key, value in encoder.named_parameters() if value.grad is None]
    assert idle == []


@pytest.mark.parametrize("name", ["bert", "clip-text"])
def test_padding_changes_nothing(name: str, batch: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    encoder = build_text_encoder(TINY_TEXT_ENCODERS[name]).eval()
    ids, mask = batch
    alone = encoder(ids[1:, :3], mask[1:, :3]).pooled
    torch.testing.assert_close(encoder(ids, mask).pooled[1:], alone)


def test_the_mean_is_over_the_tokens_of_the_text(batch: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    encoder = build_text_encoder({**TINY_TEXT_ENCODERS["bert"], "pool": "mean"}).eval()
    ids, mask = batch
    features = encoder(ids, mask)
    torch.testing.assert_close(features.pooled[1], features.tokens[1, :3].mean(dim=0))


@pytest.mark.parametrize("pool", ["cls", "mean", "pooler"])
def test_published_bert_folders_open(
    pool: str, tmp_path: Path, batch: tuple[Tensor, Tensor]
) -> None:
    """As BiomedBERT is published: with the head of masked language modeling, under `bert.`."""
    torch.manual_seed(0)
    config = BertConfig(**SIZES)
    if pool == "pooler":
        model: Any = BertModel(config)
    else:
        model = BertForMaskedLM(config)
    model.eval().save_pretrained(tmp_path)
    source = PretrainedSource(str(tmp_path))
    cls = TEXT_ENCODERS.get("bert")
    encoder = cls(architecture=cls.architecture_from(source.config()), pool=pool).eval()
    load_module(
        encoder,
        source.tensors(),
        source="test",
        key_map=encoder.key_map,
        ignored=encoder.ignored_keys,
    )
    ids, mask = batch
    base = model if pool == "pooler" else model.bert
    expected = base(input_ids=ids, attention_mask=mask)
    found = encoder(ids, mask)
    torch.testing.assert_close(found.tokens, expected.last_hidden_state)
    if pool == "pooler":
        torch.testing.assert_close(found.pooled, expected.pooler_output)


@pytest.mark.parametrize("name", ["clip-text", "siglip-text"])
def test_the_towers_of_dual_models_give_the_same_vectors(
    name: str, tmp_path: Path, batch: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(0)
    architecture = TINY_TEXT_ENCODERS[name]["architecture"]
    if name == "clip-text":
        config = CLIPConfig(text_config=architecture, vision_config=VISION, projection_dim=6)
        model: Any = CLIPModel(config)
    else:
        model = SiglipModel(SiglipConfig(text_config=architecture, vision_config=VISION))
    model.eval().save_pretrained(tmp_path)
    source = PretrainedSource(str(tmp_path))
    cls = TEXT_ENCODERS.get(name)
    encoder = cls(architecture=cls.architecture_from(source.config())).eval()
    report = load_module(
        encoder,
        source.tensors(),
        source="test",
        key_map=encoder.key_map,
        ignored=encoder.ignored_keys,
    )
    assert all("vision" in key or "visual" in key or "_projection" in key or "logit" in key
               for key in report.ignored)  # fmt: skip
    ids, mask = batch
    masked = {"attention_mask": mask} if name == "clip-text" else {}
    expected = model.text_model(input_ids=ids, **masked)
    torch.testing.assert_close(encoder(ids, mask).pooled, expected.pooler_output)
