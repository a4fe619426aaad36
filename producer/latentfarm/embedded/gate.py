"""The gate: passes connections from other machines on to servers that listen on loopback alone.

Run as a script: `gate.py ADDRESS PORT:TARGET …`. It knows nothing of what passes; the servers ask for passwords themselves,
and their other doors stay shut.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress

CHUNK = 64 * 1024
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy one direction until it ends."""
    try:
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except (OSError, asyncio.CancelledError):
        writer.close()


async def serve(address: str, ports: list[tuple[int, int]]) -> None:
    """Listen at `address` on the first port of every pair and connect to the second on loopback."""

    def handler(target: int) -> Handler:
        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", target)
            except OSError:
                writer.close()
                return
            await asyncio.gather(_pass_on(reader, inner_writer), _pass_on(inner_reader, writer))
            for end in (writer, inner_writer):
                end.close()

        return connect

    servers = [await asyncio.start_server(handler(target), address, port) for port, target in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    pairs = [(int(port), int(target)) for port, _, target in (pair.partition(":") for pair in sys.argv[2:])]
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(sys.argv[1], pairs))
