from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from medm.errors import RecipeError
from medm.models.adapters import adapted, check_unshared, inject, merge

SPEC: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "up_proj"],
}
KINDS = {
    "lora": SPEC,
    "rslora": {**SPEC, "use_rslora": True},
    "dora": {**SPEC, "use_dora": True},
    "every linear layer": {**SPEC, "target_modules": r".*(proj)"},
}
IDS = torch.arange(8)[None]


def language_model(*, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def stir(model: nn.Module) -> None:
    """As if trained: adapters start at zero output."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_an_adapter_starts_without_effect_works_and_merges(spec: dict[str, Any]) -> None:
    model = language_model()
    plain = model(input_ids=IDS).logits
    names = list(model.state_dict())
    inject(model, spec)
    model.eval()
    torch.testing.assert_close(model(input_ids=IDS).logits, plain)
    stir(model)
    tuned = model(input_ids=IDS).logits
    assert (tuned - plain).abs().max() > 1e-3
    merge(model)
    assert not adapted(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(input_ids=IDS).logits, tuned, atol=1e-5, rtol=1e-4)
    inject(model, spec)  # and adapted once more


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", r".*(q_proj|lm_head)"])
def test_adapters_on_weights_that_two_layers_share_are_refused_with_both_names(target: str) -> None:
    """Merged, the adapter of a tied head would change the embeddings; saved, one of the two would
    be lost."""
    model = language_model(tied=True)
    inject(model, {**SPEC, "target_modules": target if "*" in target else [target]})
    with pytest.raises(
        RecipeError, match=r"LoRA in (lm_head|model\.embed_tokens): .*leave this layer out"
    ):
        check_unshared(model)


def test_a_layer_that_is_used_under_two_names_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

    model = Twice()
    inject(model, {**SPEC, "target_modules": ["first"]})
    with pytest.raises(RecipeError, match="LoRA in first: second uses the same weight"):
        check_unshared(model)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@torch.no_grad()
def test_heads_and_embeddings_of_their_own_are_adapted_and_merged(target: str) -> None:
    model = language_model(tied=False)
    inject(model, {**SPEC, "target_modules": [target]})
    check_unshared(model)
    model.eval()
    plain = model(input_ids=IDS).logits
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.5)
    tuned = model(input_ids=IDS).logits
    assert (tuned - plain).abs().max() > 1e-3
    merge(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, tuned, atol=1e-5, rtol=1e-4)


def test_a_part_is_adapted_once() -> None:
    model = language_model()
    inject(model, SPEC)
    with pytest.raises(RecipeError, match="LoRA layers already"):
        inject(model, SPEC)
