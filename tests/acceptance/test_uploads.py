"""The server is killed while files are sent to it: what was answered is there, whole and once; the rest can be sent again."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx2
import psutil
import pytest
from latentfarm import DirectFarm, Farm, Unavailable
from latentfarm_demo import EMBEDDINGS

from tests.acceptance.conftest import Up, eventually, start_up

pytestmark = pytest.mark.acceptance
T = TypeVar("T")
KILLS = 8


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    found = start_up(tmp_path / "farm", "--workers", "0")
    yield found
    assert found.stop() == 0


def servers_of(up: Up) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(up.process.pid).children(recursive=True):
        try:
            found += [process] if "serve" in process.cmdline() else []
        except psutil.NoSuchProcess:
            continue
    return found


def answers(up: Up) -> bool:
    try:
        return httpx2.get(up.ready["api_url"] + "/healthz", timeout=2).status_code == 200
    except httpx2.HTTPError:
        return False


def killed_meanwhile(up: Up, done: threading.Event, kills: list[float]) -> None:
    """Kill the server a little later each time, once it answers."""
    while not done.is_set() and len(kills) < KILLS:
        eventually(lambda: answers(up) or done.is_set(), 60)
        time.sleep(0.02 + 0.2 * len(kills))
        for process in servers_of(up):
            os.kill(process.pid, signal.SIGKILL)
            kills.append(time.monotonic())


def persist(what: Callable[[], T]) -> T:
    """Try until it is done, as somebody would who is told to try again."""
    until = time.monotonic() + 120
    while True:
        try:
            return what()
        except Unavailable:
            assert time.monotonic() < until


def test_uploads_are_whole_and_once_whenever_the_server_is_killed(up: Up, tmp_path: Path) -> None:
    done, kills = threading.Event(), list[float]()
    thread = threading.Thread(target=killed_meanwhile, args=(up, done, kills))
    source = min(EMBEDDINGS.glob("corneo*.pt"))
    word = secrets.token_hex(3)
    direct = DirectFarm.from_env(up.data)
    with Farm(up.ready["api_url"]) as farm:
        thread.start()
        added, jobs = 0, []
        try:
            while len(kills) < KILLS:
                path = tmp_path / f"up_{word}_{added}.pt"
                shutil.copyfile(source, path)
                persist(lambda path=path: farm.embeddings.add(path))  # type: ignore[misc]
                rows = tmp_path / f"rows{added}.jsonl"
                rows.write_text(
                    "".join(f'{{"prompt": "a girl {word} {added} {row}", "steps": 1}}\n' for row in range(2000))
                )
                jobs += persist(lambda rows=rows: farm.submit_file(rows))  # type: ignore[misc]
                added += 1
        finally:
            done.set()
            thread.join()
        eventually(lambda: answers(up), 60)

        ours = [record for record in farm.embeddings.ls() if word in record.name]
        assert sorted(record.name for record in ours) == sorted(f"up_{word}_{number}" for number in range(added))
        assert {record.file_sha256 for record in ours} == {hashlib.sha256(source.read_bytes()).hexdigest()}
        for record in ours:
            assert direct.library.tensors(direct.embeddings.show(record.name)) is not None
        assert len(jobs) == added == len({job.id for job in jobs})
        assert [job.status().total for job in jobs] == [2000] * added
        assert {status.id for status in direct.statuses(1000)} == {job.id for job in jobs}, (
            "no job came of a lost answer"
        )
