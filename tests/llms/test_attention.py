"""Samples in one row: the numbers of padded batches, and no mask over the row."""

from __future__ import annotations

import sys
from types import SimpleNamespace
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
from medm.inference.decoding import Decoder, Prompt
from medm.llms import attention
from medm.llms.attention import PER_DOCUMENT, enable_padding_free, no_mask
from medm.models.lvlm.configuration import LVLMConfig
from medm.models.lvlm.modeling import LVLMForConditionalGeneration
from medm.training.kernels import compile_layers
from medm.types import IGNORE_INDEX, Example

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: list[type[PreTrainedConfig]] = [
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    PhiConfig,
    Phi3Config,
]


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
    assert model.enable_padding_free()
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(q: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        calls.append((q.shape[2], named.get("attn_mask")))
        return attend(q, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    packed = model(**PackingCollator(0, 20, padding_free=True)(data)).loss
    packed.backward()
    assert [length for length, _ in calls] == [7, 12, 2, 5, 9] * 2, (
        "each sample by itself, in each layer"
    )
    assert all(mask is None for _, mask in calls)
    assert packed.item() == pytest.approx(padded.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        if name in expected:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("config", [*FAMILIES, MistralConfig])
def test_padding_behind_the_samples_needs_no_mask(config: type[PreTrainedConfig]) -> None:
    model = lvlm(config, **({"sliding_window": None} if config is Phi3Config else {}))
    data = examples(7, 12, 2, 5, 9)
    results = []
    for with_mask in (True, False):
        batch = Collator(0, with_mask=with_mask, with_label_positions=not with_mask)(data)
        assert ("attention_mask" in batch) is with_mask
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append(
            (loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        )
    (expected, gradients), (found, same) = results
    assert found == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, atol=1e-6, rtol=1e-4)


def test_padded_batches_and_decoding_go_on_as_before() -> None:
    model = lvlm(LlamaConfig).eval()
    batch = Collator(0, padding_side="left")(examples(7, 12, 5))
    batch.pop("labels")
    with torch.no_grad():
        before = model(**batch).logits[:, -1]
        said = model.generate(**batch, max_new_tokens=5, do_sample=False)
        assert enable_padding_free(model.language_model)
        torch.testing.assert_close(model(**batch).logits[:, -1], before, atol=1e-6, rtol=1e-6)
        assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False), said)


def test_the_choice_stays_out_of_what_is_saved() -> None:
    model = lvlm(LlamaConfig)
    model.enable_padding_free()
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
    assert not enable_padding_free(model)
    assert model.config._attn_implementation == attention
    assert no_mask(model, torch.zeros(1, 3, 32)) is None


def kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: int,
    key_longest: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What torch's kernel for packed samples computes, and what it refuses."""
    assert window_size == (-1, 0)
    assert starts.dtype == key_starts.dtype == torch.int32
    assert (longest, key_longest) == (int(starts.diff().max()), int(key_starts.diff().max()))
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert enable_gqa or query.shape[1] == key.shape[1]
    attended = [
        torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1),
            k.transpose(0, 1),
            v.transpose(0, 1),
            scale=scale,
            enable_gqa=enable_gqa,
            attn_mask=torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q)),
        ).transpose(0, 1)
        for q, k, v in zip(
            query.split(starts.diff().tolist()),
            *(t.split(key_starts.diff().tolist()) for t in (key, value)),
            strict=True,
        )
    ]
    return torch.cat(attended)


