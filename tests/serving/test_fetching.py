"""URLs: exact hosts, public addresses that are checked before the connection, no redirects."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from medm.serving.errors import ServingError
from medm.serving.fetching import Fetcher, is_public
from medm.serving.images import of_url
from medm.serving.options import ServeOptions
from tests.serving.live import png


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


class _Images(BaseHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("location", "/image.png")
            self.end_headers()
            return
        content = png() if self.path.startswith("/image") else bytes(100_000)
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), _Images)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of the tests lead to this machine."""
    own = socket.getaddrinfo

    def getaddrinfo(host: str, *rest: Any, **named: Any) -> Any:
        host = "127.0.0.1" if host == "images.example.org" else host
        return own(host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


HOSTS = frozenset({"images.example.org"})


def test_an_image_of_a_listed_host(port: int) -> None:
    fetcher = Fetcher(HOSTS, max_bytes=50_000, allowed=lambda address: address == "127.0.0.1")
    url = f"http://images.example.org:{port}"
    assert of_url(f"{url}/image.png?a=b", fetcher, param="x").content == png()
    for path, code in (("/moved", "source_refused"), ("/large", "body_too_large")):
        _Images.asked.clear()
        with pytest.raises(ServingError) as refused:
            fetcher.fetch(url + path)
        assert refused.value.code == code
        assert _Images.asked == [path], "a redirect is not followed"


def test_a_listed_host_with_a_private_address_is_not_asked(port: int) -> None:
    _Images.asked.clear()
    with pytest.raises(ServingError, match="private address"):
        Fetcher(HOSTS, max_bytes=50_000).fetch(f"http://images.example.org:{port}/image.png")
    assert not _Images.asked


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/image.png",
        "http://sub.images.example.org/image.png",
        "http://images.example.org.evil.com/image.png",
        "http://images.example.org@evil.com/image.png",
        "http://user:word@images.example.org/image.png",
        "ftp://images.example.org/image.png",
        "http://images.example.org:99999/image.png",
        "http://[::1/image.png",
        "http://images.example.org/a b",
        "http://images.example.org/\r\nHost: evil",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ServingError) as refused:
        Fetcher(HOSTS, max_bytes=50_000, allowed=lambda address: True).fetch(url)
    assert refused.value.code == "source_refused"


@pytest.mark.parametrize("hosts", ["*.example.org", "http://example.org", "localhost", "a.b:80"])
def test_hosts_are_exact_names(hosts: str) -> None:
    with pytest.raises(ValueError, match="exact host names"):
        ServeOptions(model="m", allow_hosts=f"images.example.org,{hosts}")
    options = ServeOptions(model="m", allow_hosts="Images.example.org, b.example.org")
    assert options.hosts == {"images.example.org", "b.example.org"}
