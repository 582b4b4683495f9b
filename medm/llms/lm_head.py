"""The LM head of transformers' causal language models: logits as each family scales them.

A model computes logits at every position. Training needs them at the labeled ones alone, so the
scaling that a family puts after its LM head is repeated here, by the field of its config that holds
the number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

if TYPE_CHECKING:

    class CausalLM(PreTrainedModel, GenerationMixin):
        """Type of what `AutoModelForCausalLM` returns."""

        generation_config: GenerationConfig

        def get_input_embeddings(self) -> nn.Embedding: ...
        def get_output_embeddings(self) -> nn.Linear: ...


def is_causal_lm(module: nn.Module | None) -> TypeGuard[CausalLM]:
    """Return whether a part of a model is a causal language model of transformers."""
    return isinstance(module, PreTrainedModel) and isinstance(module, GenerationMixin)


LOGIT_SCALING: dict[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,  # Gemma 2 and 3
    "logits_scaling": lambda logits, divisor: logits / divisor,  # Granite
    "logit_scale": lambda logits, factor: logits * factor,  # Cohere
}
"""Scaling of the logits, by the config field that holds the number."""


def lm_logits(language_model: CausalLM, hidden: Tensor) -> Tensor:
    """Return logits (..., V) of hidden states (..., D), scaled as `LOGIT_SCALING` says."""
    logits = language_model.get_output_embeddings()(hidden)
    config = language_model.config.get_text_config()
    for field, scale in LOGIT_SCALING.items():
        if (number := getattr(config, field, None)) is not None:
            logits = scale(logits, number)
    return logits


@torch.no_grad()
def has_known_logits(language_model: CausalLM) -> bool:
    """Return whether `lm_logits` computes what the model itself computes after its decoder.

    Two random hidden states, large enough for a soft cap to show, stand in for the output of the
    decoder, so that the probe costs a run of the LM head alone.
    """
    decoder, head = language_model.base_model, language_model.get_output_embeddings()
    width = language_model.get_input_embeddings().embedding_dim
    generator = torch.Generator().manual_seed(0)
    hidden = 8.0 * torch.randn(1, 2, width, generator=generator)  # (1, 2, D)
    hidden = hidden.to(head.weight)
    expected = lm_logits(language_model, hidden).float()
    output = MoeModelOutputWithPast(last_hidden_state=hidden)
    vars(decoder)["forward"] = lambda *_args, **_kwargs: output
    try:
        own = language_model(inputs_embeds=hidden, use_cache=False).logits.float()
    finally:
        del vars(decoder)["forward"]
    return not bool((own - expected).abs().max() > 1e-2 * own.abs().max())


def stop_tokens(generation: GenerationConfig) -> set[int]:
    """Return the ids that end a reply."""
    stops = generation.eos_token_id
    return set(stops) if isinstance(stops, list) else set() if stops is None else {stops}
