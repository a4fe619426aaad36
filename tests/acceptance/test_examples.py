"""What README, docs and `--help` show to be typed is typed here, against a farm that has what the examples speak of.

What names another machine, a long time or a person's own folder is replaced as `REPLACED` says; nothing else is changed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from latentfarm import DirectFarm, JobSpec
from latentfarm_demo import CHECKPOINT, EMBEDDINGS

from tests.acceptance.conftest import LATENTFARM, Up, clean_environment, start_up
from tests.examples import Example, examples
from tests.integration.test_downloads import Site, as_json, reply, version
from tests.integration.test_hub import REPOSITORY, Hub
from tests.integration.test_single_file import write_single_file

pytestmark = pytest.mark.acceptance

ELSEWHERE = {
    "make demo": "run before every run of the tests, on a clean clone",
    "make test": "is this run",
    "pip install '.[worker]'": "test_install.py builds and installs the wheel",
}
LASTING = {"up": "farm ready|api_url", "serve": "serving", "worker": "serving|ready"}
NEEDS_GPU = ("cuda:0",)
BASH = shutil.which("bash") or "/bin/bash"


@dataclass
class World:
    """A person's machine: a folder, a home, servers that stand for others' sites, and a farm."""

    farm: Up
    folder: Path
    site: Site
    hub: str
    job: str
    environ: dict[str, str] = field(default_factory=dict)

    def replaced(self, text: str) -> str:
        """Return an example with what only the reader has replaced by what is here."""
        pairs = {
            ".venv/bin/latentfarm": "latentfarm",
            "https://example.com/": f"{self.site.url}/",
            "owner/checkpoint@main": REPOSITORY,
            "/srv/latentfarm": str(self.folder / "srv"),
            "10.0.0.5": "127.0.0.1",
            "5f0c1d2e": self.job,
            "3f2a": self.job,
            "--port 8188": f"--port {free_port()}",
            "http://127.0.0.1:8188": self.farm.ready["api_url"],
            "http://127.0.0.1:8000": self.farm.ready["api_url"],
            "login https://farm.example.com": f"login {self.farm.ready['api_url']} --no-key",
            '"https://farm.example.com", "lf_key"': repr(self.farm.ready["api_url"]),
            "embeddings pack ": "embeddings pack --steps 2 --size 64x64 ",
            "serve --host 0.0.0.0": f"serve --host 0.0.0.0 --port {free_port()}",
        }
        for old, new in pairs.items():
            text = text.replace(old, new)
        return text


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def embedding_files(folder: Path) -> None:
    """Put the files there that examples speak of: copies of the demo's."""
    one, two = sorted(EMBEDDINGS.glob("*.pt"))[:2]
    names = ("EasyNegative.safetensors", "bad-hands-5.pt", "gasai yuno-15200.pt", "download.pt")
    for name in names:
        shutil.copyfile(one, (folder / name).with_suffix(".pt"))
    (folder / "EasyNegative.pt").rename(folder / "EasyNegative.safetensors")
    for number, place in enumerate(
        ("embeddings", "my-folder", "folder", "stable-diffusion-webui/embeddings", "webui/embeddings")
    ):
        (folder / place).mkdir(parents=True)
        shutil.copyfile(two, folder / place / f"style-{number}.pt")


def make_files(folder: Path) -> None:
    """Put checkpoints, jobs and pictures where examples expect them."""
    embedding_files(folder)
    for name in ("my-checkpoint", "my-sd15-folder", "sd15-folder"):
        shutil.copytree(CHECKPOINT, folder / name)
    write_single_file(folder / "model.safetensors")
    (folder / "sweep.yaml").write_text(
        "prompt: a girl, corneo_dva\nsteps: 2\nmatrix:\n  seed: [1, 2]\n  cfg_scale: [4, 7]\n"
    )
    (folder / "prompts.jsonl").write_text('{"prompt": "a girl", "steps": 1}\n{"prompt": "a boy", "steps": 1}\n')


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    make_files(folder)
    site, store = Site(), Site()
    data = min(EMBEDDINGS.glob("*.pt")).read_bytes()
    site.serve("/style.safetensors", data)
    store.serve("/presigned", data)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHub", (Hub,), {"downloads": []}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub = f"http://127.0.0.1:{server.server_address[1]}"
    environ = {
        "HOME": str(folder), "XDG_DATA_HOME": str(folder / "share"), "LATENTFARM_CIVITAI_URL": site.url, "HF_ENDPOINT": hub,
        "LATENTFARM_ALLOW_PRIVATE_URLS": "true", "LATENTFARM_CONFIG": str(folder / "config"),
        "PATH": f"{Path(LATENTFARM).parent}:{os.environ['PATH']}", "HF_HOME": str(folder / "hf"),
    }  # fmt: skip
    up = start_up(folder / "farm", environ=environ)
    found = World(up, folder, site, hub, "", clean_environment() | environ)
    sdk = DirectFarm.from_env(up.data)
    for name in ("a", "b", "c", "watercolour", "EasyNegative"):
        sdk.embeddings.add(min(EMBEDDINGS.glob("*.pt")), name, allow_word=True)
    site.answers["/api/v1/model-versions/9208"] = lambda handler: as_json(handler, civitai_version(site, data))
    site.answers["/api/download/models/9208"] = lambda handler: reply(handler, 200, data)
    site.answers["/picture.png"] = lambda handler: reply(handler, 404, b"")
    sweep = {"prompt": "a girl", "steps": 1, "axes": [{"field": "cfg_scale", "values": [4, 7]}], "count": 2, "seed": 1}
    found.job = sdk.submit(JobSpec.check(sweep)).id
    sdk.models.add(CHECKPOINT, "mine")
    job = sdk.job(found.job)
    job.wait(120)
    for place in ("pictures/some.png", "out/picture.png"):
        job.images[0].save(folder / place)
    try:
        yield found
    finally:
        assert up.stop() == 0
        server.shutdown()
        server.server_close()
        thread.join()
        for each in (site, store):
            each.close()


