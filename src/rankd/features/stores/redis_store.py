"""The store in Redis or Valkey, one server or a cluster: shared by every process of every machine.

In: keys and values (`store_keys.py`), from any thread. Out: Futures that end in time. One thread runs an event loop
(`redis_loop.py`) that talks to a server or a cluster (`redis_node.py`, `redis_cluster.py`), a breaker keeps requests
from waiting for one that is gone (`redis_health.py`), and a subscription hears of appends (`redis_listener.py`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from redis.exceptions import NoScriptError

from rankd.features.stores.done_futures import answered, refused
from rankd.features.stores.feature_store import Heard, HistoryRead, Pair, StoreFailure, StoreHealth, Trouble
from rankd.features.stores.redis_address import RedisAddress
from rankd.features.stores.redis_cluster import RedisCluster
from rankd.features.stores.redis_failures import COMPLAINTS
from rankd.features.stores.redis_health import RedisHealth, Servers
from rankd.features.stores.redis_listener import Listener
from rankd.features.stores.redis_loop import LoopThread
from rankd.features.stores.redis_node import Command, RedisNode, Reply, checked
from rankd.features.stores.redis_scripts import APPEND, CHANNEL, EXCHANGE, HISTORY, Script
from rankd.features.stores.store_config import StoreConfig

KEYS_A_SCAN = 1000
_GLOB = re.compile(rb"([*?\[\]\\])")
T = TypeVar("T")


class RedisStore:
    """Rows and histories in Redis. Thread-safe; not to be used after a fork. It connects in the background.

    A read takes at most `timeout_ms`, a write `write_timeout_ms`. A write that ran out of time may still happen. Append
    again: an event that is there is not added twice.
    """

    local = False

    def __init__(self, address: RedisAddress, config: StoreConfig) -> None:
        self._read_s, self._write_s = config.timeout_ms / 1e3, config.write_timeout_ms / 1e3
        self._address = address
        self._read_keys = self._read_bytes = self._written_bytes = 0  # changed on the loop
        self._listeners: list[Listener] = []
        self._loop = LoopThread("rankd-redis")
        self._servers: Servers = (
            RedisCluster(address, config.max_connections)
            if address.cluster
            else RedisNode(address, address.place, config.max_connections)
        )
        self._health = RedisHealth(self._servers, address.shown, self._read_s, self._write_s)
        self._loop.spawn(self._health.watch)

    def get(self, keys: Sequence[bytes]) -> Future[list[bytes | None]]:
        """The values of some keys in their order. On one server a value that is no string counts as none."""

        async def read() -> list[bytes | None]:
            values = await self._servers.get(keys)
            self._count_read(values)
            return values

        return self._within(self._read_s, read) if keys else answered([])

    def put(self, pairs: Sequence[Pair]) -> Future[None]:
        """Write values over what is there; if it fails, some of them may have been written."""

        async def write() -> None:
            await self._all([(b"SET", key, value) for key, value in pairs])
            self._written_bytes += sum(len(value) for _, value in pairs)

        return self._within(self._write_s, write) if pairs else answered(None)

    def delete(self, keys: Sequence[bytes]) -> Future[None]:
        """Remove keys; if it fails, some of them may be gone."""

        async def remove() -> None:
            await self._all([(b"UNLINK", key) for key in keys])

        return self._within(self._write_s, remove) if keys else answered(None)

    def exchange(self, key: bytes, expected: bytes | None, value: bytes) -> Future[bool]:
        """Write a value if the one there is `expected`."""

        async def compare() -> bool:
            written = await self._run(EXCHANGE, key, value, *([] if expected is None else [expected]))
            self._written_bytes += len(value) if written else 0
            return bool(written)

        return self._within(self._write_s, compare)

    def history(self, key: bytes, mark: bytes = b"") -> Future[HistoryRead]:
        """A history record, unless its first bytes are `mark`: then they do not travel."""

        async def compare() -> HistoryRead:
            reply = await self._run(HISTORY, key, mark)
            record = reply if isinstance(reply, bytes) else None
            self._count_read([record])
            return HistoryRead(changed=reply != 0, record=record)

        return self._within(self._read_s, compare)

    def append(self, key: bytes, records: bytes, most: int) -> Future[bytes]:
        """Add event records to a history and tell everybody who listens. Refused where histories may be evicted."""

        async def change() -> bytes:
            evicting = self._health.eviction()
            if evicting is not None:
                raise evicting
            header = await self._run(APPEND, key, records, most, CHANNEL)
            if not isinstance(header, bytes):
                raise StoreFailure(f"{self._address.shown} answered an append with {header!r}", Trouble.BROKEN)
            self._written_bytes += len(records)
            return header

        return self._within(self._write_s, change)

    def append_many(self, appends: Sequence[Pair], most: int) -> list[Future[bytes]]:
        """Add event records to several histories; they travel together."""
        return [self.append(key, records, most) for key, records in appends]

    def keys(self, prefix: bytes) -> Iterator[list[bytes]]:
        """All keys that begin with a prefix; one may come twice while Redis resizes its table."""
        pattern = _GLOB.sub(rb"\\\1", prefix) + b"*"
        for node in self._within(self._write_s, self._servers.nodes).result():
            cursor = b"0"
            while True:
                found = self._within(self._write_s, partial(self._scan, node, cursor, pattern)).result()
                cursor = found[0]
                if found[1]:
                    yield found[1]
                if cursor == b"0":
                    break

    def listen(self, heard: Heard) -> None:
        """Have every append from now on told to `heard`, on the store's thread."""
        listener = Listener(self._servers, self._address.shown, self._write_s, heard)
        self._listeners.append(listener)
        self._loop.spawn(listener.run)

    def listening(self) -> int:
        """0 while appends may be missed; else a number that is another one after each time they were."""
        numbers = [listener.number() for listener in self._listeners]
        return sum(numbers) if all(numbers) else 0

    def health(self) -> StoreHealth:
        """A snapshot."""
        return StoreHealth(
            up=self._health.up,
            trouble=self._health.trouble,
            failures=self._health.failures(),
            read_keys=self._read_keys,
            read_bytes=self._read_bytes,
            written_bytes=self._written_bytes,
            recoveries=self._health.recoveries,
        )

    def close(self) -> None:
        """Wait for what was asked, which ends in time, and close all connections."""
        self._loop.close(self._close_connections)

    def _within(self, limit_s: float, work: Callable[[], Awaitable[T]]) -> Future[T]:
        refusal = self._health.refusal()
        if refusal is not None:
            return refused(refusal)
        return self._loop.submit(lambda: self._limited(limit_s, work))

    async def _limited(self, limit_s: float, work: Callable[[], Awaitable[T]]) -> T:
        """Work that ends with a result or a StoreFailure.

        Raises:
            StoreFailure: it could not be done, or not in time.
        """
        try:
            async with asyncio.timeout(limit_s):
                await self._health.tried()
                refusal = self._health.refusal()
                if refusal is None:
                    result = await work()
        except StoreFailure as failure:
            self._health.failed(failure)
            raise
        except COMPLAINTS as error:
            raise self._health.failed(error) from error
        if refusal is not None:
            raise refusal
        self._health.worked()
        return result

    async def _all(self, commands: Sequence[Command]) -> None:
        for reply in await self._servers.ask(commands):
            checked(reply)

    async def _run(self, script: Script, key: bytes, *arguments: bytes | int) -> Reply:
        (reply,) = await self._servers.ask([script.by_digest(key, *arguments)])
        if isinstance(reply, NoScriptError):
            (reply,) = await self._servers.ask([script.by_text(key, *arguments)])
        return checked(reply)

    async def _scan(self, node: RedisNode, cursor: bytes, pattern: bytes) -> tuple[bytes, list[bytes]]:
        (reply,) = await node.ask([(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", KEYS_A_SCAN)])
        following, found = checked(reply)
        return following, found

    async def _close_connections(self) -> None:
        try:
            async with asyncio.timeout(self._write_s):
                await self._servers.close()
        except COMPLAINTS:  # it is gone already, or does not say goodbye
            return

    def _count_read(self, values: Sequence[bytes | None]) -> None:
        self._read_keys += len(values)
        self._read_bytes += sum(map(len, filter(None, values)))
