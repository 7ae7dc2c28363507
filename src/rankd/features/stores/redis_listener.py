"""Hears of every append in Redis, on a connection of its own that is made again whenever it breaks.

In: messages on `redis_scripts.CHANNEL`. Out: calls with the key and the records. Between two subscriptions appends may
be missed, so each has a number of its own; whoever remembers the number knows.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable

from redis.asyncio.connection import Connection

from rankd.features.stores.feature_store import Heard
from rankd.features.stores.redis_failures import COMPLAINTS, failure_of
from rankd.features.stores.redis_health import FIRST_WAIT_S, LONGEST_WAIT_S, Servers
from rankd.features.stores.redis_node import Reply
from rankd.features.stores.redis_scripts import CHANNEL, appended_message

PING_EVERY_S = 0.5
SILENT_S = 2.0  # a subscription that is not heard of for longer does not count as one

log = logging.getLogger("rankd")


class Listener:
    """A subscription. `heard` is called on the store's loop, so it has to be quick.

    In a cluster any node tells of the appends on all of them. Should the link between two nodes break, what is told
    meanwhile is lost without notice; whoever keeps histories has to ask again now and then all the same.
    """

    def __init__(self, servers: Servers, shown: str, connect_timeout_s: float, heard: Heard) -> None:
        self._servers, self._shown, self._heard = servers, shown, heard
        self._connect_timeout_s = connect_timeout_s
        self._subscriptions = 0
        self._alive: tuple[int, float] = (0, 0.0)  # the subscription's number and when it was last heard of

    def number(self, clock: Callable[[], float] = time.monotonic) -> int:
        """The number of the subscription; 0 while there is none, or none that is heard of."""
        number, heard_s = self._alive
        return number if clock() - heard_s < SILENT_S else 0

    async def run(self) -> None:
        """Listen, for ever."""
        wait_s, last = FIRST_WAIT_S, None
        while True:
            before = self._subscriptions
            try:
                await self._subscribed()
            except COMPLAINTS as error:
                failure, _ = failure_of(error, self._shown)
                if failure.trouble is not last:
                    log.warning("store: not told of appends: %s", failure)
                last = failure.trouble
            if self._subscriptions > before:
                wait_s, last = FIRST_WAIT_S, None
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    async def _subscribed(self) -> None:
        """One subscription, from its beginning to its end, which is an error."""
        connection = None
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                connection = random.choice(await self._servers.nodes()).new_connection()
                await connection.connect()  # type: ignore[no-untyped-call]
                await connection.send_command("SUBSCRIBE", CHANNEL)
                await connection.read_response()
            self._subscriptions += 1
            await self._hear(connection)
        finally:
            self._alive = (0, 0.0)
            if connection is not None:
                await connection.disconnect(nowait=True)

    async def _hear(self, connection: Connection) -> None:
        loop_time, number = asyncio.get_running_loop().time, self._subscriptions
        self._alive = (number, time.monotonic())
        next_ping = loop_time()
        while True:
            if loop_time() >= next_ping:
                await connection.send_command("PING")
                next_ping = loop_time() + PING_EVERY_S
            reply = await connection.read_response(timeout=max(next_ping - loop_time(), 0.001))
            if reply is not None:
                self._alive = (number, time.monotonic())
                self._tell(reply)
            elif time.monotonic() - self._alive[1] > SILENT_S:
                raise TimeoutError

    def _tell(self, reply: Reply) -> None:
        if not isinstance(reply, list) or reply[0] != b"message" or not isinstance(reply[2], bytes):
            return
        told = appended_message(reply[2])
        if told is None:
            return
        try:
            self._heard(*told)
        except Exception:  # the edge: what others do with a message must not end the subscription
            log.exception("store: an append could not be passed on")
