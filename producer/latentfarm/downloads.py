"""Fetch a file from somebody's address without being led into the farm's own network.

Every connection, of the first address and of every redirect, is made to an IP address that was checked, so a name that
resolves anew changes nothing. Credentials go to the host they are for and to no other.
"""

from __future__ import annotations

import ssl
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import httpcore2
from latentfarm_shared.errors import Unavailable, UnreadableFile

from latentfarm.addresses import PublicOnly, origin

USER_AGENT = "latentfarm (+https://pypi.org/project/latentfarm)"
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 5
CONNECT_S, READ_S, TOTAL_S = 10.0, 20.0, 300.0
RETRIES = 4
MAX_TRIES_S = 60.0
_NETWORK = (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError)


@dataclass(frozen=True)
class Fetched:
    """An answer: its body as a file that is deleted when its context ends, and what the server said of it."""

    path: Path
    url: str
    content_type: str
    file_name: str


class Downloader:
    """Fetches files up to `max_bytes`."""

    def __init__(self, *, max_bytes: int, allow_private: bool = False) -> None:
        """Connect to nothing yet."""
        self._max_bytes = max_bytes
        self._pool = httpcore2.ConnectionPool(
            ssl_context=ssl.create_default_context(), network_backend=PublicOnly(allow_private=allow_private)
        )

    @contextmanager
    def fetch(self, url: str, token: str | None = None, suffix: str = "") -> Iterator[Fetched]:
        """Fetch an address to a temporary file; what was cut off goes on where it ended.

        `token` goes to the address's own host alone.

        Raises:
            InvalidField: the address is none, or private.
            UnreadableFile: the server refuses, or the file is too large.
            Unavailable: the server does not answer, or asks to wait for longer than we do.
        """
        with tempfile.TemporaryDirectory(prefix="latentfarm-fetch-") as folder:
            path = Path(folder) / f"file{suffix}"
            yield self._to_file(url, path, token)

    def get(self, url: str, token: str | None = None) -> tuple[int, bytes]:
        """Return status and body of a small answer; errors as `fetch`, but for those of the server."""
        began, body = time.monotonic(), bytearray()
        try:
            with self._answer(url, self._headers(token)) as (_, response):
                for part in response.iter_stream():
                    body += part
                    self._refuse_endless(len(body), began)
                return response.status, bytes(body)
        except _NETWORK as error:
            raise Unavailable(origin(url)[1], type(error).__name__, "try again later") from error

    def _refuse_endless(self, size: int, began: float) -> None:
        """Leave a body that is too large or comes too slowly."""
        if size > self._max_bytes:
            raise UnreadableFile(
                "download", f"TOO_LARGE: more than {self._max_bytes // 2**20} MB; embeddings are small"
            )
        if time.monotonic() - began > TOTAL_S:
            raise Unavailable("download", f"slower than {TOTAL_S:.0f} s", "try again later")

    @staticmethod
    def _headers(token: str | None) -> dict[str, str]:
        return {"User-Agent": USER_AGENT, "Accept": "*/*"} | ({"Authorization": f"Bearer {token}"} if token else {})

    def _to_file(self, url: str, path: Path, token: str | None) -> Fetched:
        """Fetch with a few tries; a try that brought something goes on where the last one ended."""
        began, pause, failure, tag = time.monotonic(), 0.5, "no answer", ""
        for _ in range(RETRIES):
            have = path.stat().st_size if path.exists() else 0
            part = {"Range": f"bytes={have}-"} | ({"If-Range": tag} if tag else {})
            try:
                with self._answer(url, self._headers(token) | (part if have else {})) as (final, response):
                    wait = _retry_after(response)
                    if wait is None:
                        etag = _header(response, "etag")
                        tag = "" if etag.startswith("W/") else etag
                        self._save(response, path, have, began)
                        return _described(path, final, response)
                    failure = f"answered {response.status}"
            except _NETWORK as error:
                wait, failure = pause, type(error).__name__
            if time.monotonic() - began + wait > MAX_TRIES_S:
                raise Unavailable(urlsplit(url).hostname or url, failure, f"try again in {wait:.0f} s")
            time.sleep(wait)
            pause *= 2
        raise Unavailable(urlsplit(url).hostname or url, failure, "try again later")

    def _save(self, response: httpcore2.Response, path: Path, have: int, began: float) -> None:
        """Append the body where it belongs: a server that ignores the range sends everything again."""
        _refuse_status(response, path)
        start = _range_start(response) if response.status == 206 else 0
        if start not in (0, have):
            path.unlink(missing_ok=True)
            raise httpcore2.ReadError("the server sent another part than was asked for")
        length = _header(response, "content-length")
        expected = start + int(length) if length.isdecimal() else None
        self._refuse_endless(expected or 0, began)
        with path.open("r+b" if start else "wb") as file:
            file.seek(start)
            file.truncate()
            for part in response.iter_stream():
                file.write(part)
                self._refuse_endless(file.tell(), began)
        if expected is not None and path.stat().st_size < expected:
            raise httpcore2.ReadError("the body ended early")

    @contextmanager
    def _answer(self, url: str, headers: Mapping[str, str]) -> Iterator[tuple[str, httpcore2.Response]]:
        """Ask, following redirects; credentials stay with the host they were given for."""
        first = origin(url)
        for _ in range(MAX_REDIRECTS + 1):
            at = origin(url)
            sent = [(k, v) for k, v in headers.items() if k != "Authorization" or at == first]
            timeout = {"connect": CONNECT_S, "read": READ_S, "write": READ_S, "pool": READ_S}
            try:
                with self._pool.stream("GET", url, headers=sent, extensions={"timeout": timeout}) as response:
                    if response.status not in REDIRECTS:
                        yield url, response
                        return
                    target = _header(response, "location")
            except httpcore2.ConnectError as error:
                raise Unavailable(at[1], f"no answer ({error})", "check the address") from error
            url = urljoin(url, target)
            if at[0] == "https" and origin(url)[0] != "https":
                raise UnreadableFile(at[1], "redirects from https to an address anybody can listen to")
        raise UnreadableFile(first[1], "is redirected again and again")


