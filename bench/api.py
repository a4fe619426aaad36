"""The HTTP API under load beside a running job: 500 requests a second of polling, 50 streams of events, 100 callers of txt2img.

Clients run in processes of their own on the same cores; what they cost is told apart.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import quantiles
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil
from latentfarm.embedded.local import LocalFarm
from latentfarm_shared.specs import JobSpec

from bench.pairs import ratio

GPUS, IMAGE_S = 4, 0.5
REQUESTS_PER_S, CONNECTIONS, STREAMS, CALLERS = 500, 25, 50, 100
PAIRS, WINDOW_S, WARM_UP_S = 9, 10.0, 10.0
OPENING_S = 1.0  # for the streams, before requests are counted
CALL_TIMEOUT_S, CALL_IMAGE_S = 6.0, 0.05


# ---- the clients


async def _poll(host: str, port: int, path: str, until: float, took: list[float]) -> None:
    """Ask at a steady pace over one connection; a request that is late counts from when it should have been sent."""
    reader, writer = await asyncio.open_connection(host, port)
    pause = CONNECTIONS / REQUESTS_PER_S
    due = time.monotonic()
    while (due := due + pause) < until:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head.split(b"\r\n", 1)[0], head  # noqa: S101 - a bench that measures errors is none
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(length)
        took.append(time.monotonic() - due)
    writer.close()


async def _stream(host: str, port: int, path: str, until: float, counts: list[int]) -> None:
    """Read a stream of events; count them."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    count = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(max(0.1, until - time.monotonic())):
            async for line in reader:
                count += line.startswith(b"event: event")
    counts.append(count)
    writer.close()


def _version(url: str) -> int:
    with urlopen(url) as answer:  # noqa: S310 - of this machine
        return int(json.load(answer)["version"])


