"""Many prompts at once say what each says alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as given_values
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from medm.errors import DataError, DeviceError
from medm.inference import kv_cache, runners
from medm.inference.decoding import Decoder, Prompt, TokenEvent
from medm.inference.runners import (
    MIN_PREFIX,
    BatchedRunner,
    SeparateRunner,
    shared_length,
    shared_prefixes,
)
from medm.inference.sampling import Sampling
from medm.llms.attention import PER_DOCUMENT
from tests.tiny import llm_architecture


@pytest.fixture(scope="module", params=["llama-3.2", "qwen3", "phi"])
def language_model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**llm_architecture(request.param, initializer_range=0.3))
    return AutoModelForCausalLM.from_config(config).eval()


def prompts(
    model: torch.nn.Module, seed: int = 0, count: int = 11, shared: int = 40
) -> list[Prompt]:
    """Some with a shared prefix, some without, of many lengths."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(1, 300, shared)
    made = []
    for i in range(count):
        ids = rng.integers(1, 300, rng.integers(1, 30))
        ids = np.concatenate([prefix, ids]) if i % 3 else ids
        with torch.no_grad():
            embeds = model.get_input_embeddings()(torch.from_numpy(ids).to(model.device))
        made.append(Prompt(embeds, ids, max_new_tokens=int(rng.integers(1, 12))))
    return made


def alone(
    model: torch.nn.Module, prompt: Prompt, stops: list[int], suppress: list[int]
) -> list[int]:
    out = model.generate(
        inputs_embeds=prompt.embeds[None],
        attention_mask=prompt.embeds.new_ones(1, len(prompt.embeds), dtype=torch.long),
        max_new_tokens=prompt.max_new_tokens,
        do_sample=False,
        eos_token_id=stops or None,
        suppress_tokens=suppress or None,
        pad_token_id=0,
    )[0].tolist()
    end = next((i for i, token in enumerate(out) if token in stops), None)
    return out if end is None else out[: end + 1]


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_replies_are_those_of_one_prompt_at_a_time(
    language_model: torch.nn.Module, slots: int
) -> None:
    given = prompts(language_model)
    free = [alone(language_model, prompt, [], []) for prompt in given]
    stops, suppress = [free[0][0], free[-1][-1]], [free[2][0]]
    decoder = Decoder(language_model, stops=stops, suppress=suppress, slots=slots)
    assert decoder.decode(given) == [
        alone(language_model, prompt, stops, suppress) for prompt in given
    ]


def test_what_is_shared_runs_once(language_model: torch.nn.Module) -> None:
    given = [prompt for i, prompt in enumerate(prompts(language_model)) if i % 3]
    positions = []
    hook = language_model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: positions.append(kwargs["inputs_embeds"].shape[:2].numel()),
        with_kwargs=True,
    )
    Decoder(language_model, stops=[], slots=16).decode(given)
    hook.remove()
    assert positions[:2] == [40, sum(len(prompt.embeds) - 40 for prompt in given)], (
        "and nothing is padded"
    )


