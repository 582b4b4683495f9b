"""A server on a port of this machine, in a thread."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from medm.serving.app import build_app
from medm.serving.limits import ApiKey, Gate
from medm.serving.listening import listen
from medm.serving.options import ServeOptions
from medm.serving.server import Server
from medm.serving.service import Service

KEY = "a-key-of-the-tests-0123456789"


@dataclass
class Live:
    """A running server."""

    service: Service
    gate: Gate
    server: Server
    url: str
    key: str | None

    def client(self, **options: Any) -> httpx.Client:
        """A client with the key."""
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **options)

    def chat(self, text: str = "What is seen?", **fields: Any) -> httpx.Response:
        """The response to one question."""
        with self.client() as client:
            return client.post("/v1/chat/completions", json=question(text, **fields))

    def idle(self) -> bool:
        """Whether all requests end within some seconds."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if not (self.service.worker.open or self.gate.bodies):
                return True
            time.sleep(0.01)
        return False


@contextmanager
def running(options: ServeOptions, *, key: str | None = KEY) -> Iterator[Live]:
    """A server that is ready."""
    options = options.model_copy(update={"port": 0, "device": "cpu"})
    with listen(options.host, options.port) as listener:
        service = Service.of(options)
        gate = build_app(service, key=None if key is None else ApiKey(key))
        server = Server(gate, options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        live = Live(service, gate, server, f"http://127.0.0.1:{listener.getsockname()[1]}", key)
        try:
            service.worker.wait_ready(120)
            yield live
        finally:
            server.should_exit = True
            thread.join(30)
        assert not thread.is_alive()
        assert not service.files.folder.exists()


def question(text: str = "What is seen?", *images: str, **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    content: Any = text
    if images:
        shown = [{"type": "image_url", "image_url": {"url": url}} for url in images]
        content = [*shown, {"type": "text", "text": text}]
    message = {"role": "user", "content": content}
    return {"model": "model", "messages": [message], "max_tokens": 6, **fields}


def png(seed: int = 0, *, size: tuple[int, int] = (20, 24)) -> bytes:
    """Noise in color."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def data_uri(content: bytes, media_type: str = "image/png") -> str:
    """The content in base64."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def code(response: httpx.Response) -> tuple[int, str]:
    """Status and code of an error, whose body has OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-medm-error"] == error["code"]
    return response.status_code, error["code"]


def upload(client: httpx.Client, path: Path) -> dict[str, Any]:
    """The answer to an upload."""
    response = client.post("/v1/files", files={"file": (path.name, path.read_bytes())})
    assert response.status_code == 200, response.text
    return response.json()
