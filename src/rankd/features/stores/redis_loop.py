"""A thread with an event loop of its own: coroutines in, from any thread, Futures of `concurrent.futures` out."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from rankd.features.stores.done_futures import refused
from rankd.features.stores.feature_store import StoreFailure, Trouble

T = TypeVar("T")


class LoopThread:
    """A daemon thread that runs coroutines. After `close` it takes none: Futures end, whatever happens."""

    def __init__(self, name: str) -> None:
        self._loop = _new_loop()
        self._loop.set_exception_handler(_report)
        self._lock = threading.Lock()  # guards `_closed`: what was taken before it is run before the end
        self._closed = False
        self._process = os.getpid()
        self._background: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Run a coroutine that ends by itself."""
        with self._lock:
            if self._closed or self._process != os.getpid():  # threads do not survive a fork
                return refused(StoreFailure("the store is closed, or was opened before a fork", Trouble.DOWN))
            return asyncio.run_coroutine_threadsafe(work(), self._loop)

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine until the thread is closed."""

        async def start() -> None:
            self._background.add(asyncio.ensure_future(work()))

        self.submit(start)

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """End what was spawned, let end what was submitted, run `last`, and stop."""
        with self._lock:
            if self._closed or self._process != os.getpid():
                return
            self._closed = True
            done = asyncio.run_coroutine_threadsafe(self._end(last), self._loop)
        try:
            done.result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _end(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        submitted = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*submitted, return_exceptions=True)
        await last()
        await self._loop.shutdown_asyncgens()


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Of a connection that fails uvloop also complains that nobody looked, though whoever asked has the error."""
    if not isinstance(context.get("exception"), OSError):
        loop.default_exception_handler(context)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
