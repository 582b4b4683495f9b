"""Generation: padding, batching, sharing of images and streaming change nothing about a reply."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medm.config import validate
from medm.errors import DataError, DeviceError, ExportError, RecipeError
from medm.inference import runners
from medm.inference.generator import (
    Engine,
    FeatureMemory,
    Item,
    PromptBatch,
    content_key,
    pick_device,
    prepare,
)
from medm.inference.options import GenerationOptions, InferOptions
from medm.models import build, load
from medm.models.export.llava import refuse_what_differs
from medm.models.lvlm.options import LVLMOptions
from medm.types import Example, Media, Sample, Turn, VisionFeatures
from tests.inference.tiny import build_tiny
from tests.tiny import lvlm_section, save_llm


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return build_tiny(tmp_path_factory.mktemp("model"))


def example(processor: Any, text: str, *arrays: np.ndarray) -> Example:
    sample = Sample((Turn("user", (*[Media("image") for _ in arrays], text)),))
    return processor.encode(sample, {"image": list(arrays)}, generation=True)


def random_image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def prompts(tiny: tuple[Any, Any]) -> list[Example]:
    processor = tiny[1]
    return [
        example(processor, "Is there an effusion?", random_image(0)),
        example(
            processor, "No image at all, and a question that is quite a bit longer than the others."
        ),
        example(processor, "Which of the two?", random_image(1), random_image(0)),
        example(processor, "Why?", random_image(0)),
    ]


def ids(engine: Engine, batch: PromptBatch) -> list[list[int]]:
    """Token ids of each reply."""
    rows = {engine.submit(request): row for row, request in enumerate(batch.requests())}
    replies: list[list[int]] = [[] for _ in rows]
    while engine.pending:
        for event in engine.step():
            assert event.error is None
            replies[rows[event.request]] += [] if event.token is None else [event.token]
    return replies


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_batch_and_one_by_one_give_the_same_replies(
    tiny: tuple[Any, Any], prompts: list[Example], temperature: float
) -> None:
    model, processor = tiny
    options = GenerationOptions(max_new_tokens=12, temperature=temperature)
    together = ids(Engine(model, processor, options), prepare(prompts))
    alone = [ids(Engine(model, processor, options), prepare([prompt]))[0] for prompt in prompts]
    assert together == alone
    assert len({tuple(row) for row in alone}) == len(prompts), (
        "the prompts do not tell the model anything"
    )


def test_replies_are_those_of_plain_generate(tiny: tuple[Any, Any], prompts: list[Example]) -> None:
    model, processor = tiny
    ids = torch.tensor([prompts[2].input_ids])
    pixels = torch.from_numpy(np.stack(prompts[2].pixels["image"]))
    plain = model.generate(
        input_ids=ids, pixels={"image": pixels}, max_new_tokens=9, do_sample=False
    )
    engine = Engine(model, processor, GenerationOptions(max_new_tokens=9))
    reply = engine.generate(prepare([prompts[2]]))[0]
    assert reply.text == processor.text(plain[0, ids.shape[1] :])
    assert reply.tokens == plain.shape[1] - ids.shape[1]


def test_compiled_and_other_requests_stand_in_batches_of_their_own(
    tiny: tuple[Any, Any], prompts: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="eager")
    )  # traced, not built
    monkeypatch.setattr(runners, "COMPILE_MODE", None)
    engine = Engine(*tiny)
    assert [engine.decoder(compiled=compiled).compiled for compiled in (False, True)] == [
        False,
        True,
    ]
    plain, compiled = (
        GenerationOptions(max_new_tokens=4, compile=compiled) for compiled in (False, True)
    )
    (request,) = prepare(prompts[:1]).requests()
    numbers = [engine.submit(request, options) for options in (plain, compiled)]
    assert len(set(numbers)) == 2
    replies = {}
    while engine.pending:
        replies |= {
            event.request: event.reply for event in engine.step() if event.reply is not None
        }
    assert (
        replies[numbers[0]]
        == replies[numbers[1]]
        == engine.generate(prepare(prompts[:1]), plain)[0]
    )


def test_an_image_is_encoded_once_for_all_its_questions(
    tiny: tuple[Any, Any], prompts: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny
    engine = Engine(model, processor, GenerationOptions(max_new_tokens=2))
    counts: list[int] = []
    encode = model.branch("image").encode
    monkeypatch.setattr(
        model.branch("image"), "encode", lambda pixels: counts.append(len(pixels)) or encode(pixels)
    )
    engine.generate(prepare(prompts))
    engine.generate(prepare(prompts[:1]))
    engine.generate(prepare([example(processor, "New", random_image(7))]))
    assert counts == [2, 1]  # four placeholders of two images; nothing new; one new image


def test_feature_memory_forgets_the_least_used() -> None:
    one = VisionFeatures(torch.zeros(1, 4, 8), (2, 2))  # 128 bytes
    store = FeatureMemory[VisionFeatures](300, lambda features: features.tokens.nbytes)
    for key in (b"a", b"b"):
        store.put("image", key, one)
    store.get("image", b"a")
    store.put("image", b"c", one)
    store.put("image", b"c", one)  # known: not counted again
    assert store.get("image", b"b") is None
    assert store.get("image", b"a") is not None
    assert store.size == 256
    store.put("image", b"huge", VisionFeatures(torch.zeros(1, 40, 8), (5, 8)))
    assert store.get("image", b"huge") is None
    assert store.get("volume", b"a") is None


def test_content_keys_tell_shape_and_values_apart() -> None:
    array = np.arange(6, dtype=np.float32)
    assert content_key(array) == content_key(array.copy())
    assert content_key(array) != content_key(array.reshape(2, 3))
    assert content_key(array) != content_key(array.view(np.int32))


def test_streaming_gives_the_same_text_and_can_be_stopped(
    tiny: tuple[Any, Any], prompts: list[Example]
) -> None:
    model, processor = tiny
    engine = Engine(model, processor, GenerationOptions(max_new_tokens=12))
    batch = prepare(prompts[:1])
    pieces = list(engine.stream(batch.requests()[0]))
    assert len(pieces) > 3
    assert "".join(pieces) == engine.generate(batch)[0].text
    stream = engine.stream(batch.requests()[0], GenerationOptions(max_new_tokens=400))
    next(stream)
    stream.close()
    assert engine.step() == []
    assert engine.pending == engine.decoder(compiled=False).pending == 0


def test_a_stream_and_other_requests_advance_together(
    tiny: tuple[Any, Any], prompts: list[Example]
) -> None:
    """A question in the middle of a stream, from the same thread; and requests of `submit` beside
    both."""
    engine = Engine(*tiny, GenerationOptions(max_new_tokens=12))
    batch = prepare(prompts)
    expected = [reply.text for reply in engine.generate(batch)]
    streamed, submitted, cancelled = batch.requests()[:3]
    number = engine.submit(submitted, stream=True)
    other = engine.submit(cancelled)
    pieces = engine.stream(streamed)
    text = next(pieces)
    engine.cancel(other)
    assert [reply.text for reply in engine.generate(batch)] == expected
    assert text + "".join(pieces) == expected[0]
    events = []
    while engine.pending:
        events += engine.step()
    assert "".join(event.text for event in events if event.request == number) == expected[1]
    assert [event.reply.text for event in events if event.reply is not None] == [expected[1]]
    assert [event.finish for event in events if event.request == other][-1] == "cancelled"


def test_a_request_that_cannot_be_answered_ends_with_its_own_error(
    tiny: tuple[Any, Any], prompts: list[Example]
) -> None:
    """Each of these would end the process on a GPU, where the model's own checks come too late."""
    engine = Engine(*tiny, GenerationOptions(max_new_tokens=4), max_tokens=150)
    good = prepare(prompts).requests()
    expected = engine.generate(prepare(prompts))
    item = good[0].items["image"][0]
    bad = {
        "placeholder tokens and 0 items": replace(good[0], items={}),
        "placeholder tokens and 2 items": replace(good[0], items={"image": [item, item]}),
        "pixels of shape (3, 8, 8)": replace(
            good[0], items={"image": [Item(b"x", torch.zeros(3, 8, 8))]}
        ),
        "the model has branches for image": replace(
            good[0], items={**good[0].items, "volume": [item]}
        ),
        "token ids from": replace(good[1], input_ids=np.append(good[1].input_ids, 10**6)),
        "at most 150": replace(good[1], input_ids=np.full(151, 3)),
    }
    numbers = {engine.submit(request): text for text, request in bad.items()}
    right = [engine.submit(request) for request in good]
    replies, errors = {}, {}
    while engine.pending:
        for event in engine.step():
            if event.finish == "error":
                errors[event.request] = event.error
            if event.reply is not None:
                replies[event.request] = event.reply
    assert [replies[number] for number in right] == expected
    assert set(errors) == set(numbers)
    for number, text in numbers.items():
        assert isinstance(errors[number], DataError)
        assert text in str(errors[number])
    with pytest.raises(DataError, match="at most 150"):
        list(engine.stream(bad["at most 150"]))
    assert engine.generate(prepare(prompts)) == expected


