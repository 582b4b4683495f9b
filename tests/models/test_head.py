"""The loss of every language model that `auto` takes is that of the logits which the model itself
computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig

import medm.models
from medm.config import validate
from medm.data.collator import Collator
from medm.models.lvlm import token_loss
from medm.models.lvlm.configuration import LVLMConfig
from medm.models.lvlm.modeling import LVLMForConditionalGeneration
from medm.models.lvlm.options import LVLMOptions
from medm.types import IGNORE_INDEX, Example
from tests import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
KNOWN: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 0.1},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "llama": {},
}
"""What medm computes behind the head itself, at the labelled positions alone."""
UNKNOWN: dict[str, dict[str, Any]] = {
    "hyperclovax": {"logits_scaling": 4.0},  # a factor, and Granite's is a divisor
    "falcon_h1": {
        "lm_head_multiplier": 0.5,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_state": 4,
        "mamba_d_head": 8,
        "mamba_chunk_size": 8,
    },
}


def made(kind: str, **fields: Any) -> LVLMForConditionalGeneration:
    torch.manual_seed(0)
    text = AutoConfig.for_model(kind, **(SIZES | fields))
    model = LVLMForConditionalGeneration(
        LVLMConfig(text_config=text, llm="auto", branches={})
    ).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # logits of the size that trained ones have
    model.probe_lm_head()
    return model


@pytest.mark.parametrize("kind", [*KNOWN, *UNKNOWN])
def test_the_loss_is_that_of_the_models_own_logits(kind: str) -> None:
    model = made(kind, **(KNOWN | UNKNOWN)[kind])
    assert model.config.loss_on_full_logits is (kind in UNKNOWN)
    ids = torch.arange(10).unsqueeze(0)
    labels = ids.masked_fill(ids < 4, IGNORE_INDEX)
    with torch.no_grad():
        own = model.language_model(input_ids=ids).logits
        loss = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(loss, F.cross_entropy(own[0, 3:-1], ids[0, 4:]))


@pytest.mark.parametrize("kind", ["llama", "hyperclovax"])
def test_without_a_label_every_weight_has_a_gradient_of_zero(kind: str) -> None:
    model = made(kind, **(KNOWN | UNKNOWN)[kind])
    ids = torch.arange(6).unsqueeze(0)
    model(input_ids=ids, labels=torch.full_like(ids, IGNORE_INDEX)).loss.backward()
    for name, parameter in model.language_model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_auto_builds_any_causal_model_and_the_choice_is_saved(tmp_path: Path) -> None:
    tiny.make_tokenizer("qwen2.5").save_pretrained(tmp_path / "tokenizer")
    section = tiny.lvlm_section(tmp_path, family="auto")
    section["llm"] = {
        "name": "auto",
        "tokenizer": str(tmp_path / "tokenizer"),
        "architecture": {
            "model_type": "hyperclovax",
            **SIZES,
            "vocab_size": 320,
            "logits_scaling": 4.0,
        },
    }
    model, processor = medm.models.build(validate(LVLMOptions, section, source="test"))
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, _ = medm.models.load(str(tmp_path / "saved"))
    assert model.config.loss_on_full_logits is again.config.loss_on_full_logits is True


def test_many_labels_are_computed_in_chunks_with_the_same_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = made("llama")
    ids = torch.arange(22).view(2, 11)
    labels = ids.masked_fill(ids % 11 < 3, IGNORE_INDEX)
    whole = model(input_ids=ids, labels=labels).loss
    whole.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rows: list[int] = []
    monkeypatch.setattr(token_loss, "HEAD_CHUNK", 5)
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, given: rows.append(len(given[0]))
    )
    loss = model(input_ids=ids, labels=labels).loss
    assert rows == [5, 5, 5, 1]
    loss.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "hyperclovax"])
def test_positions_that_the_batch_says_give_the_same_loss_and_gradients(kind: str) -> None:
    model = made(kind, **(KNOWN | UNKNOWN)[kind])
    data = [
        Example(list(range(n)), [IGNORE_INDEX] * k + list(range(k, n)))
        for n, k in ((9, 0), (5, 3), (7, 6))
    ]
    results = []
    for say in (False, True):
        batch = Collator(0, with_mask=not say, with_label_positions=say)(data)
        assert ("label_positions" in batch) is say
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
    (found, gradients), (said, same) = results
    assert said == found
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same[name]), name


def test_said_positions_are_used_and_not_looked_up() -> None:
    model = made("llama")
    ids = torch.arange(6).unsqueeze(0)
    one = model(input_ids=ids, labels=ids, label_positions=torch.tensor([3])).loss
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(one, F.cross_entropy(logits[0, 3:4], ids[0, 4:5]))
