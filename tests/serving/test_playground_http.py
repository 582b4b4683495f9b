"""Requests to the page of the playground that no browser sends."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from medm.serving import playground_page
from tests.inference.tiny import save_tiny
from tests.models.dual_encoder import tiny
from tests.serving.live import png
from tests.serving.playground_live import LivePage, live_page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivePage]:
    """A model that replies and a dual encoder."""
    root = tmp_path_factory.mktemp("playground")
    dual, processor = tiny.make(tiny.section(tiny.save_tokenizer(root / "tokenizer")))
    dual.save_pretrained(root / "dual")
    processor.save_pretrained(root / "dual")
    with live_page(save_tiny(root / "text"), root / "dual") as live:
        yield live


def ordinary(part: dict[str, Any]) -> Any:
    """What a browser sends of a component."""
    kind, props = part["type"], part["props"]
    return "What is seen?" if props.get("elem_id") == "question" else {
        "file": None, "chatbot": [], "dropdown": "",
    }.get(kind, props.get("value"))  # fmt: skip


def file_data(path: object) -> dict[str, Any]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def kept_by_gradio() -> list[bytes]:
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    return [path.read_bytes() for path in folder.rglob("*") if path.is_file()]


def test_files_of_the_server_cannot_be_read(page: LivePage, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    sent = file_data(secret)

    def attack(part: dict[str, Any]) -> Any:
        if part["type"] == "chatbot":
            return [{"role": "user", "content": [{"type": "file", "file": sent}]}]
        return sent if part["type"] in ("file", "textbox") else ordinary(part)

    for number, element in enumerate(("ask", "chat-upload", "zero-shot-upload", "compare")):
        client = f"attack{number}"
        assert page.join(client, element, attack).status_code == 200
        *_, last, closed = page.results(client)
        assert closed["msg"] == "close_stream"
        assert last["msg"] == "process_completed" and not last["success"]
        assert "secret" not in json.dumps(last["output"].get("data", ""))
    assert secret.exists()
    assert png() not in kept_by_gradio()
    assert httpx.get(f"{page.url}/gradio_api/file={secret}").status_code in (403, 404)


def test_the_conversation_is_kept_by_the_server(page: LivePage) -> None:
    config = page.config()
    chats = {part["id"] for part in config["components"] if part["type"] == "chatbot"}
    assert chats
    assert not any(chats & set(event["inputs"]) for event in config["dependencies"])
    for _ in range(2):
        assert page.join("kept", "ask", ordinary).status_code == 200
        assert page.results("kept")[-2]["success"]
    (messages,) = page.app.sessions.get("kept").messages.values()
    assert [one["role"] for one in messages] == ["user", "assistant"] * 2
    assert page.join("kept", "restart", ordinary).status_code == 200
    assert page.results("kept")[-2]["success"]
    assert page.app.sessions.get("kept").messages == {}


@contextmanager
def other_host() -> Iterator[tuple[str, list[str]]]:
    """The address of an HTTP server, and the paths that it is asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png())

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/a.png", asked
        server.shutdown()
        thread.join()


def test_no_other_host_is_asked(page: LivePage, monkeypatch: pytest.MonkeyPatch) -> None:
    # gradio itself refuses addresses of this machine; so that the test can see it, they are taken.
    async def download(url: str, cache_dir: str) -> str:
        httpx.get(url)
        return str(Path(cache_dir) / "a.png")

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", download)
    with other_host() as (url, asked):
        sent = file_data(url)
        for element in ("ask", "chat-upload", "zero-shot-upload", "compare"):
            response = page.join("other", element, lambda part: sent)
            assert response.status_code == 400
            assert response.text == "files of other hosts are not taken"
        quoted = url.replace("/", "%2F").replace(":", "%3A")
        for path in (
            f"/gradio_api/file={url}", f"/gradio_api/file%3D{quoted}", f"/gradio_api/file/{url}",
            f"/gradio_api/proxy={url}", f"/gradio_api/proxy%3D{quoted}", f"/file={url}",
            f"/gradio_api/file%253D{quoted}", "/gradio_api/deep_link?session_hash=other",
        ):  # fmt: skip
            assert httpx.get(page.url + path).status_code == 404, path
        for path in ("component_server", "run/predict", "api/predict", "call/predict", "stream/1"):
            response = httpx.post(f"{page.url}/gradio_api/{path}", json={"data": [sent]})
            assert response.status_code == 404, path
        assert asked == []
        assert httpx.get(url).status_code == 200 and asked == ["/a.png"]


def test_bodies_of_events_are_limited(page: LivePage) -> None:
    address = f"{page.url}/gradio_api/queue/join"
    assert httpx.post(address, content=b"[" * 100_000).status_code == 400
    assert httpx.post(address, content=b"x").status_code == 400
    assert httpx.post(address, content=b" " * (2**20 + 1)).status_code == 413


def test_a_double_click_asks_once(page: LivePage, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()
    original = playground_page.ask

    def slow(*given: Any, **options: Any) -> Iterator[Any]:
        started.set()
        assert go_on.wait(30)
        yield from original(*given, **options)

    monkeypatch.setattr(playground_page, "ask", slow)
    first = page.join("double", "ask", ordinary).json()["event_id"]
    assert started.wait(30)
    second = page.join("double", "ask", ordinary).json()["event_id"]
    ends = {}
    for message in page.messages("double"):
        if message["msg"] == "process_completed":
            ends[message["event_id"]] = message
            go_on.set()
    assert ends[first]["success"] and not ends[second]["success"]
    assert "a reply is being generated" in ends[second]["output"]["error"]
    (turns,) = page.app.sessions.get("double").turns.values()
    assert len(turns) == 2


def test_a_new_conversation_ends_the_reply(page: LivePage, monkeypatch: pytest.MonkeyPatch) -> None:
    original = playground_page.ask

    def slow(*given: Any, **options: Any) -> Iterator[Any]:
        for answers in original(*given, **options):
            yield answers
            page.app.sessions.clear(page.app.sessions.get("ended"))

    monkeypatch.setattr(playground_page, "ask", slow)
    page.join("ended", "ask", ordinary)
    assert page.results("ended")[-2]["success"]
    session = page.app.sessions.get("ended")
    assert session.turns == {} and session.messages == {}
