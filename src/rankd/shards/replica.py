"""One address of a shard: a connection to it is kept, by a thread of its own that connects again when it has ended.

    up      it is asked
    down    it is passed over: nobody waits for it. Meanwhile it is tried again, later each time

A connection counts only after the handshake: a replica that hangs, has another plan or sends garbage stays down.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable

from rankd.errors import RankdError, ShardFailure
from rankd.shards.shard_link import ShardLink

log = logging.getLogger("rankd")


class Backoff:
    """How long to wait before the next try: at first `first_s`, then twice the time before, up to `longest_s`; of each
    a random half or more, so that clients do not come all at once."""

    def __init__(self, first_s: float, longest_s: float, chance: Callable[[], float] = random.random) -> None:
        self._first_s, self._longest_s, self._chance = first_s, longest_s, chance
        self._next_s = first_s

    def next_s(self) -> float:
        """Before the next try."""
        wait_s = self._next_s * (0.5 + 0.5 * self._chance())
        self._next_s = min(2 * self._next_s, self._longest_s)
        return wait_s

    def reset(self) -> None:
        """It worked."""
        self._next_s = self._first_s


class Replica:
    """Keeps a connection to `address`; `connect` makes one. `changed` is told when it is up."""

    def __init__(
        self, address: str, connect: Callable[[], ShardLink], backoff: Backoff, changed: threading.Condition
    ) -> None:
        self.address, self._connect, self._backoff = address, connect, backoff
        self._link: ShardLink | None = None
        self._trouble: RankdError = ShardFailure(f"{address} has not been reached yet")
        self._closing = threading.Event()
        self._changed = changed  # guards `_link` against `close`
        self._thread = threading.Thread(target=self._run, name=f"shard-{address}", daemon=True)

    @property
    def link(self) -> ShardLink | None:
        """The connection, if it may be asked."""
        link = self._link
        return link if link is not None and link.ended is None else None

    @property
    def trouble(self) -> RankdError:
        """What was wrong last."""
        link = self._link
        return (link.ended if link is not None else None) or self._trouble

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def close(self) -> None:
        """End the connection, and connect no more."""
        self._closing.set()
        with self._changed:
            if self._link is not None:
                self._link.shut()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                link = self._connect()
            except (OSError, RankdError) as error:
                self._failed(error if isinstance(error, RankdError) else ShardFailure(f"{self.address}: {error}"))
            else:
                self._keep(link)
            if not self._closing.is_set():
                self._closing.wait(self._backoff.next_s())

    def _keep(self, link: ShardLink) -> None:
        with self._changed:
            self._link = link
            self._changed.notify_all()
            if self._closing.is_set():
                link.shut()
        log.info("shard %s: connected", self.address)
        reason = link.run()
        if link.worked:
            self._backoff.reset()
        with self._changed:
            self._link = None
        if not self._closing.is_set():
            self._failed(reason)

    def _failed(self, reason: RankdError) -> None:
        if str(reason) != str(self._trouble):
            log.warning("shard %s: %s", self.address, reason)
        self._trouble = reason