@pytest.mark.parametrize(
    "options", [{"window_size", "scale"}, {"window_size", "scale", "enable_gqa"}]
)
def test_mixed_precision_reaches_the_kernel_for_packed_samples(
    options: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained weights stay in float32, and with them the rotary embeddings: the queries arrive in
    float32."""
    model = lvlm(LlamaConfig)
    assert model.enable_padding_free()
    batch = PackingCollator(0, 20, padding_free=True)(examples(7, 12, 2, 5, 9))

    def run() -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        return loss.item(), {
            name: p.grad for name, p in model.named_parameters() if p.grad is not None
        }

    expected, slow = run()
    calls = []
    fake = SimpleNamespace(
        varlen_attn=lambda *given, **named: calls.append(named) or kernel(*given, **named)
    )
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", fake)
    monkeypatch.setattr(attention, "_on_gpu", lambda _: True)
    monkeypatch.setattr(attention, "_varlen_options", lambda: frozenset(options))
    loss, fast = run()
    assert len(calls) == 2, "once a layer"
    assert loss == pytest.approx(expected, rel=1e-3)
    for name, gradient in fast.items():
        assert (
            torch.nn.functional.cosine_similarity(gradient.flatten(), slow[name].flatten(), dim=0)
            > 0.999
        ), name


@pytest.mark.parametrize("config", [LlamaConfig, PhiConfig])
def test_the_kernel_reads_texts_that_follow_on_others(
    config: type[PreTrainedConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts with a common beginning, read once: more keys than queries."""
    model = lvlm(config).language_model.to(torch.bfloat16).eval()
    ids = [np.concatenate([np.arange(3, 40), np.arange(3, 3 + more)]) for more in (4, 9, 2)]
    with torch.no_grad():
        texts = [Prompt(model.get_input_embeddings()(torch.from_numpy(one)), one, 1) for one in ids]
    decoder = Decoder(model, stops=[])
    expected = decoder.decode(texts)
    calls = []
    fake = SimpleNamespace(
        varlen_attn=lambda *given, **named: calls.append(given[3:7]) or kernel(*given, **named)
    )
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", fake)
    monkeypatch.setattr(attention, "_on_gpu", lambda _: True)
    monkeypatch.setattr(attention, "_varlen_options", lambda: frozenset({"window_size", "scale"}))
    assert decoder.decode(texts) == expected
    assert [longest for *_, longest, _ in calls] == [38, 38, 8, 8], (
        "the beginning, and what follows, in each layer"
    )
    assert [keys.tolist() for _, keys, *_ in calls[2:]] == [[0, 46, 87, 126]] * 2, "longest first"


def test_the_installed_torch_has_the_kernel_in_the_form_that_is_asked_for() -> None:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11):
        assert {"window_size", "scale"} <= attention._varlen_options()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_the_kernel_for_packed_samples_gives_what_the_loop_gives(
    weights: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lvlm(LlamaConfig, hidden_size=128).to("cuda", weights)
    model.enable_padding_free()
    batch = {
        key: value.cuda() if isinstance(value, torch.Tensor) else value
        for key, value in PackingCollator(0, 64, padding_free=True)(examples(7, 30, 12)).items()
    }

    def run() -> tuple[float, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        return loss.item(), model.language_model.model.layers[
            0
        ].self_attn.q_proj.weight.grad.float().flatten()

    calls = []
    varlen = attention._varlen
    monkeypatch.setattr(attention, "_varlen", lambda *given: calls.append(1) or varlen(*given))
    fast, fast_gradient = run()
    assert len(calls) == 2, "once a layer"
    monkeypatch.setattr(attention, "_on_gpu", lambda _: False)
    slow, slow_gradient = run()
    assert fast == pytest.approx(slow, rel=1e-2)
    assert torch.nn.functional.cosine_similarity(fast_gradient, slow_gradient, dim=0) > 0.99


def test_one_kernel_is_for_half_precision_on_a_gpu_without_dropout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_varlen_options", lambda: frozenset({"window_size", "scale"}))
    model, gpu = lvlm(LlamaConfig).language_model, torch.device("cuda")
    assert attention.in_one_kernel(model, device=gpu, dtype=torch.bfloat16)
    assert not attention.in_one_kernel(model, device=gpu, dtype=torch.float32)
    assert not attention.in_one_kernel(model, device=torch.device("cpu"), dtype=torch.bfloat16)
    dropping = lvlm(LlamaConfig, attention_dropout=0.1).language_model
    assert not attention.in_one_kernel(dropping, device=gpu, dtype=torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_layers_take_rows_of_any_length() -> None:
    model = lvlm(LlamaConfig, hidden_size=128).to("cuda", torch.bfloat16)
    model.enable_padding_free()
    rows = [
        PackingCollator(0, 64, padding_free=True)(examples(*lengths))
        for lengths in ((7, 30, 12), (9, 5), (3, 40, 8, 2))
    ]
    batches = [
        {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in row.items()} for row in rows
    ]
    with torch.no_grad():
        plain = [model(**batch).loss.item() for batch in batches]
    compile_layers(model)
    for batch, expected in zip(batches, plain, strict=True):
        loss = model(**batch).loss
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-2)