def test_arguments_of_transformers_generate_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(
        RecipeError, match=r"num_beams: not offered.*max_new_tokens, temperature, top_k.*`generate`"
    ):
        validate(
            InferOptions,
            {"model": "m", "data": "d", "output": "o", "generation": {"num_beams": 4}},
            source="x",
        )
    with pytest.raises(RecipeError, match="do_sample, repetition_penalty: not offered"):
        validate(GenerationOptions, {"repetition_penalty": 1.2, "do_sample": True}, source="x")
    with pytest.raises(RecipeError, match="top_k: nothing is sampled at temperature 0"):
        validate(GenerationOptions, {"top_k": 3}, source="x")
    assert (
        validate(GenerationOptions, {"num_beams": 1}, source="an earlier recipe")
        == GenerationOptions()
    )


def test_sampling_repeats_itself_with_a_seed(tiny: tuple[Any, Any], prompts: list[Example]) -> None:
    model, processor = tiny
    batch = prepare(prompts)

    def replies(seed: int) -> list[str]:
        options = GenerationOptions(max_new_tokens=8, temperature=1.0, top_p=0.9, seed=seed)
        return [reply.text for reply in Engine(model, processor, options).generate(batch)]

    assert replies(1) == replies(1)
    assert replies(1) != replies(2)


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_each_sampling_setting_reaches_the_draw(
    tiny: tuple[Any, Any], prompts: list[Example], setting: dict[str, float]
) -> None:
    """At its narrowest each of them leaves the most probable token alone; together with none of
    them, at temperature 4, the replies differ from the greedy ones.
    """
    model, processor = tiny
    batch = prepare(prompts)

    def replies(**settings: Any) -> list[list[int]]:
        options = GenerationOptions(max_new_tokens=8, **settings)
        return ids(Engine(model, processor, options), batch)

    greedy = replies()
    assert replies(temperature=4.0) != greedy
    assert replies(**({"temperature": 4.0} | setting)) == greedy


