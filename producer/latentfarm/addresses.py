"""Somebody's addresses: taken apart, and connected to without being led into the farm's own network."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import httpcore2
from latentfarm_shared.errors import InvalidField


class PublicOnly(httpcore2.NetworkBackend):
    """Connects only to public addresses, unless private ones are allowed."""

    def __init__(self, *, allow_private: bool) -> None:
        """Connect to nothing yet."""
        self._inner, self._allow_private = httpcore2.SyncBackend(), allow_private

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
                f"{host} is a private address ({private[0]}); set LATENTFARM_ALLOW_PRIVATE_URLS=true to allow that",
            )
        return self._inner.connect_tcp(addresses[0], port, timeout, local_address, socket_options)


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
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidField("URL", "is no address") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        shown = url.partition("?")[0].rpartition("@")[2]
        raise InvalidField("URL", f"{shown[:100]!r} should be like https://host/file.safetensors")
    return parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80)
