"""Every Python of the tests' Ray imports this file, for its folder is in PYTHONPATH: a shard that gets SIGUSR1 sends
garbage from then on, as many bytes as it would have sent, on every connection."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any


def _send_garbage(*_: object) -> None:
    from rankd.shards.streams import Stream

    send = Stream.send

    def garbage(stream: Stream, buffers: Sequence[memoryview], deadline: float | None) -> None:
        send(stream, [memoryview(os.urandom(sum(view.nbytes for view in buffers)))], deadline)

    stream_class: Any = Stream
    stream_class.send = garbage


if "shard" in sys.orig_argv:
    signal.signal(signal.SIGUSR1, _send_garbage)
