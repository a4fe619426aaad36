"""The command line over HTTP: logging in, following, downloading, comparing."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.request import urlopen

import httpx2
import psutil
import pytest
from PIL import Image

from tests.acceptance.conftest import LATENTFARM, Up, clean_environment, start_up

pytestmark = pytest.mark.acceptance


class Terminal:
    """A terminal of somebody who reaches farms over HTTP."""

    def __init__(self, folder: Path) -> None:
        self.environ = clean_environment() | {"LATENTFARM_CONFIG": str(folder / "config"), "HOME": str(folder)}
        self.folder = folder

    def run(
        self, *arguments: str, expect: int = 0, stdin: str = "", **environ: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [LATENTFARM, *arguments], check=False, capture_output=True, text=True, input=stdin, timeout=120,
            env=self.environ | environ, cwd=self.folder,
        )  # fmt: skip
        assert done.returncode == expect, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)


@pytest.fixture
def terminal(farm: Up, tmp_path: Path) -> Terminal:
    found = Terminal(tmp_path)
    found.run("login", farm.ready["api_url"], "--no-key", "--name", "here")
    return found


def test_whoever_is_logged_in_has_the_farm_without_its_settings(terminal: Terminal, farm: Up) -> None:
    job = terminal.run("generate", "masterpiece, corneo_dva", "--steps", "1", "-c", "2", "-o", "out").stdout.strip()

    assert len(list((terminal.folder / "out").glob("*.png"))) == 2
    assert terminal.json("jobs", "show", job[:10])["state"] == "succeeded"
    assert terminal.json("jobs", "ls", "--state", "succeeded", "--limit", "1")[0]["id"] == job
    assert len(terminal.json("jobs", "images", job)) == 2
    assert terminal.json("jobs", "events", job)[0]["what"] == "queued"
    assert "nothing holds it up" in terminal.run("jobs", "why", job).stdout
    assert terminal.json("workers", "ls")
    assert "corneo_dva" in [row["name"] for row in terminal.json("embeddings", "ls")]
    assert terminal.json("models", "ls")[0]["name"] == "demo"
    assert terminal.json("profiles", "ls") == [
        {"name": "here", "url": farm.ready["api_url"], "current": True, "has_key": False}
    ]


def test_what_is_wrong_has_the_same_exit_codes(terminal: Terminal) -> None:
    assert "did you mean 'corneo_dva'" in terminal.run("generate", "x", "-e", "corneo_dvaa", expect=2).stderr
    assert "there is no job" in terminal.run("jobs", "show", "nope", expect=2).stderr
    assert "does not answer" in terminal.run("login", "http://127.0.0.1:9", "--no-key", expect=3).stderr
    assert "farm's address" in terminal.run("login", "farm", "--no-key", expect=2).stderr
    assert "key: is missing" in terminal.run("login", "http://127.0.0.1:9", "--key-stdin", expect=2).stderr
    assert "reached over HTTP" in terminal.run("keys", "ls", expect=2).stderr
    assert (
        "no profile called 'her'; did you mean 'here'" in terminal.run("--farm", "her", "jobs", "ls", expect=2).stderr
    )


def test_farms_are_told_apart_and_forgotten(terminal: Terminal, farm: Up) -> None:
    terminal.run("login", farm.ready["api_url"], "--no-key", "--name", "there")
    assert [row["current"] for row in terminal.json("profiles", "ls")] == [False, True]
    terminal.run("profiles", "use", "here")
    assert terminal.run("--farm", "there", "jobs", "ls", "--json").stdout.startswith("[")
    terminal.run("logout")
    assert [row["name"] for row in terminal.json("profiles", "ls")] == ["there"]
    terminal.run("logout", "there")
    assert "nobody is logged in" in terminal.run("logout", expect=2).stderr
    by_variable = terminal.run("jobs", "ls", "--json", LATENTFARM_API_URL=farm.ready["api_url"])
    assert by_variable.stdout.startswith("[")


def test_download_goes_on_and_follows(terminal: Terminal) -> None:
    job = terminal.run(
        "generate", "a blue square", "--steps", "2", "-c", "12", "--seed", "5", "--detach"
    ).stdout.strip()
    first = terminal.run("jobs", "download", job, "-o", "some")
    whole = terminal.json("jobs", "download", job, "-o", "some", "--follow")

    assert len(whole) == 12
    assert set(first.stdout.split()) <= set(whole)
    assert sorted(path.name for path in (terminal.folder / "some").iterdir()) == sorted(Path(p).name for p in whole)


@pytest.mark.parametrize("number", [5])
def test_download_that_is_killed_leaves_whole_files_and_goes_on(terminal: Terminal, number: int) -> None:
    job = terminal.run(
        "generate", "a blue square", "--steps", "1", "-c", "60", "--seed", "9", "--detach"
    ).stdout.strip()
    terminal.run("jobs", "watch", job)
    for _ in range(number):
        command = [LATENTFARM, "jobs", "download", job, "-o", "all"]
        process = subprocess.Popen(
            command, env=terminal.environ, cwd=terminal.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 20
        had = len(list((terminal.folder / "all").glob("*.png")))
        while (
            process.poll() is None
            and len(list((terminal.folder / "all").glob("*.png"))) == had
            and time.monotonic() < until
        ):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in (terminal.folder / "all").glob("*.png"):
            Image.open(path).verify()
    assert len(terminal.json("jobs", "download", job, "-o", "all")) == 60
    assert len([path for path in (terminal.folder / "all").iterdir() if path.suffix == ".png"]) == 60


def test_key_of_the_environment_is_not_sent_to_a_farm_without_one(terminal: Terminal) -> None:
    class Handler(BaseHTTPRequestHandler):
        seen: ClassVar[list[str | None]] = []

        def do_GET(self) -> None:
            self.seen.append(self.headers["Authorization"])
            body = b'{"owner": "", "items": [], "next": null}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        terminal.run("login", url, "--no-key", "--name", "other", LATENTFARM_API_KEY="lf_secret")
        terminal.run("jobs", "ls", LATENTFARM_API_KEY="lf_secret")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert Handler.seen == [None, None]


def test_table_is_read_from_standard_input(terminal: Terminal) -> None:
    rows = '{"prompt": "a girl", "steps": 1}\n{"prompt": "a boy", "steps": 1}\n'
    job = terminal.run("submit", "-", stdin=rows).stdout.strip()
    assert terminal.json("jobs", "show", job)["total"] == 2
    assert "cannot be read" in terminal.run("submit", "nowhere.yaml", expect=2).stderr


def test_sweep_is_compared_on_labelled_axes(terminal: Terminal) -> None:
    path = terminal.folder / "sweep.yaml"
    path.write_text("prompt: a red circle\nsteps: 2\nmatrix:\n  cfg_scale: [3, 7, 11]\n  seed: [1, 2]\n")
    job = terminal.run("submit", str(path), "--watch").stdout.strip()
    printed = terminal.run("jobs", "compare", job, "--x", "cfg", "--y", "seed", "-o", "grids/grid.png").stdout.strip()
    wrong = terminal.run("jobs", "compare", job, "--x", "sampller", expect=2)

    with Image.open(terminal.folder / printed) as sheet:
        assert sheet.width > 3 * 192
        assert 2 * 192 < sheet.height < 3 * 192 + 100
        assert len(sheet.convert("RGB").getcolors(10**6) or ()) > 100
    assert "did you mean sampler" in wrong.stderr


def test_watching_moves_in_a_terminal(terminal: Terminal) -> None:
    job = terminal.run("generate", "a 红 circle", "--steps", "2", "-c", "8", "--detach").stdout.strip()
    ours, theirs = pty.openpty()
    environ = terminal.environ | {"TERM": "xterm-256color", "COLUMNS": "140"}
    process = subprocess.Popen(
        [LATENTFARM, "jobs", "watch", job], env=environ, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    written = b""
    until = time.monotonic() + 60
    while time.monotonic() < until and select.select([ours], [], [], 60)[0]:
        try:
            written += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    assert process.wait(10) == 0
    os.close(ours)
    text = written.decode()
    assert "images/s" in text
    assert "8/8" in text
    assert "succeeded" in text


def test_webhooks_are_kept_and_links_are_read(farm: Up) -> None:
    hook = farm.json("webhooks", "add", "https://example.com/hook", "--event", "job.completed")
    assert [row["id"] for row in farm.json("webhooks", "ls")] == [hook["id"]]
    assert farm.json("webhooks", "deliveries", hook["id"]) == []
    secret = farm.run("webhooks", "secret").stdout
    assert secret.startswith("whsec_")
    assert farm.run("webhooks", "secret", "--rotate").stdout != secret
    assert "no webhook" in farm.run("webhooks", "redeliver", "wh_x", "x", expect=2).stderr
    assert "events" in farm.run("webhooks", "add", "https://example.com", "--event", "job.done", expect=2).stderr
    farm.run("webhooks", "rm", hook["id"])
    assert farm.json("webhooks", "ls") == []

    job = farm.run("generate", "a red circle", "--steps", "1").stdout.strip()
    address = farm.run("jobs", "link", job, "0").stdout.strip()
    with urlopen(address) as answer:  # noqa: S310 - of this farm
        assert answer.read().startswith(b"\x89PNG")
    assert "no image" in farm.run("jobs", "link", job, "7", expect=2).stderr
    over_http = httpx2.get(f"{farm.ready['api_url']}/api/v1/jobs/{job}/images/0/link").json()["url"]
    signatures = {re.search(r"Signature=(\w+)", url)[1] for url in (address, over_http)}  # type: ignore[index]
    logs = "".join(path.read_text(errors="replace") for path in (farm.data / "logs").glob("*.log"))
    assert logs
    assert not [found for found in (*signatures, secret.strip()) if found in logs]
    assert {"samplers", "schedules", "upscalers"} == set(farm.json("samplers"))


def test_workers_and_servers_are_started_without_producers_secrets(tmp_path: Path) -> None:
    secrets = {"LATENTFARM_CIVITAI_TOKEN": "civ_secret", "LATENTFARM_SECRET_KEY": "a long random text"}
    up = start_up(tmp_path / "farm", "--workers", "1", "--engine", "simulated", environ=secrets)
    try:
        have = {}
        for process in psutil.Process(up.process.pid).children(recursive=True):
            command = " ".join(process.cmdline())
            have[command] = {name for name in secrets if name in process.environ()}
        assert any("latentfarm_worker" in command for command in have)
        assert {bool(found) for command, found in have.items() if " serve " in command} == {True}
        assert not [command for command, found in have.items() if found and " serve " not in command]
    finally:
        assert up.stop() == 0


def test_shell_completes_names(terminal: Terminal) -> None:
    job = terminal.run("generate", "a red circle", "--steps", "1", "--detach").stdout.strip()

    def offered(line: str) -> str:
        words = line.split(" ")
        return terminal.run(
            _LATENTFARM_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1)
        ).stdout  # fmt: skip

    assert job in offered(f"latentfarm jobs show {job[:4]}")
    assert "Euler" in offered("latentfarm generate x --sampler Eul")
    assert "corneo_dva" in offered("latentfarm generate x -e cor")
    assert "watch" in offered("latentfarm jobs w")
    assert terminal.run("--show-completion", "bash").stdout