def _header(response: httpcore2.Response, name: str) -> str:
    found = next((value for key, value in response.headers if key.lower() == name.encode()), b"")
    return found.decode("latin-1")


def _retry_after(response: httpcore2.Response) -> float | None:
    """Return how many seconds to wait before another try; None if the answer is final."""
    if response.status != 429 and response.status < 500:
        return None
    text = _header(response, "retry-after")
    return float(text) if text.isdecimal() else 1.0


def _range_start(response: httpcore2.Response) -> int:
    text = _header(response, "content-range").removeprefix("bytes ").partition("-")[0]
    return int(text) if text.isdecimal() else -1


def _refuse_status(response: httpcore2.Response, path: Path) -> None:
    if response.status in (200, 206):
        return
    if response.status == 416:  # what we have is not a beginning of what they have
        path.unlink(missing_ok=True)
        raise httpcore2.ReadError("the server does not know the part asked for")
    meanings = {
        401: "it wants a token; set LATENTFARM_CIVITAI_TOKEN if this is Civitai",
        403: "it refuses access (early access, or a token without the right)",
        404: "there is nothing at this address",
        410: "it was archived",
    }
    raise UnreadableFile(
        "download", f"the server answers {response.status}: {meanings.get(response.status, 'refused')}"
    )


def _described(path: Path, url: str, response: httpcore2.Response) -> Fetched:
    disposition = _header(response, "content-disposition")
    _, _, name = disposition.partition("filename*=UTF-8''")
    name = unquote(name.partition(";")[0])
    if not name:
        name = (
            disposition.partition("filename=")[2]
            .partition(";")[0]
            .strip(' "')
            .encode("latin-1")
            .decode(errors="replace")
        )
    name = Path(name or unquote(urlsplit(url).path)).name
    return Fetched(path, url, _header(response, "content-type"), name)
