"""The model's outputs and its KV cache under the names of whichever transformers is installed."""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

import medm.models
from medm.config import validate
from medm.llms.cache import CACHE_ARGUMENTS, cache_argument
from medm.models.lvlm.modeling import LVLMOutput
from medm.models.lvlm.options import MASK_OUTPUTS, LVLMOptions
from tests import tiny


@pytest.fixture(scope="module")
def model(llms: dict[str, Path]) -> Any:
    torch.manual_seed(1)
    section = tiny.lvlm_section(llms["qwen2.5"], family="qwen2.5")
    return medm.models.build(validate(LVLMOptions, section, source="test"))[0].eval()


def test_the_fields_are_those_of_transformers_and_the_auxiliary_losses() -> None:
    stock = {field.name for field in fields(CausalLMOutputWithPast)}
    assert {field.name for field in fields(LVLMOutput)} == stock | {
        "loss_sum",
        "losses",
    } | MASK_OUTPUTS
    assert stock & set(CACHE_ARGUMENTS), (
        "transformers renamed the cache again: medm.llms.cache lists the names"
    )


def test_fields_that_only_some_language_models_return_are_left_out() -> None:
    cache = next(name for name in CACHE_ARGUMENTS if hasattr(CausalLMOutputWithPast(), name))
    output = LVLMOutput.wrap({"logits": 1, cache: 2, "router_logits": 3}, loss=4)
    assert (output.loss, output.logits, output[cache], output.losses) == (4, 1, 2, None)
    assert "router_logits" not in output


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_decoding_with_the_cache_equals_running_the_whole_text(
    family: str, llms: dict[str, Path]
) -> None:
    section = tiny.lvlm_section(llms[family], family=family)
    model = medm.models.build(validate(LVLMOptions, section, source="test"))[0].eval()
    ids = torch.tensor([[5, 9, 7, 11, 6]])
    name = cache_argument(model.language_model.forward)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = model(input_ids=ids).logits
        cache = DynamicCache(config=model.config.get_text_config())
        first = model(input_ids=ids[:, :3], **{name: cache}, use_cache=True)
        second = model(input_ids=ids[:, 3:], **{name: first[name]}, use_cache=True)
    torch.testing.assert_close(
        torch.cat([first.logits, second.logits], dim=1), whole, atol=2e-5, rtol=1e-4
    )


def test_hidden_states_and_attentions_are_passed_through(llms: dict[str, Path], model: Any) -> None:
    ids = torch.tensor([[5, 9, 7]])
    with torch.no_grad():
        plain = model(input_ids=ids, output_hidden_states=True)
        learned = model(input_ids=ids, labels=ids, output_hidden_states=True)
    assert len(plain.hidden_states) == model.config.get_text_config().num_hidden_layers + 1
    assert len(learned.hidden_states) == len(plain.hidden_states)
    assert learned.logits is None


def test_arguments_of_generate_are_merged_into_one_config(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ids = torch.tensor([[5, 9, 7]])
    before = model.generation_config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids_out = model.generate(input_ids=ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert ids_out.shape == (1, 5)
    assert model.generation_config.to_dict() == before
    assert "generation-related" not in caplog.text


def test_a_forward_without_a_cache_is_refused_by_name() -> None:
    def forward(input_ids: Any) -> None: ...

    with pytest.raises(
        TypeError, match=r"forward takes no KV cache: .*cache, past_key_values.*input_ids"
    ):
        cache_argument(forward)