def test_what_does_not_fit_the_memory_is_an_error_and_the_engine_continues(
    tiny: tuple[Any, Any], prompts: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(*tiny, GenerationOptions(max_new_tokens=6))
    expected = engine.generate(prepare(prompts))
    with monkeypatch.context() as patch:
        patch.setattr(
            engine.model.language_model,
            "forward",
            lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")),
        )
        with pytest.raises(DeviceError, match="one prompt of"):
            engine.generate(prepare(prompts))
    assert engine.generate(prepare(prompts)) == expected


def test_sampling_settings_of_the_config_do_not_leak(
    tiny: tuple[Any, Any], prompts: list[Example]
) -> None:
    model, processor = tiny
    expected = Engine(model, processor, GenerationOptions(max_new_tokens=9)).generate(
        prepare(prompts)
    )
    published = copy.deepcopy(model.generation_config)
    model.generation_config.update(temperature=0.3, repetition_penalty=1.5, top_k=2, do_sample=True)
    decoder = Engine(model, processor).decoder(compiled=False)
    try:
        assert decoder.stops == set(published.eos_token_id)
        assert decoder._runner._suppress.tolist() == sorted(published.suppress_tokens) != []
        assert (
            Engine(model, processor, GenerationOptions(max_new_tokens=9)).generate(prepare(prompts))
            == expected
        )
    finally:
        model.generation_config = published


def test_devices_that_are_not_there() -> None:
    with pytest.raises(DeviceError, match="expected auto, cpu, cuda"):
        pick_device("gpu please")
    assert pick_device("cpu").type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_asked_for_and_absent() -> None:
    with pytest.raises(DeviceError, match="sees no GPU"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"


def test_a_sequence_of_tokens_ends_a_reply(
    tiny: tuple[Any, Any], prompts: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a chat template ends replies with text: no single token of it is an end."""
    model, processor = tiny
    options = GenerationOptions(max_new_tokens=12)
    whole = ids(Engine(model, processor, options), prepare([prompts[0]]))[0]
    end = whole[4:6]
    length = next(n for n in range(2, 13) if whole[n - 2 : n] == end)
    monkeypatch.setitem(vars(processor.chat), "end_sequence", tuple(end))
    monkeypatch.setattr(model.config, "end_sequence", end)
    engine = Engine(model, processor, options)
    assert ids(engine, prepare([prompts[0]]))[0] == whole[:length]
    reply = engine.generate(prepare([prompts[0]]))[0]
    assert (reply.finished, reply.tokens) == (True, length)
    plain = model.generate(
        **processor.pad([prompts[0]]), max_new_tokens=12, do_sample=False, repetition_penalty=1.0
    )  # by transformers
    assert plain[0, len(prompts[0].input_ids) :].tolist() == whole[:length]


def test_the_published_template_of_unibiomed_ends_with_text(tmp_path: Path) -> None:
    section = lvlm_section(save_llm("qwen2.5", tmp_path / "llm"))
    section["llm"]["chat_template"] = "phi-3"
    model, processor = build(validate(LVLMOptions, section, source="test"))
    end = processor.tokenizer("<|end|>", add_special_tokens=False)["input_ids"]
    assert model.config.end_sequence == list(processor.chat.end_sequence) == end
    assert processor.text(processor.tokenizer("Yes. <|end|>")["input_ids"]) == "Yes."
    assert model.generation_config.eos_token_id == [processor.tokenizer.eos_token_id]
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")
    again, _ = load(str(tmp_path / "saved"))
    assert again.config.end_sequence == end
    with pytest.raises(ExportError, match=r"end with the text '<.end.>'"):
        refuse_what_differs(model, processor)
