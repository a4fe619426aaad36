"""Calls over HTTP: connections are kept, and several threads or tasks may call at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx2
from latentfarm_shared import __version__

from latentfarm.client.flows import UNREACHABLE, Call, Reply

TIMEOUT_S, LONG_S = 60.0, 600.0
CONNECTIONS = 32


def _options(url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    headers = {"user-agent": f"latentfarm/{__version__}"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
    return {
        "base_url": url,
        "headers": headers,
        "timeout": timeout_s,
        "limits": httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
        "follow_redirects": False,  # a key is for the farm that it was made at
    }


def _arguments(call: Call, data: bytes, usual_s: float) -> dict[str, Any]:
    found: dict[str, Any] = {"params": _query(call.query), "headers": dict(call.headers)}
    if call.is_long:
        found["timeout"] = httpx2.Timeout(usual_s, read=max(usual_s, LONG_S), write=max(usual_s, LONG_S))
    elif call.at_most_s is not None:
        found["timeout"] = min(usual_s, max(1.0, call.at_most_s))
    if call.json is not None:
        found["json"] = call.json
    if call.file_name is not None:
        found |= {"files": {"file": (call.file_name, data)}, "data": dict(call.form)}
    elif call.source is not None:
        found["content"] = data
    return found


def _query(values: Mapping[str, str | int | bool | None]) -> dict[str, str]:
    shown = {name: value for name, value in values.items() if value is not None}
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in shown.items()}


def _reply(answer: httpx2.Response) -> Reply:
    return Reply(answer.status_code, answer.content, {name.lower(): value for name, value in answer.headers.items()})


def _none(error: Exception, url: object) -> Reply:
    reason = str(error) or type(error).__name__
    return Reply(UNREACHABLE, f"{url} does not answer ({reason})".encode())


class Http:
    """Sends calls from threads."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float = TIMEOUT_S) -> None:
        """Connect lazily."""
        self._timeout_s = timeout_s
        self._client = httpx2.Client(**_options(url, api_key, timeout_s))

    def send(self, call: Call, data: bytes) -> Reply:
        """Send a call and return its answer; one of status 0 if there was none."""
        try:
            return _reply(self._client.request(call.method, call.path, **_arguments(call, data, self._timeout_s)))
        except httpx2.HTTPError as error:
            return _none(error, self._client.base_url)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


class AsyncHttp:
    """Sends calls from an event loop."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float = TIMEOUT_S) -> None:
        """Connect lazily."""
        self._timeout_s = timeout_s
        self._client = httpx2.AsyncClient(**_options(url, api_key, timeout_s))

    async def send(self, call: Call, data: bytes) -> Reply:
        """Send a call and return its answer; one of status 0 if there was none."""
        try:
            return _reply(await self._client.request(call.method, call.path, **_arguments(call, data, self._timeout_s)))
        except httpx2.HTTPError as error:
            return _none(error, self._client.base_url)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
