"""Whether Redis is asked at all: what went wrong, and a watch that notices when it works again.

    closed    it is asked. A connection that fails or is refused, or two timeouts in a row, open the breaker
    open      nobody waits for it: every question fails at once with the trouble it had. Meanwhile the watch tries,
              50 ms later and then at twice the time up to a second, and closes the breaker when it answers

The watch also looks, when it connects and every few seconds, for a memory policy that may throw away histories.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from redis.exceptions import NoPermissionError, ResponseError

from rankd.features.stores.feature_store import StoreFailure, Trouble
from rankd.features.stores.redis_failures import failure_of
from rankd.features.stores.redis_node import Command, RedisNode, Reply, checked

FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 1.0
LOOK_EVERY_S = 5.0
TIMEOUTS_IN_A_ROW = 2

log = logging.getLogger("rankd")


class Servers(Protocol):
    """A server (`redis_node.py`) or a cluster (`redis_cluster.py`)."""

    async def connect(self) -> None:
        """Be ready to answer; to be called again when it failed."""
        ...

    async def ask(self, commands: Sequence[Command]) -> list[Reply | ResponseError]:
        """The replies to some commands; in a cluster their keys decide who is asked."""
        ...

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of some keys in their order."""
        ...

    async def nodes(self) -> list[RedisNode]:
        """Those who hold all keys together."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


class RedisHealth:
    """The breaker of a store and its counts. Changed on the store's loop, read on any thread."""

    def __init__(self, servers: Servers, shown: str, timeout_s: float, connect_timeout_s: float) -> None:
        self._servers, self._shown = servers, shown
        self._timeout_s, self._connect_timeout_s = timeout_s, connect_timeout_s
        self._failures: Counter[str] = Counter()
        self._lock = threading.Lock()  # guards `_failures`, which refusals on any thread add to
        self._trouble: tuple[Trouble, str] | None = (Trouble.DOWN, f"{shown} has not been reached yet")
        self._timeouts = 0
        self._lost = asyncio.Event()  # the breaker is open
        self._tried = asyncio.Event()  # it was tried once: until then who asks waits, since it may well be there
        self._policy: str | None = None
        self.recoveries = 0

    @property
    def up(self) -> bool:
        """Whether it is asked."""
        return self._trouble is None

    @property
    def trouble(self) -> Trouble | None:
        """What is wrong, if anything is."""
        if self._trouble is not None:
            return self._trouble[0]
        return Trouble.EVICTING if self._policy else None

    def failures(self) -> dict[str, int]:
        """How many questions failed, by Trouble value."""
        with self._lock:
            return dict(self._failures)

    def refusal(self) -> StoreFailure | None:
        """Why nothing is asked now, counted as a failure; None if it is, or may soon be."""
        trouble = self._trouble
        if trouble is None or not self._tried.is_set():
            return None
        failure = StoreFailure(f"{trouble[1]} (not asked until it answers again)", trouble[0])
        self._count(failure)
        return failure

    def eviction(self) -> StoreFailure | None:
        """Why events cannot be kept, if the memory policy is such."""
        if self._policy is None:
            return None
        return StoreFailure(
            f"{self._shown} has maxmemory-policy {self._policy}, which may throw away histories, so that no event is "
            "accepted; set it to noeviction, or to one of volatile-* (rankd's keys never expire)",
            Trouble.EVICTING,
        )

    async def tried(self) -> None:
        """Wait until it was tried once."""
        await self._tried.wait()

    def worked(self) -> None:
        """A question was answered."""
        self._timeouts = 0

    def failed(self, error: Exception) -> StoreFailure:
        """A question was not answered; the failure that this is."""
        failure, severs = failure_of(error, self._shown)
        self._count(failure)
        self._timeouts = self._timeouts + 1 if failure.trouble is Trouble.TIMEOUT else 0
        if self.up and (severs or self._timeouts >= TIMEOUTS_IN_A_ROW):
            self._open(failure)
        return failure

    async def watch(self) -> None:
        """Keep trying, for ever."""
        wait_s, reached = FIRST_WAIT_S, 0.0
        clock = asyncio.get_running_loop().time
        while True:
            try:
                await self._try()
            except Exception as error:  # noqa: BLE001 - the edge: this has to go on, whatever a server answers
                failure, _ = failure_of(error, self._shown)
                if self.up and failure.trouble is Trouble.TIMEOUT and self._timeouts + 1 < TIMEOUTS_IN_A_ROW:
                    self.failed(failure)
                    continue
                self._open(failure)
                self._tried.set()
            else:
                if not self.up:
                    self._reached()
                    reached = clock()
                if await self._lost_within(LOOK_EVERY_S) and clock() - reached > LONGEST_WAIT_S:
                    wait_s = FIRST_WAIT_S
            if not self.up:
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _open(self, failure: StoreFailure) -> None:
        if self._trouble is None or not self._tried.is_set() or self._trouble[0] is not failure.trouble:
            log.warning("store: %s", failure)
        self._trouble = (failure.trouble, str(failure))
        self._lost.set()

    def _reached(self) -> None:
        if self._lost.is_set():
            self.recoveries += 1
            log.warning("store: %s answers again", self._shown)
        self._trouble, self._timeouts = None, 0
        self._lost.clear()
        self._tried.set()

    async def _lost_within(self, limit_s: float) -> bool:
        try:
            async with asyncio.timeout(limit_s):
                await self._lost.wait()
        except TimeoutError:
            return False
        return True

    async def _try(self) -> None:
        async with asyncio.timeout(self._connect_timeout_s):
            await self._servers.connect()
            nodes = await self._servers.nodes()
            await self._look_at_policies(nodes)
        async with asyncio.timeout(self._timeout_s):  # connecting may take long, answering may not
            for replies in await asyncio.gather(*(node.ask([(b"PING",)]) for node in nodes)):
                checked(replies[0])

    async def _look_at_policies(self, nodes: Sequence[RedisNode]) -> None:
        policy = None
        for node in nodes:
            (reply,) = await node.ask([(b"INFO", b"memory")])
            if isinstance(reply, NoPermissionError):
                continue  # it cannot be known then; most hosts of Redis permit INFO
            policy = policy or evicting_policy(checked(reply))
        if policy and policy != self._policy:
            log.warning("store: %s has maxmemory-policy %s: reads go on, events are refused", self._shown, policy)
        self._policy = policy

    def _count(self, failure: StoreFailure) -> None:
        with self._lock:
            self._failures[failure.trouble.value] += 1


def evicting_policy(info: Reply) -> str | None:
    """The memory policy in INFO's text, if it may throw away keys that never expire and memory is limited."""
    if not isinstance(info, bytes):
        return None
    lines = (line.partition(":") for line in info.decode().splitlines())
    facts = {name: value for name, _, value in lines}
    policy = facts.get("maxmemory_policy", "")
    return policy if facts.get("maxmemory", "0") != "0" and policy.startswith("allkeys-") else None
