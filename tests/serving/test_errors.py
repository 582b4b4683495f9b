"""Each row of the table of errors, in OpenAI's shape; and the next request is answered."""

from __future__ import annotations

import io
import json
import logging
import re
import socket
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from medm.serving.errors import ERRORS, ServingError
from tests.serving.live import Live, code, data_uri, png, question

DOCS = Path(__file__).parents[2] / "docs"
CHAT = "/v1/chat/completions"


def png_bomb() -> bytes:
    """A PNG of a few kB that declares 144 million pixels."""
    header = struct.pack(">IIBBBBB", 12_000, 12_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1501) * 1000)
    parts = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def large_png() -> bytes:
    """An honest image of more pixels than are taken."""
    stream = io.BytesIO()
    Image.new("L", (600, 600)).save(stream, "PNG")
    return stream.getvalue()


def shown(*urls: str) -> dict[str, Any]:
    return {"json": question("What?", *urls)}


def raw(body: bytes) -> dict[str, Any]:
    return {"content": body, "headers": {"content-type": "application/json"}}


def messages(*found: dict[str, Any]) -> dict[str, Any]:
    return {"json": {"model": "model", "messages": list(found)}}


USER = {"role": "user", "content": "What?"}

REFUSED: dict[str, tuple[dict[str, Any], tuple[int, str]]] = {
    "no JSON": (raw(b"{"), (400, "invalid_json")),
    "no UTF-8": (raw(b'{"model": "\xff\xfe"}'), (400, "invalid_json")),
    "deep JSON": (raw(b"[" * 100_000), (400, "invalid_json")),
    "half a surrogate pair": (
        raw(b'{"model": "model", "messages": [{"role": "user", "content": "\\ud800"}]}'),
        (400, "invalid_value"),
    ),
    "no messages": (messages(), (400, "invalid_value")),
    "unknown role": (messages({"role": "tool", "content": "x"}), (400, "invalid_value")),
    "reply at the end": (messages(USER, {"role": "assistant", "content": "x"}), (400, "invalid_value")),
    "late system": (messages(USER, {"role": "system", "content": "x"}), (400, "invalid_value")),
    "video": (
        messages({"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}),
        (400, "invalid_value"),
    ),
    "unknown field": ({"json": question(beam_width=3)}, (400, "invalid_value")),
    "n": ({"json": question(n=3)}, (400, "unsupported")),
    "temperature": ({"json": question(temperature=3.0)}, (400, "invalid_value")),
    "too many images": (shown(*[data_uri(png())] * 4), (400, "too_many_images")),
    "damaged image": (shown(data_uri(png()[:300])), (400, "invalid_image")),
    "no base64": (shown("data:image/png;base64,%%%"), (400, "invalid_image")),
    "path": (shown("/etc/passwd"), (400, "source_refused")),
    "file URL": (shown("file:///etc/passwd"), (400, "source_refused")),
    "private URL": (shown("http://169.254.169.254/latest/meta-data/"), (400, "source_refused")),
    "model": ({"json": question() | {"model": "gpt"}}, (404, "model_not_found")),
    "file id": (shown("file-unknown"), (404, "file_not_found")),
    "body": (raw(b" " * (2**20 + 1)), (413, "body_too_large")),
    "values": (raw(b"[" + b"[]," * 60_000 + b"[]]"), (413, "body_too_large")),
    "PNG bomb": (shown(data_uri(png_bomb())), (413, "too_many_pixels")),
    "huge image": (shown(data_uri(large_png())), (413, "too_many_pixels")),
    "long reply": ({"json": question(max_tokens=301)}, (413, "context_length_exceeded")),
    "long prompt": ({"json": question("word " * 150)}, (413, "context_length_exceeded")),
    "content type": (
        {"content": b"{}", "headers": {"content-type": "text/plain"}},
        (415, "unsupported_type"),
    ),
    "GIF": (shown(data_uri(b"GIF89a" + bytes(200), "image/png")), (415, "unsupported_type")),
    "audio": (shown(data_uri(png(), "audio/wav")), (415, "unsupported_type")),
    "volume as data URI": (shown(data_uri(b"NRRD0004\n", "image/png")), (415, "unsupported_type")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_request_and_the_next_one(live: Live, name: str) -> None:
    request, expected = REFUSED[name]
    with live.client() as client:
        assert code(client.post(CHAT, **request)) == expected
        assert client.post(CHAT, json=question(max_tokens=1)).status_code == 200
    assert live.idle()


def test_keys(live: Live) -> None:
    paths = ("/v1/models", "/metrics", "/openapi.json", "/v1/files/x", "/nowhere")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {live.key}"}):
        for path in paths:
            response = httpx.get(live.url + path, headers=headers)
            assert code(response) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert code(httpx.post(live.url + CHAT, json=question(), headers=headers))[0] == 401
    for path in ("/health/live", "/health/ready", "/"):
        assert httpx.get(live.url + path).status_code == 200


def test_unknown_routes_and_methods(live: Live) -> None:
    with live.client() as client:
        assert code(client.get("/nowhere")) == (404, "not_found")
        assert code(client.put(CHAT)) == (405, "method_not_allowed")
        assert code(client.get("/v1/jobs/job-unknown")) == (404, "job_not_found")
        assert code(client.get("/v1/models/other")) == (404, "model_not_found")


def test_a_full_queue(live: Live) -> None:
    held = threading.Event()
    live.service.worker.call(held.wait)
    streams = [live.service.worker.submit(_turns(), max_new_tokens=2) for _ in range(7)]
    try:
        response = live.chat()
        assert code(response) == (429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
    finally:
        held.set()
    for stream in streams:
        stream.result()
    assert live.chat().status_code == 200


def test_a_full_queue_is_answered_before_the_body_is_read(live: Live) -> None:
    held = threading.Event()
    live.service.worker.call(held.wait)
    threads = [threading.Thread(target=live.chat) for _ in range(7)]
    try:
        for thread in threads:
            thread.start()
        end = time.monotonic() + 10
        while live.gate.bodies < 7 and time.monotonic() < end:
            time.sleep(0.01)
        with connected(live) as peer, connected(live) as other:
            head = request_head(live, 1000)
            peer.sendall(head)  # one more is taken: its body may still come
            time.sleep(0.1)
            other.sendall(head)
            assert b"429" in other.recv(4096).partition(b"\r\n")[0]
    finally:
        held.set()
    for thread in threads:
        thread.join()
    assert live.idle()
    assert live.chat().status_code == 200


def connected(live: Live) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def request_head(live: Live, length: int) -> bytes:
    return (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {live.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    ).encode()


def test_a_slow_body(live: Live) -> None:
    with connected(live) as peer:
        peer.sendall(request_head(live, 1000) + b"{")
        start = time.monotonic()
        answer = b""
        while chunk := peer.recv(4096):
            answer += chunk
    assert time.monotonic() - start < 6
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"
    assert live.idle()
    assert live.chat().status_code == 200


def test_an_endless_chunked_body(live: Live) -> None:
    def parts() -> Any:
        for _ in range(40):
            yield b" " * 2**16

    with live.client() as client:
        headers = {"content-type": "application/json"}
        response = client.post(CHAT, content=parts(), headers=headers)
        assert code(response) == (413, "body_too_large")


def test_a_client_that_leaves_amid_its_body(live: Live) -> None:
    with connected(live) as peer:
        peer.sendall(request_head(live, 1000) + b"{")
    assert live.idle()
    assert live.chat().status_code == 200


def test_loading_and_draining(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    for state in ("loading", "draining", "failed"):
        with monkeypatch.context() as patch:
            patch.setattr(live.service.worker, "_state", state)
            assert code(live.chat()) == (503, state)
            assert code(httpx.get(f"{live.url}/health/ready")) == (503, state)
            assert httpx.get(f"{live.url}/health/live").status_code == 200
    assert live.chat().status_code == 200


def test_a_defect_is_told_without_its_text(
    live: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise RuntimeError("the words of a patient")

    with monkeypatch.context() as patch:
        patch.setattr(live.service.worker, "submit", fail)
        response = live.chat()
    assert code(response) == (500, "internal_error")
    assert live.idle()  # the log is written behind the response
    assert "patient" not in response.text + caplog.text
    assert "RuntimeError" in caplog.text
    assert live.chat().status_code == 200


def test_logs_and_figures_hold_no_content(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="medm")
    live.chat("A secret finding", stop=["hidden"])
    live.chat("A secret finding", nonsense="hidden")
    with live.client() as client:
        name = client.post("/v1/files", files={"file": ("Secret^Patient.png", png())}).json()["id"]
        client.delete(f"/v1/files/{name}")
        client.get("/secret/path")
        client.post(CHAT, json=question("A secret finding", data_uri(png())))
        figures = client.get("/metrics").text
    text = caplog.text + figures
    for word in ("secret", "Secret", "hidden", "base64", str(live.key)):
        assert word not in text
    assert re.search(r"req-\w+ POST /v1/chat/completions 200 in \d+ B out \d+ B \d", text)
    assert "medm_open_requests" in figures
    assert 'medm_requests_total{route="/v1/chat/completions",status="200"}' in figures
    assert 'medm_tokens_total{part="reply"}' in figures


@pytest.mark.parametrize("route", [CHAT, "/v1/zero-shot", "/v1/embeddings"])
def test_a_wrong_part_is_named_and_not_repeated(live: Live, route: str) -> None:
    part = {"type": "Secret^Patient", "text": "A secret finding"}
    body = {
        "model": "model",
        "input": [part],
        "labels": ["a", "b"],
        "messages": [{"role": "user", "content": [part]}],
    }
    kept = {CHAT: ("messages",), "/v1/zero-shot": ("input", "labels"), "/v1/embeddings": ("input",)}
    with live.client() as client:
        response = client.post(route, json={name: body[name] for name in ("model", *kept[route])})
    assert code(response) == (400, "invalid_value")
    place = "messages.0.content.0" if route == CHAT else "input.0"
    expected = f"{place}: expected the type 'text', 'image_url', 'file'"
    assert response.json()["error"]["message"] == expected
    assert response.json()["error"]["param"] == place


def test_a_server_without_a_key_answers_this_machine_alone(dual: Live) -> None:
    for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
        response = httpx.get(f"{dual.url}/v1/models", headers=headers)
        assert code(response) == (403, "host_refused")
    assert httpx.get(f"{dual.url}/v1/models", headers={"origin": dual.url}).status_code == 200


def test_the_table_of_the_page_is_the_table_of_the_code() -> None:
    page = (DOCS / "serving.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d{3}) \| (`[^|]+`) \|", page, re.MULTILINE)
    listed = {name: int(status) for status, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert listed == {name: status for name, (status, _) in ERRORS.items()}


def test_every_error_has_a_body() -> None:
    for name, (status, kind) in ERRORS.items():
        error = ServingError(name, "why", param="field")
        assert error.status == status
        assert error.body() == {
            "error": {"message": "why", "type": kind, "param": "field", "code": name}
        }


def _turns() -> Any:
    from medm.types import Turn

    return [Turn("user", ("What?",))]
