"""A `blip` recipe begins with published towers: ViT, DeiT, SciBERT, ResNet and DenseNet layouts."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForPreTraining,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
)

from medm.errors import CheckpointError
from medm.models.blip.modeling import StudyImageTower
from medm.models.published.weights import PretrainedSource, load_module
from medm.text_encoders.bert import BertTextEncoder
from tests.models.blip.tiny import IDS, MASK, make, section, studies
from tests.models.dual_encoder.tiny import TEXT, VISION, WORDS, save_tokenizer

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CLASSES = {"num_labels": 3}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def tower_of(tokenizer: str, encoder: dict[str, Any]) -> StudyImageTower:
    return make(section(tokenizer, image={"encoder": encoder}))[0].image


def tokens_of(tower: StudyImageTower) -> Tensor:
    with torch.no_grad():
        return tower(studies()["pixels"]["image"], torch.ones(4, dtype=torch.int64)).tokens


def noisy(model: Any) -> Any:
    """Weights that are not those of the initialization."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def test_deit_as_a_vit_of_transformers_brings_its_norm(
    tokenizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """facebook/deit-base-patch16-224: `vit.*` behind a classifier."""
    torch.manual_seed(0)
    reference = noisy(ViTForImageClassification(ViTConfig(**VISION, **CLASSES)))
    reference.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "vit.encoder.layer.0.attention.attention.query.weight" in names
    assert {"vit.layernorm.weight", "classifier.bias"} <= names
    with caplog.at_level(logging.INFO):
        tower = tower_of(tokenizer, {"name": "hf-vision", "path": str(tmp_path)})
    assert "image.norm from" in caplog.text
    expected = reference.vit(studies()["pixels"]["image"]).last_hidden_state
    torch.testing.assert_close(tokens_of(tower), expected, **CLOSE)


def test_a_distilled_deit_is_read_without_its_second_token(tokenizer: str, tmp_path: Path) -> None:
    """facebook/deit-base-distilled-patch16-224: `deit.*` and two classifiers."""
    torch.manual_seed(0)
    reference = noisy(DeiTForImageClassificationWithTeacher(DeiTConfig(**VISION, **CLASSES)))
    reference.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "deit.encoder.layer.0.attention.attention.query.weight" in names
    assert {"cls_classifier.bias", "distillation_classifier.bias"} <= names
    tower = tower_of(tokenizer, {"name": "hf-vision", "path": str(tmp_path)})
    hidden = reference.deit(studies()["pixels"]["image"]).last_hidden_state
    expected = torch.cat([hidden[:, :1], hidden[:, 2:]], dim=1)
    torch.testing.assert_close(tokens_of(tower), expected, **CLOSE)


def test_deit_in_the_file_that_motor_starts_from(tokenizer: str, tmp_path: Path) -> None:
    """deit_base_patch16_224-*.pth: `blocks.*` under `model`; the distilled file has one token more."""
    torch.manual_seed(0)
    reference = noisy(
        ViTForImageClassification(ViTConfig(**VISION, **CLASSES, layer_norm_eps=1e-6))
    )
    names = (
        (r"^vit\.embeddings\.cls_token$", "cls_token"),
        (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
        (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^vit\.layernorm\.", "norm."),
        (r"^classifier\.", "head."),
    )
    state: dict[str, Tensor] = {}
    for name, tensor in reference.state_dict().items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        if not name.startswith("vit."):
            state[name] = tensor
    for number, layer in enumerate(reference.vit.layers):
        own = dict(layer.state_dict())
        place = f"blocks.{number}"
        for kind in ("weight", "bias"):
            parts = [own[f"attention.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{place}.attn.qkv.{kind}"] = torch.cat(parts)
            state[f"{place}.attn.proj.{kind}"] = own[f"attention.o_proj.{kind}"]
            state[f"{place}.norm1.{kind}"] = own[f"layernorm_before.{kind}"]
            state[f"{place}.norm2.{kind}"] = own[f"layernorm_after.{kind}"]
            state[f"{place}.mlp.fc1.{kind}"] = own[f"mlp.fc1.{kind}"]
            state[f"{place}.mlp.fc2.{kind}"] = own[f"mlp.fc2.{kind}"]
    file = tmp_path / "deit.pth"
    torch.save({"model": state}, file)
    block = {"name": "vit", "path": str(file), "architecture": dict(VISION)}
    expected = reference.vit(studies()["pixels"]["image"]).last_hidden_state
    torch.testing.assert_close(tokens_of(tower_of(tokenizer, block)), expected, **CLOSE)
    torch.save({"model": state | {"dist_token": torch.zeros(1, 1, 24)}}, file)
    with pytest.raises(CheckpointError, match="1 unexpected: dist_token"):
        tower_of(tokenizer, block)


def scibert(folder: Path) -> BertForPreTraining:
    """allenai/scibert_scivocab_uncased: a pickle with TensorFlow's names of norms."""
    torch.manual_seed(0)
    reference = noisy(BertForPreTraining(BertConfig(**TEXT)))
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): t
        for name, t in reference.state_dict().items()
    }
    assert "cls.predictions.transform.LayerNorm.gamma" in state
    assert "cls.seq_relationship.weight" in state
    assert "bert.pooler.dense.weight" in state
    state["bert.embeddings.position_ids"] = torch.arange(12).unsqueeze(0)
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    reference.config.to_json_file(folder / "config.json")
    save_tokenizer(folder)
    return reference


def test_scibert_starts_encoder_and_decoder_and_the_log_says_what_is_new(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = scibert(tmp_path / "scibert")
    text = {"path": str(tmp_path / "scibert"), "tokenizer": None, "architecture": {}}
    with caplog.at_level(logging.INFO):
        model = make(section("", text=text))[0]
    with torch.no_grad():
        expected = reference.bert(IDS, attention_mask=MASK).last_hidden_state
        found = model.text(IDS, MASK)
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], **CLOSE)
    assert model.decoder is not None
    own = reference.cls.predictions
    torch.testing.assert_close(model.decoder.transform.state_dict(), own.transform.state_dict())
    torch.testing.assert_close(model.decoder.bias[: len(WORDS)], own.bias)
    layer = reference.bert.encoder.layer[1].attention.self.query.weight
    torch.testing.assert_close(model.decoder.attentions()[1].self.query.weight, layer)
    assert re.search(r"text.encoder from \S+: 37 tensors loaded, 5 unused", caplog.text)
    assert re.search(r"text.decoder from \S+: \d+ tensors loaded, 2 unused", caplog.text)
    assert "2 rows of new tokens start from new weights" in caplog.text
    assert "no cross-attention; its 20 tensors start from new weights" in caplog.text


def test_scibert_is_the_text_encoder_of_a_dual_encoder(tmp_path: Path) -> None:
    reference = scibert(tmp_path / "scibert")
    encoder = BertTextEncoder(architecture=dict(TEXT)).eval()
    load_module(
        encoder,
        PretrainedSource(str(tmp_path / "scibert")).tensors(),
        source="test",
        key_map=encoder.key_map,
        ignored=encoder.ignored_keys,
    )
    with torch.no_grad():
        expected = reference.bert(IDS, attention_mask=MASK).last_hidden_state
        torch.testing.assert_close(encoder(IDS, MASK).tokens, expected, **CLOSE)
