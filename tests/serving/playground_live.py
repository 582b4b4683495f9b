"""A page of the playground on a port of this machine, in a thread, and requests of its events."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from medm.serving.listening import listen, url_of
from medm.serving.options import Limits
from medm.serving.playground import Application, application, server_of
from medm.serving.playground_options import PlaygroundOptions
from tests.models import plain_head

TOKENS = 4


@dataclass
class LivePage:
    """A page that is served."""

    url: str
    app: Application

    def config(self) -> dict[str, Any]:
        """Components and events of the page, as a browser gets them."""
        return httpx.get(f"{self.url}/config", timeout=60).json()

    def join(self, client: str, element: str, value: Callable[[dict[str, Any]], Any]) -> Any:
        """The response to the event of a component, which is put into the queue.

        Args:
            client: name of the open page.
            element: the component.
            value: gives the value of an input, by its description.
        """
        config = self.config()
        parts = {part["id"]: part for part in config["components"]}
        (event,) = (
            one
            for one in config["dependencies"]
            if any(parts.get(target, {}).get("props", {}).get("elem_id") == element
                   for target, _ in one["targets"])
        )  # fmt: skip
        body = {
            "session_hash": client,
            "fn_index": event["id"],
            "data": [value(parts[number]) for number in event["inputs"]],
        }
        return httpx.post(f"{self.url}/gradio_api/queue/join", json=body, timeout=60)

    def results(self, client: str) -> list[dict[str, Any]]:
        """All messages to an open page until its events have ended."""
        return list(self.messages(client))

    def messages(self, client: str) -> Iterator[dict[str, Any]]:
        """The same, one by one as they come."""
        address = f"{self.url}/gradio_api/queue/data?session_hash={client}"
        with httpx.stream("GET", address, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data:"):
                    message = json.loads(line[5:])
                    yield message
                    if message["msg"] == "close_stream":
                        break


@contextmanager
def live_page(*models: Path) -> Iterator[LivePage]:
    """A page of some models."""
    limits = Limits(max_new_tokens=TOKENS, max_voxels=100_000)
    options = PlaygroundOptions(
        models=[str(model) for model in models], port=0, device="cpu", limits=limits
    )
    with (
        plain_head.registered(),
        listen(options.host, 0) as listener,
        application(options) as app,
    ):
        server = server_of(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield LivePage(url_of(listener, options.host), app)
        finally:
            server.stop()
            thread.join(30)
