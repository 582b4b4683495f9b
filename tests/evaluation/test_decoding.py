"""Many prompts at once say what each says alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from medm.evaluation.decoding import MIN_SHARED, GreedyDecoder, Prompt, shared_beginnings, shared_length
from tests.tiny import llm_architecture


@pytest.fixture(scope="module", params=["llama-3.2", "qwen3", "phi"])
def language_model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**llm_architecture(request.param, initializer_range=0.3))
    return AutoModelForCausalLM.from_config(config).eval()


def prompts(model: torch.nn.Module, seed: int = 0, count: int = 11, shared: int = 40) -> list[Prompt]:
    """Some on a common beginning, some not, of many lengths."""
    rng = np.random.default_rng(seed)
    beginning = rng.integers(1, 300, shared)
    made = []
    for i in range(count):
        ids = rng.integers(1, 300, rng.integers(1, 30))
        ids = np.concatenate([beginning, ids]) if i % 3 else ids
        with torch.no_grad():
            embeds = model.get_input_embeddings()(torch.from_numpy(ids))
        made.append(Prompt(embeds, ids, max_new_tokens=int(rng.integers(1, 12))))
    return made


def alone(model: torch.nn.Module, prompt: Prompt, stops: list[int], suppress: list[int]) -> list[int]:
    out = model.generate(
        inputs_embeds=prompt.embeds[None], attention_mask=torch.ones(1, len(prompt.embeds), dtype=torch.long),
        max_new_tokens=prompt.max_new_tokens, do_sample=False, eos_token_id=stops or None,
        suppress_tokens=suppress or None, pad_token_id=0,
    )[0].tolist()  # fmt: skip
    end = next((i for i, token in enumerate(out) if token in stops), None)
    return out if end is None else out[: end + 1]


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_replies_are_those_of_one_prompt_at_a_time(language_model: torch.nn.Module, slots: int) -> None:
    given = prompts(language_model)
    free = [alone(language_model, prompt, [], []) for prompt in given]
    stops, suppress = [free[0][0], free[-1][-1]], [free[2][0]]
    decoder = GreedyDecoder(language_model, stops=stops, suppress=suppress, slots=slots)
    assert decoder.decode(given) == [alone(language_model, prompt, stops, suppress) for prompt in given]


def test_what_is_shared_runs_once(language_model: torch.nn.Module) -> None:
    given = [prompt for i, prompt in enumerate(prompts(language_model)) if i % 3]
    positions = []
    hook = language_model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: positions.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    GreedyDecoder(language_model, stops=[], slots=16).decode(given)
    hook.remove()
    longest_rest = max(len(prompt.embeds) for prompt in given) - 40
    assert positions[:2] == [40, len(given) * longest_rest]


def test_sliding_attention_is_left_to_generate() -> None:
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**llm_architecture("qwen2.5")))
    sliding = AutoModelForCausalLM.from_config(AutoConfig.for_model(**llm_architecture("phi3", sliding_window=8)))
    assert GreedyDecoder.supports(plain)
    assert not GreedyDecoder.supports(sliding)


def test_shared_beginnings_leave_the_last_token_and_short_ones_alone() -> None:
    base = np.arange(30)
    other = np.arange(100, 130)
    same = shared_beginnings([7, 8, 9], [base, base, other])
    assert sorted(same) == [(0, [9]), (29, [7, 8])]
    assert shared_beginnings([1, 2], [base[: MIN_SHARED - 1], base]) in ([(0, [1]), (0, [2])], [(0, [2]), (0, [1])])
    assert shared_length(base, base[:5]) == 5
    assert shared_length(base, other) == 0
