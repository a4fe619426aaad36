"""Checkpoints of a hub, on a small server that answers as one."""

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from latentfarm.farm import DirectFarm
from latentfarm.library import Models
from latentfarm_demo import CHECKPOINT
from latentfarm_shared.checkpoints import is_hub_id
from latentfarm_shared.errors import Unavailable, UnreadableFile
from latentfarm_worker.fetch import fetch_checkpoint

COMMIT = "c" * 40
REPOSITORY = "someone/tiny-sd"


class Hub(BaseHTTPRequestHandler):
    """Shows the demo checkpoint as `someone/tiny-sd`, its weights as LFS files."""

    downloads: list[str]

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{REPOSITORY}"):
            self._send(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings()}).encode(), {}, body=body)
            return
        prefix = f"/{REPOSITORY}/resolve/{COMMIT}/"
        file = CHECKPOINT / path.removeprefix(prefix)
        if not path.startswith(prefix) or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            return
        data = file.read_bytes()
        if body:
            self.downloads.append(path.removeprefix(prefix))
        etag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        self._send(data, headers | {"X-Repo-Commit": COMMIT}, body=body)

    def _send(self, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def siblings() -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for path in sorted(p for p in CHECKPOINT.rglob("*") if p.is_file()):
        data = path.read_bytes()
        entry: dict[str, object] = {
            "rfilename": path.relative_to(CHECKPOINT).as_posix(), "size": len(data), "blobId": "b" * 40
        }  # fmt: skip
        if path.suffix == ".safetensors":
            digest = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
        found.append(entry)
    return [*found, {"rfilename": "unet/diffusion_pytorch_model.fp16.safetensors", "size": 1, "blobId": "d" * 40}]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    downloads: list[str] = []
    handler = type("Hub", (Hub,), {"downloads": downloads})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield f"http://127.0.0.1:{server.server_address[1]}", downloads
    server.shutdown()
    server.server_close()
    thread.join()


def test_hub_checkpoint_is_recorded_without_its_weights_and_fetched_by_a_worker(
    servers: DirectFarm, hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    endpoint, downloads = hub
    record = Models(servers.registry, endpoint).add(f"{REPOSITORY}@main")

    assert record.name == "tiny-sd"
    assert record.source == f"hub:{REPOSITORY}@{COMMIT}"
    assert record.widths == {"clip_l": 128}
    assert not [path for path in downloads if path.endswith(".safetensors")]
    assert not [f for f in record.files if "fp16" in f.path]
    folder = fetch_checkpoint(record, servers.registry, tmp_path / "cache", endpoint)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (CHECKPOINT / weights).read_bytes()


def test_id_the_hub_does_not_know_is_refused(servers: DirectFarm, hub: tuple[str, list[str]]) -> None:
    with pytest.raises(UnreadableFile, match="someone/else"):
        Models(servers.registry, hub[0]).add("someone/else")


def test_hub_that_does_not_answer_is_one_sentence(servers: DirectFarm) -> None:
    with pytest.raises(Unavailable, match="hub"):
        Models(servers.registry, "http://127.0.0.1:1").add("someone/else")


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("a/b", True),
        ("a/b@v1", True),
        ("a-b.c/d_e", True),
        ("/a/b", False),
        ("./a", False),
        ("a", False),
        ("a/b/c", False),
    ],
)
def test_hub_ids_are_told_from_paths(text: str, is_one: bool) -> None:
    assert is_hub_id(text) is is_one
