"""A Redis cluster: each command goes to the server that holds its key's slot.

In: commands whose key stands where `_key_of` looks. Out: replies in the order of the commands. Where slots have moved
the server says where to ask: from now on, and the map is read anew (MOVED), or this one time (ASK).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Sequence

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, MovedError, ResponseError

from rankd.features.stores.feature_store import StoreFailure, Trouble
from rankd.features.stores.redis_address import Place, RedisAddress
from rankd.features.stores.redis_node import Command, RedisNode, Reply, checked

ROUNDS, PAUSE_S = 5, 0.002  # how often a command follows a slot that moves
_SCRIPTS = (b"EVALSHA", b"EVAL")


class RedisCluster:
    """The primaries of a cluster. For one event loop."""

    def __init__(self, address: RedisAddress, max_connections: int) -> None:
        self._address, self._max_connections = address, max_connections
        self._nodes: dict[Place, RedisNode] = {}
        self._owners: list[RedisNode | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._sources: deque[Place] = deque([address.place])  # who may be asked for the map; who fails goes behind
        self._reading = asyncio.Lock()
        self._maps_read = 0

    async def connect(self) -> None:
        """Read the map and make all connections.

        Raises:
            StoreFailure, RedisError, OSError: a primary cannot be reached, or the server is not one of a cluster.
        """
        await self._read_map(self._maps_read)
        await asyncio.gather(*(node.warm() for node in await self.nodes()))

    async def ask(self, commands: Sequence[Command]) -> list[Reply | ResponseError]:
        """The replies to some commands, those for one server sent together.

        Raises:
            StoreFailure, RedisError, OSError: one of the servers cannot be reached, or a slot has none.
        """
        replies: list[Reply | ResponseError] = [None] * len(commands)
        waiting = {number: (self._owner(_key_of(command)), False) for number, command in enumerate(commands)}
        for round_number in range(ROUNDS):
            map_number = self._maps_read
            by_node: defaultdict[tuple[RedisNode, bool], list[int]] = defaultdict(list)
            for number, target in waiting.items():
                by_node[target].append(number)
            answers = await asyncio.gather(
                *(
                    _conversation(node, asking, [commands[n] for n in asked])
                    for (node, asking), asked in by_node.items()
                )
            )
            waiting = {}
            for ((node, _), asked), found in zip(by_node.items(), answers, strict=True):
                for number, reply in zip(asked, found, strict=True):
                    replies[number] = reply
                    if isinstance(reply, AskError):
                        named = self._node((reply.host or node.place[0], reply.port))
                        waiting[number] = named, not isinstance(reply, MovedError)
            if not waiting:
                break
            if any(isinstance(replies[number], MovedError) for number in waiting):
                await self._read_map(map_number)
            await asyncio.sleep(round_number * PAUSE_S)  # servers may disagree for a moment
        return replies

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of some keys in their order. An MGET would have to stay in one slot, so it is a GET for each."""
        return [checked(reply) for reply in await self.ask([(b"GET", key) for key in keys])]

    async def nodes(self) -> list[RedisNode]:
        """The primaries that hold slots."""
        if not self._maps_read:
            await self._read_map(0)
        return list({id(node): node for node in self._owners if node is not None}.values())

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(node.close() for node in self._nodes.values()))

    def _owner(self, key: bytes) -> RedisNode:
        node = self._owners[key_slot(key)]
        if node is None:
            raise StoreFailure(
                f"{self._address.shown}: no server holds slot {key_slot(key)}; look at CLUSTER INFO", Trouble.DOWN
            )
        return node

    def _node(self, place: Place) -> RedisNode:
        if place not in self._nodes:
            self._nodes[place] = RedisNode(self._address, place, self._max_connections)
        return self._nodes[place]

    async def _read_map(self, known: int) -> None:
        """Ask who holds which slots, unless somebody has since map number `known`."""
        async with self._reading:
            if self._maps_read != known:
                return
            place = self._sources[0]
            try:
                (reply,) = await self._node(place).ask([(b"CLUSTER", b"SLOTS")])
                ranges = checked(reply)
            except BaseException:  # cancelled too, which is how a server that is silent shows
                self._sources.rotate(-1)
                raise
            await self._take_map(place, ranges)

    async def _take_map(self, source: Place, ranges: list[list[Reply]]) -> None:
        """A reply to CLUSTER SLOTS: for each range its first slot, its last, the primary's host and port, replicas."""
        owners: list[RedisNode | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        places = [source]
        for first, last, *holders in ranges:
            names = [(host.decode() or source[0], port) for host, port, *_ in holders]
            owners[first : last + 1] = [self._node(names[0])] * (last - first + 1)
            places += names
        self._owners, self._maps_read = owners, self._maps_read + 1
        self._sources = deque(dict.fromkeys(places))
        gone = [place for place in self._nodes if place not in self._sources]
        for place in gone:
            await self._nodes.pop(place).close()


async def _conversation(node: RedisNode, asking: bool, commands: list[Command]) -> list[Reply | ResponseError]:
    """A server's replies; `asking` says before each command that it was sent here by ASK."""
    if not asking:
        return await node.ask(commands)
    replies = await node.ask([one for command in commands for one in ((b"ASKING",), command)])
    return replies[1::2]


def _key_of(command: Command) -> bytes:
    key = command[3 if command[0] in _SCRIPTS else 1]
    if not isinstance(key, bytes):
        raise TypeError(f"the command {command[0]!r} has no key where one is looked for")
    return key
