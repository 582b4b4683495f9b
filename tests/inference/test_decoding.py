"""Many prompts at once say what each says alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from medm.inference import decoding
from medm.inference.decoding import MIN_PREFIX, GreedyDecoder, Prompt, shared_length, shared_prefixes
from medm.llms.attention import PER_DOCUMENT
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
            embeds = model.get_input_embeddings()(torch.from_numpy(ids).to(model.device))
        made.append(Prompt(embeds, ids, max_new_tokens=int(rng.integers(1, 12))))
    return made


def alone(model: torch.nn.Module, prompt: Prompt, stops: list[int], suppress: list[int]) -> list[int]:
    out = model.generate(
        inputs_embeds=prompt.embeds[None], attention_mask=prompt.embeds.new_ones(1, len(prompt.embeds), dtype=torch.long),
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
    assert positions[:2] == [40, sum(len(prompt.embeds) - 40 for prompt in given)], "and nothing is padded"


def test_long_prompts_are_read_in_several_rows(
    language_model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = prompts(language_model)
    monkeypatch.setitem(decoding.MAX_PREFILL_TOKENS, "cpu", 50)
    rows = []
    hook = language_model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    replies = GreedyDecoder(language_model, stops=[], slots=16).decode(given)
    hook.remove()
    assert max(rows) <= 50
    assert replies == [alone(language_model, prompt, [], []) for prompt in given]


def test_rows_attend_in_groups(language_model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the longest of a group has keys."""
    monkeypatch.setattr(decoding, "ROWS_PER_GROUP", 2)
    kv_lengths = []
    attend = ALL_ATTENTION_FUNCTIONS[PER_DOCUMENT]

    def counted(*given: Any, **named: Any) -> Any:
        kv_lengths.append(named.get("kv_lengths"))
        return attend(*given, **named)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, PER_DOCUMENT, counted)
    given = prompts(language_model, count=5, shared=0)
    replies = GreedyDecoder(language_model, stops=[], slots=5).decode(given)
    assert replies == [alone(language_model, prompt, [], []) for prompt in given]
    lengths = sorted((len(prompt.embeds) for prompt in given), reverse=True)
    first = next(groups for groups in kv_lengths if groups)
    assert [count for count, _ in first] == [2, 2, 1]
    assert [reach for _, reach in first] == [lengths[0] + 1, lengths[2] + 1, lengths[4] + 1]


def test_a_reply_outgrows_its_room(language_model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "BLOCK", 8)
    given = [replace(prompt, max_new_tokens=20) for prompt in prompts(language_model, count=5)]
    replies = GreedyDecoder(language_model, stops=[], slots=2).decode(given)
    assert replies == [alone(language_model, prompt, [], []) for prompt in given]


def test_compiled_steps_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every slot, used or not; a second call meets the tensors of the first."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced, not built
    monkeypatch.setattr(decoding, "COMPILE_MODE", None)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**llm_architecture("qwen3", initializer_range=0.3))
    language_model = AutoModelForCausalLM.from_config(config).eval()
    given = prompts(language_model, count=7)
    decoder = GreedyDecoder(language_model, stops=[], slots=3, compiled=True)
    expected = [alone(language_model, prompt, [], []) for prompt in given]
    assert decoder.decode(given) == expected
    kept = decoder._slots
    assert kept is not None
    assert decoder.decode(given[:2]) == expected[:2]
    assert decoder._slots is kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_replies_are_those_of_one_prompt_at_a_time(
    language_model: torch.nn.Module, dtype: torch.dtype, compiled: bool
) -> None:
    """In bfloat16 the order of sums decides between close candidates, so the first tokens are compared."""
    model = copy.deepcopy(language_model).to("cuda", dtype)
    given = prompts(model)
    decoder = GreedyDecoder(model, stops=[], slots=4, compiled=compiled)
    replies = decoder.decode(given)
    expected = [alone(model, prompt, [], []) for prompt in given]
    if dtype == torch.float32:
        assert replies == expected
    else:
        assert sum(a[0] == b[0] for a, b in zip(replies, expected, strict=True)) >= len(given) - 2
    assert [len(reply) for reply in decoder.decode(given)] == [len(reply) for reply in replies]


def test_sliding_attention_is_left_to_generate() -> None:
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**llm_architecture("qwen2.5")))
    sliding = AutoModelForCausalLM.from_config(AutoConfig.for_model(**llm_architecture("phi3", sliding_window=8)))
    assert GreedyDecoder.supports(plain)
    assert not GreedyDecoder.supports(sliding)


def test_shared_beginnings_leave_the_last_token_and_short_ones_alone() -> None:
    base = np.arange(30)
    other = np.arange(100, 130)
    same = shared_prefixes([7, 8, 9], [base, base, other])
    assert sorted(same) == [(0, [9]), (29, [7, 8])]
    assert shared_prefixes([1, 2], [base[: MIN_PREFIX - 1], base]) in ([(0, [1]), (0, [2])], [(0, [2]), (0, [1])])
    assert shared_length(base, base[:5]) == 5
    assert shared_length(base, other) == 0
