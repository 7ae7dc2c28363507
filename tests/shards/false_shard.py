"""A server that is no shard, or not an honest one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rankd.shards.streams import Stream


@contextmanager
def liar(answer: Callable[[Stream], None]) -> Iterator[str]:
    """The address of a server that does `answer` with each client."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(0.05)
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            try:
                stream = Stream(listening.accept()[0])
            except TimeoutError:
                continue
            except OSError:  # it was shut
                return
            try:
                answer(stream)
            except OSError:
                pass
            finally:
                stream.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        ended.set()
        with suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        thread.join()
        listening.close()
