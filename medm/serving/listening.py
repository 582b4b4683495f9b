"""Addresses that a server listens on, and requests that a server without a password takes."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import uvicorn

from medm.errors import DeviceError
from medm.serving.errors import ServingError

OWN_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
"""Names of this machine that no other machine can reach."""

SWEEP_TICKS = 600
"""Ticks, a tenth of a second each, between two searches for expired files."""

_BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises `DeviceError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise DeviceError(
            f"{host}:{port}: cannot listen there ({error.strerror}); choose another --port"
        ) from None


def quiet_config(app: Any, **settings: Any) -> uvicorn.Config:
    """Return the settings of a server that logs no request and trusts no proxy.

    Args:
        app: ASGI.
        settings: more of them.
    """
    return uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        **settings,
    )


def url_of(listener: socket.socket, host: str) -> str:
    """Return the address of a socket for people."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def require_own_host(headers: Mapping[str, str], *, protection: str) -> None:
    """Refuse requests of web pages of others, where nothing protects the server.

    A page of any site can send forms to this machine, and a name of its own can lead here.

    Args:
        headers: of the request.
        protection: what the server lacks: "an API key".

    Raises:
        ServingError: "host_refused".
    """
    for name, place in (
        ("host", "//" + headers.get("host", "")),
        ("origin", headers.get("origin")),
    ):
        if place is None:
            continue
        try:
            found = urlsplit(place).hostname
        except ValueError:
            found = None
        if found not in OWN_HOSTS:
            raise ServingError(
                "host_refused",
                f"the header {name.title()} names another machine; without {protection} the server "
                "answers programs of this machine alone",
            )
