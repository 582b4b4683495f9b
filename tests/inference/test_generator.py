"""Generation: padding, batching, sharing of images and streaming change nothing about a reply."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from medm.errors import DeviceError
from medm.inference.generator import Engine, FeatureMemory, content_key, generation_config, pick_device, prepare
from medm.inference.options import GenerationOptions
from medm.types import Example, Media, Sample, Turn, VisionFeatures
from tests.inference.tiny import build_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return build_tiny(tmp_path_factory.mktemp("model"))


def example(processor: Any, text: str, *arrays: np.ndarray) -> Example:
    sample = Sample((Turn("user", (*[Media("image") for _ in arrays], text)),))
    return processor.encode(sample, {"image": list(arrays)}, generation=True)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def prompts(tiny: tuple[Any, Any]) -> list[Example]:
    processor = tiny[1]
    return [
        example(processor, "Is there an effusion?", picture(0)),
        example(processor, "No image at all, and a question that is quite a bit longer than the others."),
        example(processor, "Which of the two?", picture(1), picture(0)),
        example(processor, "Why?", picture(0)),
    ]


@pytest.mark.parametrize("beams", [1, 3])
def test_batch_and_one_by_one_give_the_same_replies(tiny: tuple[Any, Any], prompts: list[Example], beams: int) -> None:
    model, processor = tiny
    options = GenerationOptions(max_new_tokens=12, num_beams=beams)
    together = Engine(model, processor, options)._generate(prepare(prompts, pad_id=processor.pad_id))
    alone = [Engine(model, processor, options)._generate(prepare([p], pad_id=processor.pad_id))[0] for p in prompts]
    for row, single in zip(together, alone, strict=True):
        assert row[: len(single)] == single
    assert len({tuple(row) for row in alone}) == len(prompts), "the prompts do not tell the model anything"


def test_replies_are_those_of_plain_generate(tiny: tuple[Any, Any], prompts: list[Example]) -> None:
    model, processor = tiny
    ids = torch.tensor([prompts[2].input_ids])
    pixels = torch.from_numpy(np.stack(prompts[2].pixels["image"]))
    plain = model.generate(input_ids=ids, pixels={"image": pixels}, max_new_tokens=9, do_sample=False)
    engine = Engine(model, processor, GenerationOptions(max_new_tokens=9))
    reply = engine.generate(prepare([prompts[2]], pad_id=processor.pad_id))[0]
    assert reply.text == processor.text(plain[0, ids.shape[1] :])
    assert reply.tokens == plain.shape[1] - ids.shape[1]


def test_drawn_replies_are_the_same_from_a_cache_of_fixed_size(tiny: tuple[Any, Any], prompts: list[Example]) -> None:
    model, processor = tiny
    batch = prepare(prompts, pad_id=processor.pad_id)
    replies = [
        Engine(model, processor, GenerationOptions(max_new_tokens=6, temperature=0.7, compile=fixed)).generate(batch)
        for fixed in (False, True)
    ]
    assert replies[0] == replies[1]


def test_compiled_decoding_is_asked_for_in_the_options(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    decoders = [Engine(model, processor, GenerationOptions(compile=compiled)).decoder for compiled in (False, True)]
    assert [decoder is not None and decoder.compiled for decoder in decoders] == [False, True]


def test_an_image_is_encoded_once_for_all_its_questions(
    tiny: tuple[Any, Any], prompts: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny
    engine = Engine(model, processor, GenerationOptions(max_new_tokens=2))
    counts: list[int] = []
    encode = model.branch("image").encode
    monkeypatch.setattr(model.branch("image"), "encode", lambda pixels: counts.append(len(pixels)) or encode(pixels))
    engine.generate(prepare(prompts, pad_id=processor.pad_id))
    engine.generate(prepare(prompts[:1], pad_id=processor.pad_id))
    engine.generate(prepare([example(processor, "New", picture(7))], pad_id=processor.pad_id))
    assert counts == [2, 1]  # four placeholders of two pictures; nothing new; one new picture


def test_feature_memory_forgets_the_least_used() -> None:
    one = VisionFeatures(torch.zeros(1, 4, 8), (2, 2))  # 128 bytes
    store = FeatureMemory(300)
    for key in (b"a", b"b"):
        store.put("image", key, one)
    store.get("image", b"a")
    store.put("image", b"c", one)
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


def test_streaming_gives_the_same_text_and_can_be_stopped(tiny: tuple[Any, Any], prompts: list[Example]) -> None:
    model, processor = tiny
    engine = Engine(model, processor, GenerationOptions(max_new_tokens=12))
    batch = prepare(prompts[:1], pad_id=processor.pad_id)
    assert "".join(engine.stream(batch)).strip() == engine.generate(batch)[0].text
    stream = Engine(model, processor, GenerationOptions(max_new_tokens=400)).stream(batch)
    next(stream)
    stream.close()  # returns at once, or the test would take the time of 400 tokens


def test_sampling_repeats_itself_with_a_seed(tiny: tuple[Any, Any], prompts: list[Example]) -> None:
    model, processor = tiny
    batch = prepare(prompts, pad_id=processor.pad_id)

    def replies(seed: int) -> list[str]:
        options = GenerationOptions(max_new_tokens=8, temperature=1.0, top_p=0.9, seed=seed)
        return [reply.text for reply in Engine(model, processor, options).generate(batch)]

    assert replies(1) == replies(1)
    assert replies(1) != replies(2)


def test_a_batch_beyond_the_memory_is_halved(
    tiny: tuple[Any, Any], prompts: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny
    engine = Engine(model, processor, GenerationOptions(max_new_tokens=6))
    expected = engine.generate(prepare(prompts, pad_id=processor.pad_id))
    generate, sizes = engine._generate, []

    def small_memory(batch: Any, **kwargs: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("no memory")
        return generate(batch, **kwargs)

    monkeypatch.setattr(engine, "_generate", small_memory)
    assert [r.text for r in engine.generate(prepare(prompts, pad_id=processor.pad_id))] == [r.text for r in expected]
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    monkeypatch.setattr(engine, "_generate", lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(DeviceError, match="one prompt of"):
        engine.generate(prepare(prompts[:1], pad_id=processor.pad_id))


def test_settings_of_the_published_config_do_not_leak(tiny: tuple[Any, Any]) -> None:
    published = tiny[0].generation_config
    published.update(temperature=0.3, repetition_penalty=1.5)
    config = generation_config(published, GenerationOptions(max_new_tokens=5))
    assert config.repetition_penalty in (None, 1.0)
    assert not config.do_sample
    assert config.eos_token_id == published.eos_token_id
    assert config.suppress_tokens == published.suppress_tokens != None  # noqa: E711
    published.update(temperature=1.0, repetition_penalty=1.0)


def test_devices_that_are_not_there() -> None:
    with pytest.raises(DeviceError, match="expected auto, cpu, cuda"):
        pick_device("gpu please")
    assert pick_device("cpu").type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_asked_for_and_absent() -> None:
    with pytest.raises(DeviceError, match="sees no GPU"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"