def test_long_prompts_are_prefilled_in_several_rows(
    language_model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = prompts(language_model)
    monkeypatch.setitem(runners.MAX_PREFILL_TOKENS, "cpu", 50)
    rows = []
    hook = language_model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    replies = Decoder(language_model, stops=[], slots=16).decode(given)
    hook.remove()
    assert max(rows) <= 50
    assert replies == [alone(language_model, prompt, [], []) for prompt in given]


def test_rows_attend_in_groups(
    language_model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as the longest of a group has keys."""
    monkeypatch.setattr(kv_cache, "ROWS_PER_GROUP", 2)
    kv_lengths = []
    attend = ALL_ATTENTION_FUNCTIONS[PER_DOCUMENT]

    def counted(*given: Any, **named: Any) -> Any:
        kv_lengths.append(named.get("kv_lengths"))
        return attend(*given, **named)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, PER_DOCUMENT, counted)
    given = prompts(language_model, count=5, shared=0)
    replies = Decoder(language_model, stops=[], slots=5).decode(given)
    assert replies == [alone(language_model, prompt, [], []) for prompt in given]
    lengths = sorted((len(prompt.embeds) for prompt in given), reverse=True)
    first = next(groups for groups in kv_lengths if groups)
    assert [count for count, _ in first] == [2, 2, 1]
    assert [reach for _, reach in first] == [lengths[0] + 1, lengths[2] + 1, lengths[4] + 1]


def test_a_reply_outgrows_the_kv_cache(
    language_model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "BLOCK", 8)
    given = [replace(prompt, max_new_tokens=20) for prompt in prompts(language_model, count=5)]
    replies = Decoder(language_model, stops=[], slots=2).decode(given)
    assert replies == [alone(language_model, prompt, [], []) for prompt in given]


def test_compiled_steps_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every slot, used or not; a second call meets the tensors of the first."""
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="eager")
    )  # traced, not built
    monkeypatch.setattr(runners, "COMPILE_MODE", None)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**llm_architecture("qwen3", initializer_range=0.3))
    language_model = AutoModelForCausalLM.from_config(config).eval()
    given = prompts(language_model, count=7)
    decoder = Decoder(language_model, stops=[], slots=3, compiled=True)
    expected = [alone(language_model, prompt, [], []) for prompt in given]
    assert decoder.decode(given) == expected
    assert isinstance(decoder._runner, BatchedRunner)
    kept = decoder._runner._slots._kv_cache[0][0].data_ptr()
    assert decoder.decode(given[:2]) == expected[:2]
    assert decoder._runner._slots._kv_cache[0][0].data_ptr() == kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_replies_are_those_of_one_prompt_at_a_time(
    language_model: torch.nn.Module, dtype: torch.dtype, compiled: bool
) -> None:
    """In bfloat16 the order of sums decides between close candidates, so the first tokens are
    compared."""
    model = copy.deepcopy(language_model).to("cuda", dtype)
    given = prompts(model)
    decoder = Decoder(model, stops=[], slots=4, compiled=compiled)
    replies = decoder.decode(given)
    expected = [alone(model, prompt, [], []) for prompt in given]
    if dtype == torch.float32:
        assert replies == expected
    else:
        assert sum(a[0] == b[0] for a, b in zip(replies, expected, strict=True)) >= len(given) - 2
    assert [len(reply) for reply in decoder.decode(given)] == [len(reply) for reply in replies]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("phi3", {"sliding_window": 8}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("llama-3.2", {"attn_implementation": "eager"}),
    ],
)
def test_rows_with_windows_of_attention_are_decoded_in_the_same_loop(
    family: str, changes: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    attention = changes.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(**llm_architecture(family, initializer_range=0.3, **changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    given = [replace(prompt, max_new_tokens=14) for prompt in prompts(model, count=6)]
    stops = [alone(model, given[0], [], [])[3]]
    expected = [alone(model, prompt, stops, []) for prompt in given]
    decoder = Decoder(model, stops=stops, slots=3)
    assert isinstance(decoder._runner, SeparateRunner if changes else BatchedRunner)
    assert decoder.decode(given) == expected
    drawn = [replace(prompt, sampling=Sampling(1.0, seed=3)) for prompt in given]
    assert decoder.decode(drawn) == [decoder.decode([prompt])[0] for prompt in drawn]


def test_shared_prefixes_leave_the_last_token_and_short_ones_alone() -> None:
    base = np.arange(30)
    other = np.arange(100, 130)
    same = shared_prefixes([7, 8, 9], [base, base, other])
    assert sorted(same) == [(0, [9]), (29, [7, 8])]
    assert shared_prefixes([1, 2], [base[: MIN_PREFIX - 1], base]) in (
        [(0, [1]), (0, [2])],
        [(0, [2]), (0, [1])],
    )
    assert shared_length(base, base[:5]) == 5
    assert shared_length(base, other) == 0


def collect(
    decoder: Decoder, replies: dict[int, list[int]], steps: int = 10**6
) -> dict[int, TokenEvent]:
    """Run steps, append the tokens of each request to `replies`, and return the last event of those
    that ended."""
    ended = {}
    for _ in range(steps):
        if not decoder.pending:
            break
        for event in decoder.step():
            if event.token is not None:
                replies.setdefault(event.request, []).append(event.token)
            if event.finish is not None:
                assert event.request not in ended
                ended[event.request] = event
    return ended


def drawn_prompts(model: torch.nn.Module) -> list[Prompt]:
    """Greedy requests, and some that draw, each under settings of its own."""
    settings = [
        None,
        Sampling(1.3, seed=5),
        Sampling(0.8, top_k=9, seed=1),
        Sampling(2.0, top_p=0.7, seed=2),
    ]
    return [
        replace(prompt, sampling=settings[i % 4])
        for i, prompt in enumerate(prompts(model, count=9))
    ]


def test_requests_join_while_others_are_decoded(language_model: torch.nn.Module) -> None:
    given = [replace(prompt, max_new_tokens=9) for prompt in prompts(language_model, count=6)]
    decoder, replies = Decoder(language_model, stops=[], slots=3), dict[int, list[int]]()
    ids = [decoder.submit(given[0])]
    for prompt in given[1:]:
        collect(decoder, replies, steps=2)
        ids.append(decoder.submit(prompt))
    assert 0 < len(replies[ids[0]]) < 10
    ended = collect(decoder, replies)
    assert [replies[number] for number in ids] == [
        alone(language_model, prompt, [], []) for prompt in given
    ]
    assert ended[ids[-1]].finish == "length"


def test_what_is_cancelled_frees_its_slot_and_others_stay(language_model: torch.nn.Module) -> None:
    """Cancelled while it waits, when it is prefilled and waits for a slot, and while it is
    decoded."""
    given = [replace(prompt, max_new_tokens=12) for prompt in prompts(language_model, count=7)]
    decoder, replies = Decoder(language_model, stops=[], slots=2), dict[int, list[int]]()
    ids = [decoder.submit(prompt) for prompt in given]
    decoder.cancel(ids[0])  # not prefilled yet
    ended = collect(decoder, replies, steps=4)
    assert ended[ids[0]].finish == "cancelled"
    assert ids[0] not in replies
    running = [row.request for row in decoder._active]
    decoder.cancel(running[0])
    decoder.cancel(10**6)  # unknown: finished long ago
    said = len(replies[running[0]])
    ended = collect(decoder, replies, steps=1)
    assert ended[running[0]].finish == "cancelled"
    assert len(replies[running[0]]) == said, "no token after the cancellation"
    assert len(decoder._active) == 2, "the next request has its slot"
    while not decoder._ready:
        collect(decoder, replies, steps=1)
    ready = decoder._ready[0][0].request
    decoder.cancel(ready)
    assert collect(decoder, replies)[ready].finish == "cancelled"
    assert ready not in replies
    survivors = set(ids) - {ids[0], running[0], ready}
    expected = {
        number: alone(language_model, given[ids.index(number)], [], []) for number in survivors
    }
    assert {number: replies[number] for number in survivors} == expected
    assert len(decoder._runner) == 0


def test_settings_are_those_of_the_request(language_model: torch.nn.Module) -> None:
    given = [replace(prompt, max_new_tokens=8) for prompt in prompts(language_model, count=4)]
    free = [alone(language_model, prompt, [], []) for prompt in given]
    given[1] = replace(given[1], stops=frozenset({free[1][2]}))
    given[2] = replace(given[2], max_new_tokens=3)
    replies = Decoder(language_model, stops=[]).decode(given)
    assert replies == [free[0], free[1][: free[1].index(free[1][2]) + 1], free[2][:3], free[3]]


def test_a_drawn_reply_depends_on_its_seed_alone(language_model: torch.nn.Module) -> None:
    given = drawn_prompts(language_model)
    decoder = Decoder(language_model, stops=[], slots=3)
    together = decoder.decode(given)
    state = torch.get_rng_state()
    assert [decoder.decode([prompt])[0] for prompt in given] == together
    assert Decoder(language_model, stops=[], slots=16).decode(given[::-1]) == together[::-1]
    assert torch.equal(torch.get_rng_state(), state), "the global random generator is not used"
    long = replace(given[0], max_new_tokens=12)
    seeds = [replace(long, sampling=Sampling(1.3, seed=seed)) for seed in range(4)]
    assert len({tuple(reply) for reply in decoder.decode(seeds)}) == 4


def test_draws_come_from_the_tokens_that_the_settings_leave(
    language_model: torch.nn.Module,
) -> None:
    prompt = replace(prompts(language_model, count=1)[0], max_new_tokens=8)
    greedy = alone(language_model, prompt, [], [])
    decoder = Decoder(language_model, stops=[])
    for sampling in (Sampling(5.0, top_k=1), Sampling(5.0, top_p=1e-6), Sampling(1e-4)):
        assert decoder.decode([replace(prompt, sampling=sampling)]) == [greedy]
    few = [
        replace(prompt, max_new_tokens=1, sampling=Sampling(50.0, top_k=3, seed=seed))
        for seed in range(40)
    ]
    with torch.no_grad():
        logits = language_model(inputs_embeds=prompt.embeds[None]).logits[0, -1]
    assert {reply[0] for reply in decoder.decode(few)} == set(logits.topk(3).indices.tolist())
    suppressed = Decoder(language_model, stops=[], suppress=logits.topk(2).indices.tolist())
    assert not {reply[0] for reply in suppressed.decode(few)} & set(logits.topk(2).indices.tolist())


def test_an_error_ends_the_request_that_has_it(language_model: torch.nn.Module) -> None:
    given = prompts(language_model, count=6)
    expected = [alone(language_model, prompt, [], []) for prompt in given]

    def embed(asked: Any) -> list[torch.Tensor]:
        if any(prompt.signature is given[2].signature for prompt in asked):
            raise ValueError("this image is damaged")
        return [embeds[id(prompt.signature)] for prompt in asked]

    embeds = {id(prompt.signature): prompt.embeds for prompt in given}
    decoder = Decoder(language_model, stops=[], embed=embed, max_tokens=90)
    too_long = decoder.submit(replace(given[0], embeds=None, signature=np.arange(90)))
    empty = decoder.submit(replace(given[0], embeds=None, signature=np.arange(0)))
    ids = [decoder.submit(replace(prompt, embeds=None)) for prompt in given]
    replies = dict[int, list[int]]()
    ended = collect(decoder, replies)
    assert [number for number, event in ended.items() if event.error] == [too_long, empty, ids[2]]
    assert str(ended[ids[2]].error) == "this image is damaged"
    assert isinstance(ended[too_long].error, DataError)
    assert "90 tokens, but a prompt and its reply have at most 90" in str(ended[too_long].error)
    assert "expected a prompt" in str(ended[empty].error)
    assert [replies.get(number) for number in ids] == [*expected[:2], None, *expected[3:]]


def test_a_reply_ends_at_the_longest_sequence(language_model: torch.nn.Module) -> None:
    prompt = replace(prompts(language_model, count=1)[0], max_new_tokens=30)
    length = len(prompt.signature)
    (reply,) = Decoder(language_model, stops=[], max_tokens=length + 4).decode([prompt])
    assert reply == alone(language_model, replace(prompt, max_new_tokens=4), [], [])


@pytest.mark.parametrize("error", [RuntimeError("a fault"), KeyboardInterrupt()])
def test_after_an_error_of_the_whole_batch_requests_continue_as_if_none_had_been(
    language_model: torch.nn.Module, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [replace(prompt, max_new_tokens=10) for prompt in drawn_prompts(language_model)]
    expected = Decoder(language_model, stops=[], slots=4).decode(given)
    decoder, replies = Decoder(language_model, stops=[], slots=4), dict[int, list[int]]()
    ids = [decoder.submit(prompt) for prompt in given]
    for _ in range(2):
        collect(decoder, replies, steps=3)
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "_report", lambda *_: (_ for _ in ()).throw(error))
            with pytest.raises(type(error)):
                decoder.step()
        assert type(language_model.get_output_embeddings()) is torch.nn.Linear, (
            "the head is the model's own again"
        )
    collect(decoder, replies)
    assert [replies[number] for number in ids] == expected
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_report", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            decoder.decode(given)
    assert decoder.pending == 0
    assert decoder.decode(given) == expected


def test_a_batch_beyond_the_memory_is_halved(
    language_model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In prefill and in decode steps; what a single request needs beyond the memory is its own
    error."""
    given = [replace(prompt, max_new_tokens=6) for prompt in drawn_prompts(language_model)]
    expected = Decoder(language_model, stops=[], slots=8).decode(given)
    forward, rows = language_model.forward, []

    def small(**named: Any) -> Any:
        count = named["inputs_embeds"].shape[0] if named["inputs_embeds"].shape[1] == 1 else 1
        rows.append(count)
        if count > 3 or named["inputs_embeds"].shape[1] > 300:
            raise torch.OutOfMemoryError("no memory")
        return forward(**named)

    decoder = Decoder(language_model, stops=[], slots=8)
    monkeypatch.setattr(language_model, "forward", small)
    assert decoder.decode(given) == expected
    assert max(rows) == 8
    assert rows.index(8) < rows.index(2)
    long = Prompt(given[0].embeds[:1].repeat(301, 1), np.full(301, 7), 3)
    ids, replies = (
        [decoder.submit(prompt) for prompt in (given[0], long, given[1])],
        dict[int, list[int]](),
    )
    ended = collect(decoder, replies)
    assert isinstance(ended[ids[1]].error, DeviceError)
    assert "one prompt of 301 tokens" in str(ended[ids[1]].error)
    assert [replies[ids[0]], replies[ids[2]]] == expected[:2]


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given_values(data=st.data())
def test_any_order_of_submit_step_and_cancel_gives_the_replies_of_one_alone(
    language_model: torch.nn.Module, data: st.DataObject
) -> None:
    given = drawn_prompts(language_model)
    decoder = Decoder(language_model, stops=[7, 8, 9], slots=data.draw(st.integers(1, 4)))
    replies, ended, asked, cancelled = (
        dict[int, list[int]](),
        dict[int, TokenEvent](),
        dict[int, int](),
        set(),
    )
    for action in data.draw(
        st.lists(st.sampled_from(["submit", "step", "step", "cancel"]), max_size=24)
    ):
        if action == "submit":
            position = data.draw(st.integers(0, len(given) - 1))
            asked[decoder.submit(given[position])] = position
        elif action == "cancel" and asked:
            number = data.draw(st.sampled_from(sorted(asked)))
            decoder.cancel(number)
            cancelled.add(number)
        else:
            ended |= collect(decoder, replies, steps=1)
    ended |= collect(decoder, replies)
    assert set(ended) == set(asked)
    lone = Decoder(language_model, stops=[7, 8, 9])
    expected = {position: lone.decode([given[position]])[0] for position in set(asked.values())}
    for number, position in asked.items():
        reply = replies.get(number, [])
        if ended[number].finish == "cancelled":
            assert number in cancelled
            assert reply == expected[position][: len(reply)]
        else:
            assert reply == expected[position]
