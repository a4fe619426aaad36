"""Somebody's addresses: taken apart, and connected to without being led into the farm's own network."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import httpcore2
from latentfarm_shared.errors import InvalidField


class PublicOnly(httpcore2.NetworkBackend):
    """Connects only to public addresses, unless private ones are allowed."""

    def __init__(self, *, allow_private: bool, total_s: float | None = None) -> None:
        """Connect to nothing yet; a connection may last for `total_s` seconds, however little at a time it brings."""
        self._inner, self._allow_private, self._total_s = httpcore2.SyncBackend(), allow_private, total_s

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        """Resolve the name once, check every address it has, and connect to the first."""
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore2.ConnectError(f"{host} cannot be resolved") from error
        addresses = [str(answer[4][0]) for answer in answers]
        private = [address for address in addresses if not is_public(address)]
        if private and not self._allow_private:
            raise InvalidField(
                "URL",
                f"{host} is a private address; set LATENTFARM_ALLOW_PRIVATE_URLS=true to allow that",
            )
        stream = self._inner.connect_tcp(addresses[0], port, timeout, local_address, socket_options)
        return stream if self._total_s is None else _Hurried(stream, time.monotonic() + self._total_s)


class _Hurried(httpcore2.NetworkStream):
    """A connection whose time is bounded as a whole."""

    def __init__(self, inner: httpcore2.NetworkStream, until: float) -> None:
        self._inner, self._until = inner, until

    def _left(self, timeout: float | None) -> float:
        left = self._until - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout("the whole took too long")
        return left if timeout is None else min(left, timeout)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read within the time that is left."""
        return self._inner.read(max_bytes, self._left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write within the time that is left."""
        self._inner.write(buffer, self._left(timeout))

    def close(self) -> None:
        """Close it."""
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        """Speak TLS from now on, within the same time."""
        return _Hurried(self._inner.start_tls(ssl_context, server_hostname, self._left(timeout)), self._until)

    def get_extra_info(self, info: str) -> Any:
        """Return what is known of the connection."""
        return self._inner.get_extra_info(info)


def is_public(address: str) -> bool:
    """Tell whether an IP address is one of the open internet, also if an IPv4 address is written into it."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    inner = _embedded(parsed) if isinstance(parsed, ipaddress.IPv6Address) else None
    if inner is not None:
        return is_public(str(inner))
    closed = parsed.is_multicast or (isinstance(parsed, ipaddress.IPv6Address) and parsed.is_site_local)
    return (
        parsed.is_global
        and not closed
        and not any(parsed in net for net in _TRANSLATED if net.version == parsed.version)
    )


_TRANSLATED = (ipaddress.ip_network("64:ff9b:1::/48"), ipaddress.ip_network("2001::/32"))  # local NAT64, Teredo
_CARRIES_IPV4 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96"))  # NAT64, IPv4-compatible


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that an IPv6 address leads to, if it does."""
    if address in (ipaddress.IPv6Address("::"), ipaddress.IPv6Address("::1")):
        return None
    if any(address in network for network in _CARRIES_IPV4):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def origin(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port of an address; credentials go to one of these and no other.

    Raises:
        InvalidField: it is no http address.
    """
    if not url.isascii():
        raise InvalidField("URL", "should be written in ASCII: a name as xn--…, other characters as %XX")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidField("URL", "is no address") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        shown = url.partition("?")[0].rpartition("@")[2]
        raise InvalidField("URL", f"{shown[:100]!r} should be like https://host/file.safetensors")
    return parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80)