async def load(url: str, job: str, seconds: float) -> dict[str, Any]:
    """Poll and listen for a while; return what it was like."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 80
    until = time.monotonic() + OPENING_S + seconds
    took: list[float] = []
    counts: list[int] = []
    paths = [f"/api/v1/jobs/{job}", f"/api/v1/jobs/{job}/images/7", f"/api/v1/jobs/{job}/history?limit=20"]
    polls = [_poll(host, port, paths[n % len(paths)], until, took) for n in range(CONNECTIONS)]
    version = await asyncio.to_thread(_version, f"{url}/api/v1/jobs/{job}")  # nothing old
    streams = [
        _stream(host, port, f"/api/v1/jobs/{job}/events?after={version if n else 0}", until, counts)
        for n in range(STREAMS)
    ]
    opened = asyncio.gather(*streams)
    await asyncio.sleep(OPENING_S)
    await asyncio.gather(*polls, opened)
    cuts = quantiles(took, n=100)
    return {"requests": len(took), "p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "events": sum(counts)}


async def call(url: str, number: int, timeout_s: float) -> int:
    """Call txt2img as a client that gives up after a while and tries again; return how often it asked."""
    parts = urlsplit(url)
    body = json.dumps(
        {"prompt": f"a red circle, {number}", "steps": 4, "width": 64, "height": 64, "sampler_name": "Euler"}
    )
    request = (
        f"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    )
    for tries in range(1, 30):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(request.encode())
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                answer = await reader.read()
                assert b" 200 " in answer.split(b"\r\n", 1)[0], answer[:300]  # noqa: S101 - as above
                return tries
        writer.close()
        await asyncio.sleep(0.7)  # by then the server knows that we hung up
    raise TimeoutError(number)


async def calls(url: str) -> list[int]:
    """Call a hundred times at once."""
    return await asyncio.gather(*(call(url, number, CALL_TIMEOUT_S) for number in range(CALLERS)))


# ---- the farm


class _Workers:
    """Simulated GPUs under one supervisor."""

    def __init__(self, local: LocalFarm, count: int, image_s: float) -> None:
        environ = os.environ | {
            "LATENTFARM_ENGINE": "simulated", "LATENTFARM_IMAGE_SECONDS": str(image_s), "LATENTFARM_LOG_LEVEL": "WARNING",
        }  # fmt: skip
        command = [sys.executable, "-m", "latentfarm_worker", "--data", str(local.data), "--workers", str(count)]
        self._process = subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while len([w for w in local.farm.workers() if w.queues]) < count and time.monotonic() < until:
            time.sleep(0.2)

    def stop(self) -> None:
        """End them."""
        self._process.send_signal(signal.SIGTERM)
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


def _client(what: str, *arguments: str) -> Any:
    """Run clients in a process of their own; return what they say."""
    command = [sys.executable, "-m", "bench.api", what, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _polling() -> dict[str, Any]:
    """Measure the farm with and without load, turn by turn."""
    folder = tempfile.TemporaryDirectory(prefix="latentfarm-bench-")
    with folder as data, LocalFarm(Path(data), workers=0, api_port=0) as local:
        workers = _Workers(local, GPUS, IMAGE_S)
        spec = {"prompt": "a cat", "seed": 1, "count": 1_000_000, "lane": "batch", "reuse": False}
        job = local.farm.submit(JobSpec.check(spec))
        time.sleep(WARM_UP_S)
        api = next(p for p in psutil.Process().children(recursive=True) if "serve" in p.cmdline())

        def images() -> int:
            return local.farm.ledger.status(job.id).counts["succeeded"]

        rates: dict[bool, list[float]] = {False: [], True: []}
        told = []
        for pair in range(PAIRS):
            for loaded in (False, True) if pair % 2 else (True, False):
                before, began, used = images(), time.monotonic(), _used(api)
                if loaded:
                    found = _client("load", str(local.api_url), job.id, str(WINDOW_S))
                    found["API CPU-ms per request"] = round((_used(api) - used) * 1000 / found["requests"], 3)
                    told.append(found)
                else:
                    time.sleep(WINDOW_S)
                rates[loaded].append((images() - before) / (time.monotonic() - began))
        job.cancel()
        workers.stop()
    return {
        "requests a second": round(sum(f["requests"] for f in told) / WINDOW_S / PAIRS, 1),
        "p95 of each window, ms": [round(f["p95"] * 1000, 2) for f in told],
        "p99 of each window, ms": [round(f["p99"] * 1000, 2) for f in told],
        "API CPU-ms per request": [f["API CPU-ms per request"] for f in told],
        "events received": sum(f["events"] for f in told),
        "images a second without": [round(rate, 3) for rate in rates[False]],
        "images a second with": [round(rate, 3) for rate in rates[True]],
        "with load over without, at least 0.95": ratio(rates[True], rates[False]).row(),
    }


def _used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _calling() -> dict[str, Any]:
    """A hundred callers who time out and try again: each answered, nothing drawn twice."""
    folder = tempfile.TemporaryDirectory(prefix="latentfarm-bench-")
    with folder as data, LocalFarm(Path(data), workers=0, api_port=0) as local:
        began = time.monotonic()
        clients = subprocess.Popen(
            [sys.executable, "-m", "bench.api", "calls", str(local.api_url)], stdout=subprocess.PIPE, text=True
        )
        time.sleep(1.5 * CALL_TIMEOUT_S)  # nobody draws yet, so that everybody times out
        workers = _Workers(local, 1, CALL_IMAGE_S)
        answered = json.loads(clients.communicate(timeout=300)[0])
        took = time.monotonic() - began
        jobs = local.farm.ledger.jobs(1000)
        workers.stop()
    return {
        "callers": CALLERS,
        "answered": len(answered),
        "requests": sum(answered),
        "jobs": len(jobs),
        "images started": sum(job.starts for job in jobs),
        "seconds": round(took, 1),
    }


def measure() -> dict[str, Any]:
    """Return what polling and calling were like."""
    return {"polling and streams": _polling(), "txt2img": _calling()}


if __name__ == "__main__":
    if sys.argv[1] == "load":
        print(json.dumps(asyncio.run(load(sys.argv[2], sys.argv[3], float(sys.argv[4])))))
    else:
        print(json.dumps(asyncio.run(calls(sys.argv[2]))))
