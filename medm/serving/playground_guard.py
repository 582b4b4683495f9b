"""What every request of the playground passes first: host, origin, password, path and body.

The content security policy keeps a page from asking any other host, whatever its parts try.
gradio's routes that a page does not need are closed: some send files of the server, or ask other
hosts in the name of a page.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medm.errors import MedmError
from medm.serving.errors import ServingError
from medm.serving.listening import require_own_host

_MIN_PASSWORD = 8
_POLICY = "; ".join(
    (
        # gradio starts by scripts inside its page and compiles templates of components.
        "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'",
        "frame-ancestors 'none'",
        "form-action 'self'",
        "base-uri 'self'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-dns-prefetch-control": "off",
    "x-medm-notice": "Not for clinical use",
}


_POSTED = re.compile(r"/gradio_api/(queue/join|cancel|reset|upload)/?")
"""Paths that take what a page sends."""
_UPLOAD = re.compile(r"/gradio_api/upload/?")
_CLOSED = re.compile(r"/(file|proxy)=|/gradio_api/(file/|deep_link|stream/)")
"""Paths that give files of gradio's folders, or anything of another host."""
_MAX_BODY = 2**20
"""Bytes of an event; uploads have a path of their own."""


class Passwords:
    """Users and passwords of a page; only hashes are kept.

    Args:
        lines: `user:password` each.
    """

    def __init__(self, lines: list[str]) -> None:
        self._hashes = [_hash(line.encode()) for line in lines]

    def __repr__(self) -> str:
        return f"Passwords({len(self._hashes)} hidden)"

    def fits(self, authorization: str | None) -> bool:
        """Return true for the right `Basic` header. The time does not depend on the difference."""
        scheme, _, given = (authorization or "").partition(" ")
        try:
            decoded = base64.b64decode(given.strip(), validate=True)
        except (binascii.Error, ValueError):
            return False
        found = [hmac.compare_digest(_hash(decoded), one) for one in self._hashes]
        return any(found) and scheme.lower() == "basic"


def _hash(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def read_passwords(file: str) -> Passwords:
    """Return the users of a file.

    Raises:
        MedmError: the file cannot be read, a line is no `user:password`, or a password is short.
    """
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MedmError(f"--auth-file {file}: cannot be read ({type(error).__name__})") from None
    users = {number: line.strip() for number, line in enumerate(lines, start=1) if line.strip()}
    for number, line in users.items():
        user, _, password = line.partition(":")
        if not user or len(password) < _MIN_PASSWORD:
            raise MedmError(
                f"--auth-file {file}, line {number}: expected user:password, with a password of "
                f"{_MIN_PASSWORD} or more characters"
            )
    if not users:
        raise MedmError(f"--auth-file {file}: expected lines user:password, found none")
    return Passwords(list(users.values()))


class Guard:
    """The outermost layer of the page (ASGI).

    Args:
        app: the page.
        passwords: that requests need; None for a page that only this machine can reach.
    """

    def __init__(self, app: ASGIApp, passwords: Passwords | None) -> None:
        self.app, self.passwords = app, passwords

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                for name, value in _HEADERS.items():
                    headers[name] = value
                message["headers"] = headers.raw
            await send(message)

        refusal = self._refusal(Headers(scope=scope)) or _closed(scope)
        if refusal is None and scope["method"] == "POST" and not _UPLOAD.fullmatch(scope["path"]):
            body = await _body(receive)
            refusal, receive = _refused_body(body), _replay(body, receive)
        await (refusal or self.app)(scope, receive, send_guarded)

    def _refusal(self, headers: Headers) -> PlainTextResponse | None:
        """Return the response to a request that is refused."""
        if self.passwords is None:
            try:
                require_own_host(headers, protection="a password")
            except ServingError as error:
                return PlainTextResponse(str(error), error.status)
        elif not self.passwords.fits(headers.get("authorization")):
            asked = {"www-authenticate": 'Basic realm="medm playground", charset="UTF-8"'}
            return PlainTextResponse("user and password are needed", 401, headers=asked)
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != headers.get("host", "").lower():
            # Browsers send passwords with requests of pages of any site.
            return PlainTextResponse("the header Origin names another site", 403)
        return None


def _netloc(origin: str) -> str:
    """Return host and port of an origin; "" where it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _closed(scope: Scope) -> PlainTextResponse | None:
    """Return the response to a path that no page needs."""
    path = scope["path"]
    if scope["method"] in ("GET", "HEAD"):
        is_open = not (_CLOSED.search(path) or _CLOSED.search(unquote(path)))
    else:
        is_open = scope["method"] == "POST" and _POSTED.fullmatch(path) is not None
    return None if is_open else PlainTextResponse("not found", 404)


async def _body(receive: Receive) -> bytes:
    """Return the body of a request, or its first bytes, one more than are taken."""
    body, more = bytearray(), True
    while more and len(body) <= _MAX_BODY:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body[: _MAX_BODY + 1])


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body once, and then what comes after it."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay


def _refused_body(body: bytes) -> PlainTextResponse | None:
    """Return the response to an event that is too large, or names files of other hosts."""
    if len(body) > _MAX_BODY:
        return PlainTextResponse(f"expected an event of at most {_MAX_BODY} bytes", 413)
    try:
        sent = [json.loads(body)]
    except (ValueError, RecursionError):
        return PlainTextResponse("expected JSON", 400)
    while sent:
        one = sent.pop()
        if isinstance(one, dict):
            if _is_address(one.get("path")):  # gradio downloads it
                return PlainTextResponse("files of other hosts are not taken", 400)
            sent += one.values()
        elif isinstance(one, list):
            sent += one
    return None


def _is_address(path: object) -> bool:
    return isinstance(path, str) and path.strip().lower().startswith(("http:", "https:"))
