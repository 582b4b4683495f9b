"""What every request passes before its body is read: host, key, state, number and size.

Refusals are answered without reading the body. Logs and figures name routes, sizes and times, never
content.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from sse_starlette.sse import SendTimeoutError
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medm.errors import MedmError
from medm.serving.errors import ServingError
from medm.serving.listening import require_own_host
from medm.serving.service import Service

logger = logging.getLogger(__name__)

KEY_VARIABLE = "MEDM_API_KEY"
UPLOAD = "/v1/files"
NOTICE_HEADER = ("x-medm-notice", "Not for clinical use")

_OPEN = frozenset({"/", "/health/live", "/health/ready"})
"""Paths that need no key."""
_BYTES_PER_SECOND = 2**16
"""Slowest body beyond the first seconds."""
_FORM_BYTES = 2**16
"""Of an upload beside its file: boundaries and fields of the form."""
_MIN_KEY = 16
_MAX_VALUES = 100_000
"""Of a JSON body, by its commas and brackets: parsed, 32 MiB of empty lists take 1 GiB."""
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 2**26
"""Of the body of a refused request that are discarded."""


class ApiKey:
    """The key of a server; only its hash is kept.

    Args:
        key: the key.
    """

    def __init__(self, key: str) -> None:
        self._hash = hashlib.sha256(key.encode()).digest()

    def __repr__(self) -> str:
        return "ApiKey(hidden)"

    def fits(self, authorization: str | None) -> bool:
        """Return true for the right `Bearer` header. The time does not depend on the difference."""
        scheme, _, given = (authorization or "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        return hmac.compare_digest(digest, self._hash) and scheme.lower() == "bearer"


def read_api_key(file: str | None) -> ApiKey | None:
    """Return the key of a file or of the environment; None without one.

    Raises:
        MedmError: the file cannot be read, or the key is empty or short.
    """
    source = f"--api-key-file {file}" if file is not None else KEY_VARIABLE
    if file is not None:
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise MedmError(f"{source}: cannot be read ({type(error).__name__})") from None
        key = lines[0].strip() if lines else ""
    elif KEY_VARIABLE in os.environ:
        key = os.environ[KEY_VARIABLE].strip()
    else:
        return None
    if len(key) < _MIN_KEY or not key.isascii() or " " in key:
        raise MedmError(
            f"{source}: expected a key of {_MIN_KEY} or more ASCII characters without blanks, for "
            "example of `openssl rand -hex 32`"
        )
    return ApiKey(key)


class Gate:
    """The outermost layer of the application (ASGI).

    Args:
        app: the routes.
        service: the server.
        key: that requests need; None for a server that only this machine can reach.
        routes: name of the route of a path, for figures.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        *,
        key: ApiKey | None,
        routes: Callable[[Scope], str],
    ) -> None:
        self.app, self.service, self.key, self.route_of = app, service, key, routes
        self.bodies = 0
        """Requests with a body that are being answered."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()

    def check(self, scope: Scope) -> None:
        """Refuse a request by its headers. Raises `ServingError`."""
        path, headers = scope["path"], Headers(scope=scope)
        if self.key is None:
            require_own_host(headers, protection="an API key")
        elif path not in _OPEN and not self.key.fits(headers.get("authorization")):
            raise ServingError(
                "invalid_api_key", "expected the header 'Authorization: Bearer KEY' with the key"
            )
        if scope["method"] != "POST" or not path.startswith("/v1/"):
            return
        if not path.endswith("/cancel"):
            self.service.worker.require_ready()
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        expected = "multipart/form-data" if path == UPLOAD else "application/json"
        if media_type != expected and not path.endswith("/cancel"):
            raise ServingError(
                "unsupported_type", f"expected a body of the content-type {expected}"
            )
        length = headers.get("content-length")
        if length is not None and int(length) > self.most(path):
            raise self.too_large(path)
        if self.bodies >= self.service.worker.capacity:
            raise ServingError(
                "queue_full",
                f"{self.bodies} requests are running or waiting, which is the limit; try again",
            )

    def most(self, path: str) -> int:
        """Return the most bytes of a body."""
        limits = self.service.options.limits
        return limits.max_file_bytes + _FORM_BYTES if path == UPLOAD else limits.max_body_bytes

    def too_large(self, path: str) -> ServingError:
        """Return the error of a body with more bytes."""
        return ServingError(
            "body_too_large", f"the body has more than the {self.most(path)} bytes that are taken"
        )


class _Exchange:
    """One request and its response."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self.gate, self.scope, self.receive, self.send = gate, scope, receive, send
        self.id = f"req-{secrets.token_hex(8)}"
        self.started = time.monotonic()
        self.received = self.sent = self.values = 0
        self.status: int | None = None
        self.code = ""
        headers = Headers(scope=scope)
        self.has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        self.complete = False
        """All of the body is received."""
        self.left = False
        """The client closed the connection before the response was complete."""
        self.ended = False
        """All of the response is sent."""
        self.refusal: ServingError | None = None

    async def run(self) -> None:
        gate, scope = self.gate, self.scope
        counted = False
        try:
            gate.check(scope)
            if scope["method"] == "POST":
                gate.bodies += 1
                counted = True
            await gate.app(scope, self._receive, self._send)
        except ServingError as error:
            await self._refuse(error)
        except SendTimeoutError:  # a client that does not read its stream
            self.left = True
        except Exception as error:  # noqa: BLE001 (a defect: the log names it without its text)
            logger.error("%s failed: %s", self.id, type(error).__name__)
            if self.status is None:
                await self._refuse(ServingError("internal_error", "a defect of the server"))
        finally:
            gate.bodies -= counted
            self._note()

    async def _receive(self) -> Message:
        """Return the next part of the body, if it comes in time and is not too long."""
        if self.complete:
            message = await self.receive()
        else:
            most_seconds = (
                self.gate.service.options.body_seconds + self.received / _BYTES_PER_SECOND
            )
            left = self.started + most_seconds - time.monotonic()
            try:
                message = await asyncio.wait_for(self.receive(), max(left, 0.0))
            except TimeoutError:
                self.refusal = ServingError(
                    "body_timeout",
                    f"the body did not come within {most_seconds:.0f} s; send it faster",
                )
                raise self.refusal from None
        if message["type"] == "http.disconnect":
            self.left = not self.ended
            return message
        self.received += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        if self.received > self.gate.most(self.scope["path"]):
            self.refusal = self.gate.too_large(self.scope["path"])
            raise self.refusal
        if self.scope["path"] != UPLOAD:
            body = message.get("body", b"")
            self.values += sum(body.count(mark) for mark in (b",", b"[", b"{"))
            if self.values > _MAX_VALUES:
                self.refusal = ServingError(
                    "body_too_large",
                    f"the body has more than {_MAX_VALUES:,} commas and brackets",
                )
                raise self.refusal
        return message

    async def _send(self, message: Message) -> None:
        """Pass on the response. A refusal takes the place of what a parser makes of it."""
        if self.refusal is not None:
            if self.status is None:
                await self._refuse(self.refusal)
            return
        await self._pass_on(message)

    async def _pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(raw=message["headers"])
            headers["x-request-id"] = self.id
            headers[NOTICE_HEADER[0]] = NOTICE_HEADER[1]
            headers["x-content-type-options"] = "nosniff"
            self.code = headers.get("x-medm-error", "")
            message["headers"] = headers.raw
            if self.has_body and not self.complete:
                headers["connection"] = "close"
        else:
            self.sent += len(message.get("body", b""))
            if not message.get("more_body", False):
                if self.has_body and not self.complete:
                    await self.send({**message, "more_body": True})
                    await self._linger()
                    message = {"type": "http.response.body", "body": b""}
                self.ended = True
        await self.send(message)

    async def _linger(self) -> None:
        """Discard the rest of a body for a moment: a connection that is closed amid it is reset,
        and the client may never see the response.
        """
        if self.code == "body_timeout":
            return
        end, left = time.monotonic() + _LINGER_SECONDS, _LINGER_BYTES
        while left > 0 and (seconds := end - time.monotonic()) > 0:
            try:
                message = await asyncio.wait_for(self.receive(), seconds)
            except TimeoutError:
                return
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return
            left -= len(message.get("body", b""))

    async def _refuse(self, error: ServingError) -> None:
        if self.status is not None:
            return
        body = json.dumps(error.body()).encode()
        headers = {
            **error.headers,
            "content-type": "application/json",
            "content-length": str(len(body)),
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        start = {"type": "http.response.start", "status": error.status, "headers": raw}
        await self._pass_on(start)
        await self._pass_on({"type": "http.response.body", "body": body})

    def _note(self) -> None:
        """Write the line of the log and count the request."""
        status = 499 if self.left or self.status is None else self.status
        seconds = time.monotonic() - self.started
        route = self.gate.route_of(self.scope)
        metrics = self.gate.service.metrics
        metrics.requests.labels(route, status).inc()
        metrics.seconds.labels(route).observe(seconds)
        level = logging.DEBUG if route.startswith("/health") else logging.INFO
        logger.log(
            level,
            "%s %s %s %d%s in %d B out %d B %.3f s",
            self.id,
            self.scope["method"],
            route,
            status,
            f" {self.code}" if self.code else "",
            self.received,
            self.sent,
            seconds,
        )
