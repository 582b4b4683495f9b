"""Samples in one row: the numbers of padded batches, and no mask over the row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from medm.data.collator import Collator
from medm.data.packing import PackingCollator
from medm.llms.attention import PER_DOCUMENT, no_mask, separates_documents
from medm.models.lvlm.configuration import LVLMConfig
from medm.models.lvlm.modeling import LVLMForConditionalGeneration
from medm.types import IGNORE_INDEX, Example

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: list[type[PreTrainedConfig]] = [LlamaConfig, Qwen2Config, Qwen3Config, PhiConfig, Phi3Config]


def examples(*lengths: int) -> list[Example]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 64, length).tolist() for length in lengths]
    return [Example(one, [IGNORE_INDEX] * (len(one) // 3) + one[len(one) // 3 :]) for one in ids]


def lvlm(config: type[PreTrainedConfig], **changes: Any) -> LVLMForConditionalGeneration:
    torch.manual_seed(0)
    text = config(**SIZES | changes).to_dict()
    model = LVLMForConditionalGeneration(LVLMConfig(text_config=text, llm="auto", branches={}))
    model.language_model.set_attn_implementation("sdpa")
    return model


@pytest.mark.parametrize("config", FAMILIES)
def test_one_row_gives_the_loss_and_gradients_of_a_padded_batch(
    config: type[PreTrainedConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lvlm(config, **({"sliding_window": None} if config is Phi3Config else {}))
    data = examples(7, 12, 2, 5, 9)
    padded = model(**Collator(0)(data)).loss
    padded.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert model.separate_samples()
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(q: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        calls.append((q.shape[2], named.get("attn_mask")))
        return attend(q, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    packed = model(**PackingCollator(0, 20, flat=True)(data)).loss
    packed.backward()
    assert [length for length, _ in calls] == [7, 12, 2, 5, 9] * 2, "each sample by itself, in each layer"
    assert all(mask is None for _, mask in calls)
    assert packed.item() == pytest.approx(padded.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        if name in expected:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)


def test_padded_batches_and_decoding_go_on_as_before() -> None:
    model = lvlm(LlamaConfig).eval()
    batch = Collator(0, padding_side="left")(examples(7, 12, 5))
    batch.pop("labels")
    with torch.no_grad():
        before = model(**batch).logits[:, -1]
        said = model.generate(**batch, max_new_tokens=5, do_sample=False)
        assert separates_documents(model.language_model)
        torch.testing.assert_close(model(**batch).logits[:, -1], before, atol=1e-6, rtol=1e-6)
        assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False), said)


def test_the_choice_stays_out_of_what_is_saved() -> None:
    model = lvlm(LlamaConfig)
    model.separate_samples()
    assert PER_DOCUMENT not in model.config.to_json_string()


@pytest.mark.parametrize(
    ("config", "changes", "attention"),
    [(MistralConfig, {"sliding_window": 4}, "sdpa"), (LlamaConfig, {}, "eager")],
)
def test_attention_that_cannot_be_split_is_left_alone(
    config: type[PreTrainedConfig], changes: dict[str, Any], attention: str
) -> None:
    model = AutoModelForCausalLM.from_config(config(**SIZES | changes))
    model.set_attn_implementation(attention)
    assert not separates_documents(model)
    assert model.config._attn_implementation == attention
    assert no_mask(model, torch.zeros(1, 3, 32)) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_for_packed_samples_gives_what_the_loop_gives() -> None:
    model = lvlm(LlamaConfig, hidden_size=128).to("cuda", torch.bfloat16)
    model.separate_samples()
    batch = {
        key: value.cuda() if isinstance(value, torch.Tensor) else value
        for key, value in PackingCollator(0, 64, flat=True)(examples(7, 30, 12)).items()
    }
    fast = model(**batch).loss
    slow = model.float()(**batch).loss
    assert fast.item() == pytest.approx(slow.item(), rel=2e-2)
