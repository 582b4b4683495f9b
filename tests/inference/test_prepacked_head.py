from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
)

from medm.inference import prepacked_head
from medm.inference.prepacked_head import PrepackedLMHead

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize("config", [LlamaConfig, PhiConfig, Gemma2Config])
@torch.no_grad()
def test_it_gives_the_logits_of_the_plain_head_and_leaves_it_as_it_was(
    config: type[PreTrainedConfig],
) -> None:
    """Phi has a bias, Gemma caps its logits after the head."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES)).eval()
    ids = torch.randint(1, 300, (5, 7))
    expected = [model(input_ids=part, logits_to_keep=1).logits for part in (ids, ids[:1])]
    own, names = model.get_output_embeddings(), set(model.state_dict())
    with PrepackedLMHead(model) as packed:
        assert packed
        for part, logits in zip((ids, ids[:1]), expected, strict=True):
            torch.testing.assert_close(
                model(input_ids=part, logits_to_keep=1).logits, logits, atol=1e-5, rtol=1e-5
            )
    assert model.get_output_embeddings() is own
    assert "forward" not in vars(own)
    assert set(model.state_dict()) == names


def test_the_own_head_is_back_after_an_error_and_new_weights_are_prepacked_anew() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    own, ids = model.get_output_embeddings(), torch.tensor([[3, 4]])
    head = PrepackedLMHead(model)
    with pytest.raises(KeyboardInterrupt), head:
        raise KeyboardInterrupt
    assert model.get_output_embeddings() is own
    with torch.no_grad():
        own.weight = torch.nn.Parameter(own.weight * 2)
        expected = model(input_ids=ids).logits
        with head:
            torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_context_inside_itself_keeps_the_head_until_the_outer_one_ends() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    own, head = model.get_output_embeddings(), PrepackedLMHead(model)
    with head as packed:
        replaced = model.get_output_embeddings()
        with head as again:
            assert packed and again
        assert model.get_output_embeddings() is replaced is not own
    assert model.get_output_embeddings() is own


def test_a_weight_that_cannot_be_prepacked_leaves_the_head_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    own, head = model.get_output_embeddings(), PrepackedLMHead(model)
    with monkeypatch.context() as patch:
        patch.setattr(prepacked_head, "_PrepackedLinear", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError), head:
            pass
    assert model.get_output_embeddings() is own
    with head as packed:
        assert packed


def test_other_heads_stay_plain() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).bfloat16()
    with PrepackedLMHead(model) as packed:
        assert not packed
        assert type(model.get_output_embeddings()) is torch.nn.Linear
