"""Clients that go away while their request waits: then it leaves the schedule.

Whether a client is still there is looked at only when a request has taken a while: most are answered before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from starlette.requests import ClientDisconnect

AFTER_SECONDS = 0.02
Receive = Callable[[], Awaitable[Any]]


@contextmanager
def cancelled_if_gone(receive: Receive, future: Future[Any]) -> Iterator[None]:
    """Cancel a Future when the client of an ASGI request goes away while the block waits for it. The body of the
    request has to have been read.

    Raises:
        ClientDisconnect: in place of the CancelledError that this leads to.
    """
    watching: list[asyncio.Task[None]] = []

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.append(True)
        future.cancel()

    gone: list[bool] = []
    later = asyncio.get_running_loop().call_later(
        AFTER_SECONDS, lambda: watching.append(asyncio.ensure_future(watch()))
    )
    try:
        yield
    except asyncio.CancelledError:
        if gone:
            raise ClientDisconnect from None
        raise
    finally:
        later.cancel()
        for task in watching:
            task.cancel()
