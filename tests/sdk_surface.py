"""What every kind of farm does the same, and an asynchronous one made to look like the others."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from latentfarm.client.aio import AsyncEmbeddings, AsyncImage, AsyncJob, AsyncModels

WRAPPED = AsyncEmbeddings | AsyncImage | AsyncJob | AsyncModels


class Awaited:
    """An asynchronous object whose methods are awaited by a loop in another thread."""

    def __init__(self, inner: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._inner, self._loop = inner, loop

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return self._awaited_call(found) if inspect.ismethod(found) else self._have(found)

    def _awaited_call(self, method: Any) -> Any:
        return lambda *arguments, **named: self._have(method(*arguments, **named))

    def _have(self, value: Any) -> Any:
        if inspect.iscoroutine(value):
            value = asyncio.run_coroutine_threadsafe(value, self._loop).result(120)
        elif isinstance(value, AsyncIterator):
            value = asyncio.run_coroutine_threadsafe(_all(value), self._loop).result(120)
        if isinstance(value, list):
            return [self._have(item) for item in value]
        return Awaited(value, self._loop) if isinstance(value, WRAPPED) else value


async def _all(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


@contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Run an event loop in another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
