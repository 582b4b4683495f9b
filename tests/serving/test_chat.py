"""Conversations in OpenAI's form, answered as medm answers them."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from medm.inference.options import GenerationOptions
from medm.serving.chat import turns_of
from medm.serving.schemas import ChatBody
from medm.types import Media, Turn
from tests.serving.live import Live, code, data_uri, png, question


def events(text: str) -> list[Any]:
    """The events of a stream; [DONE] is the last one."""
    lines = [line for line in text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_greedy_reply_is_that_of_the_engine(live: Live) -> None:
    turns = [Turn("user", (Media("image"), "\n", "What is seen?"))]
    expected = live.service.worker.submit(turns, [png()], max_new_tokens=12).result()
    with live.client() as client:
        body = question("What is seen?", data_uri(png()), max_tokens=12)
        response = client.post("/v1/chat/completions", json=body)
    reply = response.json()
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 12
    assert reply["usage"]["prompt_tokens"] + 12 == reply["usage"]["total_tokens"]
    assert reply["model"] == "model" and reply["object"] == "chat.completion"
    assert response.headers["x-medm-notice"] == "Not for clinical use"


def test_a_stream_has_the_same_text_and_the_usage_in_its_last_chunk(live: Live) -> None:
    whole = live.chat(max_tokens=20).json()
    streamed = events(live.chat(max_tokens=20, stream=True).text)
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in streamed]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert streamed[0]["choices"][0]["delta"]["role"] == "assistant"
    assert streamed[-1]["choices"][0]["finish_reason"] == "length"
    assert streamed[-1]["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in streamed}) == 1

    apart = events(
        live.chat(max_tokens=20, stream=True, stream_options={"include_usage": True}).text
    )
    assert apart[-1]["choices"] == [] and apart[-1]["usage"] == whole["usage"]
    assert "usage" not in apart[-2]


def test_a_sampled_reply_depends_on_its_seed(live: Live) -> None:
    def text(**fields: Any) -> str:
        response = live.chat(temperature=1.5, max_tokens=12, **fields)
        return response.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(4) as pool:
        same = list(pool.map(lambda _: text(seed=7, top_p=0.95), range(4)))
    assert len(set(same)) == 1
    assert text(seed=-7, top_p=0.95) != same[0]
    assert text() != text(), "without a seed, replies differ"


def test_stop_sequences(live: Live) -> None:
    whole = live.chat(max_tokens=40).json()["choices"][0]["message"]["content"]
    stop = whole[6:9]
    for stops in (stop, [stop, "never seen"]):
        (choice,) = live.chat(max_tokens=40, stop=stops).json()["choices"]
        assert choice["message"]["content"] == whole[: whole.index(stop)]
        assert choice["finish_reason"] == "stop"
    pieces = events(live.chat(max_tokens=40, stop=stop, stream=True).text)
    streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in pieces)
    assert streamed == whole[: whole.index(stop)]
    assert live.idle()


def test_harmless_fields_are_ignored_and_named(live: Live) -> None:
    response = live.chat(
        user="someone", metadata={"a": "b"}, n=1, logprobs=False, tools=[], temperature=0, top_p=0.5,
        frequency_penalty=0, response_format={"type": "text"}, logit_bias=None,
    )  # fmt: skip
    assert response.status_code == 200
    assert response.headers["x-medm-ignored"] == "metadata, user, top_p"
    assert "x-medm-ignored" not in live.chat().headers


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
    ],
)
def test_what_is_not_offered_is_refused(live: Live, fields: dict[str, Any], param: str) -> None:
    response = live.chat(**fields)
    assert code(response) == (400, "unsupported")
    assert response.json()["error"]["param"] == param


def conversation(*messages: dict[str, Any]) -> ChatBody:
    return ChatBody.model_validate({"model": "m", "messages": list(messages)})


def test_the_order_of_parts_is_kept() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    text = {"type": "text", "text": "What is seen?"}
    turns = turns_of(
        conversation(
            {"role": "developer", "content": "Be brief."},
            {"role": "system", "content": "Answer in English."},
            {"role": "user", "content": [image, text]},
            {"role": "assistant", "content": "A lung."},
            {"role": "user", "content": [text, image]},
        ),
        ["image", "volume"],
    )
    assert turns == [
        Turn("system", ("Be brief.", "\n\n", "Answer in English.")),
        Turn("user", (Media("image"), "\n", "What is seen?")),
        Turn("assistant", ("A lung.",)),
        Turn("user", ("What is seen?", "\n", Media("volume"))),
    ]


def test_a_conversation_of_several_turns_and_a_system_message(live: Live) -> None:
    turns = [
        Turn("system", ("Be brief.",)),
        Turn("user", ("What?",)),
        Turn("assistant", ("A lung. <image> [SEG]",)),
        Turn("user", ("And?",)),
    ]
    expected = live.service.worker.submit(
        turns, generation=GenerationOptions(), max_new_tokens=8
    ).result()
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    with live.client() as client:
        body = {"model": "model", "messages": messages, "max_tokens": 8}
        reply = client.post("/v1/chat/completions", json=body).json()
    assert reply["choices"][0]["message"]["content"] == expected.text


def test_a_client_that_leaves_frees_its_slot(live: Live) -> None:
    metric = live.service.metrics.requests.labels("/v1/chat/completions", 499)
    before = metric._value.get()
    with live.client() as client:
        body = question(max_tokens=300, stream=True)
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            body = question(max_tokens=300)
            client.post("/v1/chat/completions", json=body, timeout=0.05)
    assert live.idle()
    end = time.monotonic() + 10
    while metric._value.get() < before + 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert metric._value.get() == before + 2
    assert live.chat().status_code == 200


def test_the_client_of_openai(live: Live) -> None:
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.key, max_retries=0)
    assert [model.id for model in client.models.list()] == ["model"]
    content: Any = [
        {"type": "text", "text": "What is seen?"},
        {"type": "image_url", "image_url": {"url": data_uri(png()), "detail": "high"}},
    ]
    messages: Any = [{"role": "user", "content": content}]
    reply = client.chat.completions.create(model="model", messages=messages, max_tokens=8, seed=1)
    text = reply.choices[0].message.content
    assert text and reply.usage is not None and reply.usage.completion_tokens == 8
    stream = client.chat.completions.create(
        model="model", messages=messages, max_tokens=8, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text
    assert chunks[-1].usage == reply.usage
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="model", messages=messages, n=2)
    assert refused.value.code == "unsupported" and refused.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=messages)
    wrong = openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()
