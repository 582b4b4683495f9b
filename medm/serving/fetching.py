"""Images from hosts that an option names: public addresses, no redirects, bounded in size."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit

from medm.serving.errors import ServingError

_SECONDS = 5.0
_CHUNK = 2**16


def is_public(address: str) -> bool:
    """Return true for an address of the public internet: not private, loopback or link-local."""
    ip = ipaddress.ip_address(address)
    mapped = getattr(ip, "ipv4_mapped", None)
    ip = ip if mapped is None else mapped
    return ip.is_global and not ip.is_multicast


class Fetcher:
    """Fetches images by URL.

    Args:
        hosts: exact names of hosts, in small letters; others are refused.
        max_bytes: of an image.
        allowed: says if an address may be connected to.
    """

    def __init__(
        self,
        hosts: frozenset[str],
        *,
        max_bytes: int,
        allowed: Callable[[str], bool] = is_public,
    ) -> None:
        self.hosts, self.max_bytes, self.allowed = hosts, max_bytes, allowed

    def fetch(self, url: str, *, param: str | None = None) -> bytes:
        """Return the content of a URL.

        The name is resolved once, and the address that was checked is the one that is connected to.

        Raises:
            ServingError: a host that is not allowed, a private address, a redirect or another
                status than 200, too large, or too slow.
        """
        parts = self._checked(url, param)
        try:
            return self._read(parts, param)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServingError(
                "source_refused",
                f"the URL could not be fetched ({type(error).__name__}); send the image as a data "
                "URI",
                param=param,
            ) from None

    def _checked(self, url: str, param: str | None) -> SplitResult:
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError:
            raise ServingError("source_refused", "not a URL", param=param) from None
        host = (parts.hostname or "").lower()
        plain = parts.username is None and parts.password is None
        if parts.scheme not in ("http", "https") or host not in self.hosts or not plain:
            allowed = ", ".join(sorted(self.hosts)) or "none"
            raise ServingError(
                "source_refused",
                f"this server fetches no such URL (hosts allowed: {allowed}); send the image as a "
                "data URI, or upload it to /v1/files and give its id",
                param=param,
            )
        if not url.isascii() or any(ord(letter) <= 32 for letter in url):
            raise ServingError("source_refused", "a URL has no blanks or letters beyond ASCII")
        return parts

    def _read(self, parts: SplitResult, param: str | None) -> bytes:
        host = str(parts.hostname)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        end = time.monotonic() + _SECONDS
        addresses = {
            str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        }
        if not addresses or not all(self.allowed(address) for address in addresses):
            raise ServingError(
                "source_refused", "the host has a private address, which is refused", param=param
            )
        connection = _Pinned(host, port, sorted(addresses)[0], tls=parts.scheme == "https")
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "Connection": "close"})
            response = connection.getresponse()
            if response.status != 200:
                raise ServingError(
                    "source_refused",
                    f"the URL answers status {response.status}; redirects are not followed",
                    param=param,
                )
            content = bytearray()
            while chunk := response.read(_CHUNK):
                content += chunk
                if len(content) > self.max_bytes:
                    raise ServingError(
                        "body_too_large",
                        f"the image is larger than the {self.max_bytes} bytes that are taken",
                        param=param,
                    )
                if time.monotonic() > end:
                    raise TimeoutError
            return bytes(content)
        finally:
            connection.close()


class _Pinned(http.client.HTTPConnection):
    """A connection to an address that was checked, under the name of its host."""

    def __init__(self, host: str, port: int, address: str, *, tls: bool) -> None:
        super().__init__(host, port, timeout=_SECONDS)
        self._address, self._tls = address, tls

    def connect(self) -> None:
        """Connect to the address; with TLS, the certificate must be of the host."""
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._tls:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self.host)