def civitai_version(site: Site, data: bytes) -> dict[str, object]:
    import hashlib  # noqa: PLC0415

    sha256 = hashlib.sha256(data).hexdigest().upper()
    file = {"name": "easy.pt", "metadata": {"format": "PickleTensor"}, "hashes": {"SHA256": sha256}}
    return version(site, file=file, images=[])


def run(world: World, command: str, expect: tuple[int, ...] = (0,), **environ: str) -> str:
    """Run a line of shell as it stands."""
    done = subprocess.run(
        [BASH, "-c", command], check=False, capture_output=True, text=True, timeout=240, cwd=world.folder,
        env=world.environ | {"LATENTFARM_DATA": str(world.farm.data)} | environ,
    )  # fmt: skip
    assert done.returncode in expect, f"{command}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout + done.stderr


def last(world: World, command: str, sign: str, *, own_farm: bool) -> None:
    """Run what lasts until it says that it is ready, and interrupt it."""
    environ = world.environ if own_farm else world.environ | {"LATENTFARM_DATA": str(world.farm.data)}
    log = world.folder / "lasting.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [BASH, "-c", f"exec {command}" if "&&" not in command else command], cwd=world.folder, env=environ,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            until = time.monotonic() + 100
            while re.search(sign, log.read_text()) is None:
                assert process.poll() is None, f"{command} ended:\n{log.read_text()[-3000:]}"
                assert time.monotonic() < until, f"{command} is not ready:\n{log.read_text()[-3000:]}"
                time.sleep(0.2)
        finally:
            code = interrupted(process)
    assert code in (0, 130, -signal.SIGINT), f"{command}: {code}\n{log.read_text()[-3000:]}"


def interrupted(process: subprocess.Popen[bytes]) -> int:
    """Interrupt a process, again if it was not ready to hear of it; return its exit code."""
    for _ in range(4):
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(15)
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def run_console(world: World, text: str) -> None:
    command = world.replaced(text)
    plain = command.removeprefix("latentfarm ").split()
    first = plain[0]
    if any(gpu in command for gpu in NEEDS_GPU):
        assert "cuda" in run(world, command, (2, 3))
    elif "keys create" in command:
        run_with_keys(world, command)
    elif plain == ["jobs", "watch"]:
        watch(world, command)
    elif "doctor" in command:
        assert "redis" in run(world, command, (0, 1, 2, 3)).lower()  # no farm runs in the folder of one of them
    elif first in LASTING:
        own = first == "up" or "--join" in command
        if "--join" in command:
            command = command.replace("@join-token", f"@{joined(world)}")
        last(world, command, LASTING[first], own_farm=own)
    else:
        run(world, command)


def watch(world: World, command: str) -> None:
    """Let a table move for a while, and leave it."""
    done = run(world, f"timeout --signal INT 6 {command}", (124, 130))
    assert "images/s" in done


def joined(world: World) -> Path:
    """Return the token of a farm that others may join: this one's own."""
    from latentfarm_shared.settings import FarmFile  # noqa: PLC0415

    found = FarmFile.read(world.farm.data)
    assert found is not None
    path = world.folder / "join-token"
    path.write_text(found.token)
    return path


def run_with_keys(world: World, command: str) -> None:
    """Run what makes keys on a farm of its own, which needs them from then on."""
    up = start_up(world.folder / "keyed", "--workers", "0", "--no-api", environ=world.environ)
    try:
        other = World(
            up, world.folder, world.site, world.hub, world.job, world.environ | {"LATENTFARM_DATA": str(up.data)}
        )
        if "serve" in command:
            last(other, command, "serving", own_farm=True)
        else:
            run(other, command)
    finally:
        up.stop()


def run_python(world: World, text: str) -> None:
    code = world.replaced(text)
    environ = world.environ | {"LATENTFARM_DATA": str(world.farm.data)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=world.folder,
        env=environ,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def run_file(world: World, kind: str, text: str) -> None:
    """Plan a file of jobs, or a job in JSON."""
    path = world.folder / f"example.{kind}"
    path.write_text(text)
    sdk = DirectFarm.from_env(world.farm.data)
    if kind == "json":
        assert sdk.plan(JobSpec.check(json.loads(text))).images > 0
    else:
        assert sdk.plan(path).images > 0


@pytest.mark.parametrize("example", examples(), ids=str)
def test_example_does_what_it_says(world: World, example: Example) -> None:
    command = example.text.partition("  #")[0].strip()
    if command in ELSEWHERE:
        return
    if example.kind == "console":
        run_console(world, command)
    elif example.kind == "python":
        run_python(world, example.text)
    else:
        run_file(world, example.kind, example.text)


def test_examples_of_the_description_are_jobs(farm: Up) -> None:
    import httpx2  # noqa: PLC0415

    described = httpx2.get(farm.ready["api_url"] + "/openapi.json").json()
    body = described["paths"]["/api/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]
    assert body["examples"]
    for example in body["examples"].values():
        answer = httpx2.post(farm.ready["api_url"] + "/api/v1/plan", json=example["value"], timeout=60)
        assert answer.status_code == 200, answer.text
