"""Addresses and Civitai, against a server that behaves as badly as the real ones."""

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpcore2
import numpy as np
import pytest
from latentfarm import addresses, downloads
from latentfarm.addresses import is_public
from latentfarm.civitai import is_civitai
from latentfarm.downloads import Downloader
from latentfarm.farm import DirectFarm
from latentfarm_demo import CHECKPOINT
from latentfarm_shared.errors import FarmError, InvalidField, Unavailable, UnreadableFile
from safetensors.numpy import save

DATA = save({"emb_params": np.arange(4 * 128, dtype=np.float32).reshape(4, 128)})
NEGATIVE = save({"emb_params": np.full((2, 128), 0.5, np.float32)})
TOKEN = "secret-token"
Answer = Callable[[BaseHTTPRequestHandler], None]


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def as_json(handler: BaseHTTPRequestHandler, value: Any, status: int = 200) -> None:
    reply(handler, status, json.dumps(value).encode(), Content_Type="application/json")


def _not_found(handler: BaseHTTPRequestHandler) -> None:
    as_json(handler, {"error": "Not Found"}, 404)


class Site:
    """A server whose answers are set by path; it keeps every request's path and headers."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.seen.append((self.path, dict(self.headers)))
                path = self.path.partition("?")[0]
                site.answers.get(path, _not_found)(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def serve(self, path: str, body: bytes = DATA, status: int = 200, **headers: str) -> None:
        self.answers[path] = lambda handler: reply(handler, status, body, **headers)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


@pytest.fixture
def store(site: Site) -> Iterator[Site]:
    """A second host, as the site's downloads are redirected to; it refuses whoever shows the site's token."""
    store = Site()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.headers["Authorization"]:
            reply(handler, 400, b"<Error>Only one auth mechanism allowed</Error>")
        else:
            reply(handler, 200, DATA, Content_Disposition='attachment; filename="EasyTest-1.safetensors"')

    store.answers["/presigned"] = answer
    yield store
    store.close()


def version(site: Site, **changes: Any) -> dict[str, Any]:
    sha256 = hashlib.sha256(DATA).hexdigest().upper()
    file = {
        "id": 1, "name": "EasyTest-1.safetensors", "type": "Model", "sizeKB": 2,
        "metadata": {"format": "SafeTensor"}, "hashes": {"SHA256": sha256, "AutoV2": sha256[:10]},
        "pickleScanResult": "Success", "virusScanResult": "Success",
        "downloadUrl": "https://civitai.com/api/download/models/9208?type=Model",
    }  # fmt: skip
    found = {
        "id": 9208, "modelId": 7808, "name": "v1", "baseModel": "SD 1.5", "trainedWords": ["easytest"],
        "air": "urn:air:sd1:embedding:civitai:7808@9208", "model": {"name": "EasyTest", "type": "TextualInversion"},
        "files": [file | changes.pop("file", {})], "images": [{"url": f"{site.url}/picture.png", "type": "image"}],
    }  # fmt: skip
    return found | changes


@pytest.fixture
def civitai(servers: DirectFarm, site: Site, store: Site) -> DirectFarm:
    """A farm that takes `site` for Civitai; its downloads are redirected to `store`."""
    servers.models.add(CHECKPOINT, "demo")
    changes = {"civitai_url": site.url, "civitai_token": TOKEN, "allow_private_urls": True}
    farm = DirectFarm(servers.settings.model_copy(update=changes))
    for record in farm.embeddings.ls():
        farm.embeddings.rm(record.name, force=True)
    site.answers["/api/v1/model-versions/9208"] = lambda h: as_json(h, version(site))
    site.serve("/api/download/models/9208", b"", 307, Location=f"{store.url}/presigned?signature=x")
    return farm


@pytest.mark.parametrize(
    "source",
    [
        "civitai:9208",
        "civitai:7808@9208",
        "urn:air:sd1:embedding:civitai:7808@9208",
        "{url}/models/7808?modelVersionId=9208",
        "{url}/models/7808/easy-test?modelVersionId=9208",
        "https://civitai.com/models/7808?modelVersionId=9208",
        "https://civitai.com/api/download/models/9208",
    ],
)
def test_version_is_taken_by_id_page_and_air(civitai: DirectFarm, site: Site, store: Site, source: str) -> None:
    record = civitai.embeddings.add(source.format(url=site.url))

    (told,) = civitai.library.sources(record.content_id)
    assert (record.name, record.vectors, record.kind) == ("EasyTest-1", 4, "Model")
    assert told.link == "https://civitai.com/models/7808?modelVersionId=9208"
    assert (told.trained_words, told.base_model) == (("easytest",), "SD 1.5")
    assert told.air == "urn:air:sd1:embedding:civitai:7808@9208"
    api = [headers for path, headers in site.seen if path.startswith("/api/")]
    assert all(headers["Authorization"] == f"Bearer {TOKEN}" for headers in api)
    assert all("latentfarm" in headers["User-Agent"] for headers in api)
    assert not any("Authorization" in headers for _, headers in store.seen)
    assert TOKEN not in str(told)


def test_page_without_a_version_gives_the_newest_and_hashes_are_looked_up(civitai: DirectFarm, site: Site) -> None:
    newest = version(site)
    page = {"id": 7808, "name": "EasyTest", "type": "TextualInversion", "modelVersions": [newest, newest | {"id": 1}]}
    site.answers["/api/v1/models/7808"] = lambda h: as_json(h, page)
    digest = hashlib.sha256(DATA).hexdigest()
    site.answers[f"/api/v1/model-versions/by-hash/{digest[:10].upper()}"] = lambda h: as_json(h, newest)

    assert civitai.embeddings.add(f"{site.url}/models/7808/easy").name == "EasyTest-1"
    assert civitai.embeddings.add(f"civitai:{digest[:10]}").name == "EasyTest-1"


def test_positive_and_negative_files_of_a_version_are_both_taken(civitai: DirectFarm, site: Site) -> None:
    found = version(site)
    pickled = found["files"][0] | {"name": "EasyTest-1.pt", "metadata": {"format": "PickleTensor"}}
    other = found["files"][0] | {
        "type": "Negative", "name": "EasyTest-neg.safetensors", "downloadUrl": f"{site.url}/negative",
        "hashes": {"SHA256": hashlib.sha256(NEGATIVE).hexdigest()},
    }  # fmt: skip
    found["files"] = [pickled, *found["files"], other, found["files"][0] | {"type": "Training Data"}]
    site.answers["/api/v1/model-versions/9208"] = lambda h: as_json(h, found)
    site.serve("/negative", NEGATIVE)

    taken = civitai.embeddings.add_all("civitai:9208")

    assert [(r.name, r.kind) for t in taken for r in t.records] == [
        ("EasyTest-1", "Model"),
        ("EasyTest-neg", "Negative"),
    ]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda site: version(site, file={"pickleScanResult": "Danger"}), "dangerous"),
        (lambda site: version(site, file={"virusScanResult": "Danger"}), "dangerous"),
        (lambda site: version(site, file={"hashes": {"SHA256": "00" * 32}}), "sha256"),
        (lambda site: version(site, model={"type": "LORA"}), "is a LORA"),
        (lambda site: version(site, files=[]), "no embedding file"),
        (lambda _: {"error": "Unauthorized", "message": "you must be logged in"}, "logged in"),
        (lambda _: [], "nothing|JSON"),
        (lambda _: {"id": 9208, "files": [None, 5, {"type": []}]}, "no embedding file"),
    ],
    ids=[
        "pickle scan",
        "virus scan",
        "other file",
        "a LoRA",
        "no files",
        "error with status 200",
        "a list",
        "odd files",
    ],
)
def test_what_should_not_be_taken_is_not(
    civitai: DirectFarm, site: Site, answer: Callable[[Site], Any], says: str
) -> None:
    found = answer(site)
    site.answers["/api/v1/model-versions/9208"] = lambda h: as_json(h, found)

    with pytest.raises(FarmError, match=says):
        civitai.embeddings.add("civitai:9208")

    assert not civitai.embeddings.ls()


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, b'{"error": "Unauthorized", "message": "requires you to be logged in"}', "CIVITAI_TOKEN"),
        (403, b'{"error": "Early Access"}', "early access"),
        (404, b"{}", "nothing at this address"),
        (410, b"{}", "archived"),
        (200, b'{"error": "Unauthorized", "message": "requires you to be logged in"}', "logged in"),
        (200, b"<html>checking your browser</html>", "sha256|web page"),
    ],
)
def test_download_that_is_refused_says_why(
    civitai: DirectFarm, site: Site, status: int, body: bytes, says: str
) -> None:
    site.serve("/api/download/models/9208", body, status, Content_Type="application/json")

    with pytest.raises(UnreadableFile, match=says):
        civitai.embeddings.add("civitai:9208")


def test_too_many_requests_are_waited_for(civitai: DirectFarm, site: Site) -> None:
    site.serve("/api/download/models/9208", b"{}", 429, Retry_After="0")
    calm = threading.Timer(0.2, lambda: site.serve("/api/download/models/9208", DATA))
    calm.start()
    site.answers["/api/download/models/9208"] = _slow_429(site)

    assert civitai.embeddings.add("civitai:9208").vectors == 4
    calm.join()


def _slow_429(site: Site) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.1)
        reply(handler, 429, b"{}", Retry_After="0")

    return answer


def test_waiting_that_would_take_too_long_is_told(civitai: DirectFarm, site: Site) -> None:
    site.serve("/api/download/models/9208", b"{}", 429, Retry_After="3600")

    with pytest.raises(Unavailable, match="try again in 3600 s"):
        civitai.embeddings.add("civitai:9208")


def test_download_that_breaks_off_goes_on_where_it_ended(
    civitai: DirectFarm, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "READ_S", 0.5)
    ranges: list[str | None] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        ranges.append(handler.headers["Range"])
        start = int(ranges[-1].removeprefix("bytes=").rstrip("-")) if ranges[-1] else 0
        status = 206 if start else 200
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(DATA) - start))
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        handler.end_headers()
        handler.wfile.write(DATA[start : start + 700])  # and no more: the connection closes

    site.answers["/api/download/models/9208"] = answer

    assert civitai.embeddings.add("civitai:9208").vectors == 4
    assert ranges == [None, "bytes=700-", "bytes=1400-", "bytes=2100-"][: len(ranges)]
    assert len(ranges) > 2


def test_body_that_drips_is_left_in_the_end(civitai: DirectFarm, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "TOTAL_S", 0.3)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(DATA)))
        handler.end_headers()
        with suppress(OSError):
            for start in range(0, len(DATA), 16):
                handler.wfile.write(DATA[start : start + 16])
                time.sleep(0.02)

    site.answers["/api/download/models/9208"] = answer
    began = time.monotonic()

    with pytest.raises(Unavailable, match="slower than"):
        civitai.embeddings.add("civitai:9208")

    assert time.monotonic() - began < 5


def test_server_that_ignores_ranges_is_believed_from_the_start(civitai: DirectFarm, site: Site) -> None:
    sent: list[int] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        sent.append(1)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(DATA)))
        handler.end_headers()
        handler.wfile.write(DATA[:900] if len(sent) == 1 else DATA)

    site.answers["/api/download/models/9208"] = answer

    assert civitai.embeddings.add("civitai:9208").vectors == 4


def test_token_goes_to_nobody_whom_the_site_names(civitai: DirectFarm, site: Site, store: Site) -> None:
    found = version(site, file={"downloadUrl": f"{store.url}/presigned"})
    site.answers["/api/v1/model-versions/9208"] = lambda h: as_json(h, found)

    assert civitai.embeddings.add("civitai:9208").vectors == 4

    assert store.seen
    assert not any("Authorization" in headers for _, headers in store.seen)


def test_token_in_a_pasted_link_is_kept_nowhere(civitai: DirectFarm, site: Site) -> None:
    record = civitai.embeddings.add(f"{site.url}/api/download/models/9208?token=SECRET")
    (failed,) = civitai.embeddings.add_all(f"{site.url}/api/download/models/77?token=SECRET")

    assert "SECRET" not in str(civitai.library.sources(record.content_id))
    assert "SECRET" not in f"{failed.source} {failed.error}"


def test_permissions_come_from_the_page(civitai: DirectFarm, site: Site) -> None:
    page = {"id": 7808, "type": "TextualInversion", "allowNoCredit": False, "allowCommercialUse": ["Sell"]}
    site.answers["/api/v1/models/7808"] = lambda h: as_json(h, page)

    (source,) = civitai.library.sources(civitai.embeddings.add("civitai:9208").content_id)

    assert "allowNoCredit: False" in source.licence


def test_preview_that_breaks_off_or_bursts_is_done_without(civitai: DirectFarm, site: Site) -> None:
    def broken(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        handler.wfile.write(b"x")

    site.answers["/picture.png"] = broken
    assert civitai.embeddings.add("civitai:9208").vectors == 4


# ---- addresses


@pytest.fixture
def anywhere() -> Downloader:
    return Downloader(max_bytes=2**20, allow_private=True)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/x", "http://localhost:{port}/x", "http://[::1]:{port}/x", "http://0.0.0.0:{port}/x",
        "http://127.1:{port}/x", "http://2130706433:{port}/x", "http://[::ffff:127.0.0.1]:{port}/x",
        "http://10.0.0.1/x", "http://169.254.169.254/latest/meta-data", "http://192.168.1.1/x",
    ],
)  # fmt: skip
def test_private_address_is_refused(site: Site, url: str) -> None:
    port = site.url.rpartition(":")[2]

    with (
        pytest.raises((InvalidField, Unavailable), match=r"private|resolved"),
        Downloader(max_bytes=100).fetch(url.format(port=port)),
    ):
        pass

    assert not site.seen


def test_redirect_into_the_own_network_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Site()
    site.serve("/x", b"", 302, Location=f"{inner.url}/secret")
    public = site.url.rpartition(":")[2]
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.9")
    monkeypatch.setattr(socket, "getaddrinfo", _resolver({"outside.test": lambda: "127.0.0.9"}))
    monkeypatch.setattr(httpcore2.SyncBackend, "connect_tcp", _connect_to_loopback(int(public)))

    with (
        pytest.raises(InvalidField, match="private"),
        Downloader(max_bytes=100).fetch(f"http://outside.test:{public}/x"),
    ):
        pass

    assert len(site.seen) == 1
    assert not inner.seen
    inner.close()


def test_name_that_resolves_to_something_else_later_is_not_asked_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.serve("/x.safetensors")
    port = int(site.url.rpartition(":")[2])
    answers = iter(["127.0.0.9", "10.0.0.1", "10.0.0.1"])
    connected: list[str] = []
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.9")
    monkeypatch.setattr(socket, "getaddrinfo", _resolver({"rebind.test": lambda: next(answers)}))
    monkeypatch.setattr(httpcore2.SyncBackend, "connect_tcp", _connect_to_loopback(port, connected))

    with Downloader(max_bytes=2**20).fetch(f"http://rebind.test:{port}/x.safetensors") as fetched:
        assert fetched.path.read_bytes() == DATA

    assert connected == ["127.0.0.9"]


def _resolver(names: dict[str, Callable[[], str]]) -> Callable[..., list[Any]]:
    real = socket.getaddrinfo

    def resolve(host: str, port: int, *arguments: Any, **keywords: Any) -> list[Any]:
        if host in names:
            return [(2, 1, 6, "", (names[host](), port))]
        return list(real(host, port, *arguments, **keywords))

    return resolve


def _connect_to_loopback(port: int, connected: list[str] | None = None) -> Callable[..., Any]:
    real = httpcore2.SyncBackend.connect_tcp

    def connect(self: Any, host: str, _port: int, *arguments: Any, **keywords: Any) -> Any:
        if connected is not None:
            connected.append(host)
        return real(self, "127.0.0.1", port, *arguments, **keywords)

    return connect


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1", True), ("127.0.0.1", False), ("::1", False), ("10.1.2.3", False),
        ("100.64.0.1", False), ("169.254.169.254", False), ("::ffff:10.0.0.1", False), ("fe80::1%eth0", False),
        ("fd00::1", False), ("0.0.0.1", False), ("224.0.0.1", False), ("2002:0a00:0001::1", False),
        ("64:ff9b::a00:1", False), ("64:ff9b::808:808", True), ("::7f00:1", False), ("fec0::1", False),
    ],
)  # fmt: skip
def test_addresses_of_the_open_internet(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_large_answer_is_refused_with_and_without_a_length(site: Site, anywhere: Downloader) -> None:
    site.serve("/big", bytes(2**21))

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(64):
            handler.wfile.write(bytes(2**16))

    site.answers["/endless"] = endless
    for path in ("/big", "/endless"):
        with pytest.raises(UnreadableFile, match="TOO_LARGE"), anywhere.fetch(site.url + path):
            pass


def test_redirect_without_end_is_left(site: Site, anywhere: Downloader) -> None:
    site.serve("/loop", b"", 302, Location="/loop")

    with pytest.raises(UnreadableFile, match="again and again"), anywhere.fetch(f"{site.url}/loop"):
        pass


@pytest.mark.parametrize("url", ["ftp://x/y", "file:///etc/passwd", "http://", "http://a:b@c/d", "http://x:99999/"])
def test_strange_address_is_refused(anywhere: Downloader, url: str) -> None:
    with pytest.raises(InvalidField, match="URL"), anywhere.fetch(url):
        pass


def test_address_gives_the_name_and_keeps_its_query_to_itself(civitai: DirectFarm, site: Site) -> None:
    site.serve("/files/My%20Style-7.safetensors")

    record = civitai.embeddings.add(f"{site.url}/files/My%20Style-7.safetensors?token=secret")

    (source,) = civitai.library.sources(record.content_id)
    assert record.name == "My Style-7"
    assert "secret" not in source.origin


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("civitai:1", True), ("https://civitai.com/models/1", True), ("https://civitai.red/models/1", True),
        ("https://example.com/civitai.com/models/1", False), ("https://civitai.com.evil.test/models/1", False),
        ("./civitai.pt", False),
    ],
)  # fmt: skip
def test_what_is_on_civitai(source: str, expected: bool) -> None:
    assert is_civitai(source, "https://civitai.com") is expected
