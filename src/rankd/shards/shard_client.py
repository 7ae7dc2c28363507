"""The client of one shard: its replicas, which of them is asked, and after what time a second one is."""

from __future__ import annotations

import itertools
import queue
import ssl
import threading
import time
from collections.abc import Mapping, Sequence

import msgspec

from rankd.errors import RankdError, ShardFailure, Trouble
from rankd.shards.frames import Kind
from rankd.shards.handshake import introduce
from rankd.shards.hedging import Hedging
from rankd.shards.replica import Backoff, Replica
from rankd.shards.shard_config import ShardClientConfig
from rankd.shards.shard_layout import ServedNet, Shard
from rankd.shards.shard_link import Outcome, Question, ShardLink
from rankd.shards.shard_stats import ShardStats
from rankd.shards.transport import client_tls, connect, parse_address
from rankd.types import Array

NUMBERS = itertools.count(1)
"""Of requests: one row for all shards, so that no two ever have the same. `next` of it is atomic."""


class ShardClient:
    """Asks a shard of a plan, which is to serve `nets`.

    Raises:
        ConfigError: an address or security that cannot be.
    """

    def __init__(self, shard: Shard, plan: str, nets: tuple[ServedNet, ...], config: ShardClientConfig) -> None:
        self.name, self._plan, self._nets, self._config = shard.name, plan, nets, config
        self.hedging = Hedging(config.hedge_quantile, config.hedge_least_ms / 1e3, config.hedge_share)
        self._changed = threading.Condition()
        self.generation = 0
        """How many connections were made; an answer that comes on one is of this number or an earlier one."""
        self._said_last: Mapping[str, str] = {}
        tls = client_tls(config.security)
        self._replicas = [self._replica(address, tls) for address in shard.addresses]

    def start(self) -> None:
        """Begin to connect; `wait_up` waits for it."""
        for replica in self._replicas:
            replica.start()

    def close(self) -> None:
        """End all connections. Whoever waits is told."""
        for replica in self._replicas:
            replica.close()

    def wait_up(self, until: float) -> None:
        """Do nothing if a replica can be asked by then (seconds of `time.perf_counter`).

        Raises:
            ShardFailure: none can.
        """
        with self._changed:
            up = self._changed.wait_for(lambda: self.replicas_up > 0, max(until - time.perf_counter(), 0.0))
        if not up:
            raise self.failure()

    @property
    def replicas_up(self) -> int:
        """How many replicas can be asked."""
        return sum(replica.link is not None for replica in self._replicas)

    def contents(self) -> dict[str, str]:
        """The `content` of each table that it has parts of, see `TableSource.contents`."""
        said = [link.contents for replica in self._replicas if (link := replica.link) is not None] or [self._said_last]
        names = {served.part.table for net in self._nets for served in net.parts}
        ways = {name: {one.get(name, "") for one in said} for name in names}
        return {name: found.pop() if len(found) == 1 else "" for name, found in ways.items()}

    def ask(self, question: Question, asked: Sequence[ShardLink]) -> ShardLink | None:
        """Send a request to the replica that owes the fewest answers, of those not `asked` yet; None if there is none.

        Raises:
            PayloadTooLarge: no shard takes so much.
        """
        links = [link for replica in self._replicas if (link := replica.link) is not None and link not in asked]
        start = question.number % max(len(links), 1)  # of equals not always the same
        for link in sorted(links[start:] + links[:start], key=lambda link: link.load):
            if link.ask(question):
                return link
        return None

    def has_another(self, asked: Sequence[ShardLink]) -> bool:
        """Whether a replica can be asked that is not `asked` yet."""
        return any((link := replica.link) is not None and link not in asked for replica in self._replicas)

    def failure(self) -> ShardFailure:
        """Why no replica can be asked."""
        troubles = [replica.trouble for replica in self._replicas]
        reasons = "; ".join(sorted({str(trouble) for trouble in troubles}))
        kinds = {trouble.trouble for trouble in troubles if isinstance(trouble, ShardFailure)}
        kind = kinds.pop() if len(kinds) == 1 else Trouble.DOWN
        return ShardFailure(f"shard '{self.name}' cannot be asked: {reasons}", kind)

    def stats(self, within_s: float) -> dict[str, ShardStats]:
        """What each replica that can be asked has done, by address; those that do not answer in time are left out.

        Raises:
            ShardFailure: one answers something else.
        """
        inbox: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        deadline, addresses = time.perf_counter() + within_s, {}
        for replica in self._replicas:
            question = Question(next(NUMBERS), Kind.STATS, (), None, deadline, inbox.put)
            link = replica.link
            if link is not None and link.ask(question):
                addresses[question.number] = replica.address
        found: dict[str, ShardStats] = {}
        while addresses:
            try:
                outcome = inbox.get(timeout=max(deadline - time.perf_counter(), 0.0))
            except queue.Empty:
                break
            address = addresses.pop(outcome.number)
            if outcome.payload is not None:
                found[address] = _read_stats(outcome.payload, address)
        return found

    def _replica(self, address: str, tls: ssl.SSLContext | None) -> Replica:
        parse_address(address)
        config = self._config
        backoff = Backoff(config.first_wait_seconds, config.longest_wait_seconds)
        return Replica(address, lambda: self._connect(address, tls), backoff, self._changed)

    def _connect(self, address: str, tls: ssl.SSLContext | None) -> ShardLink:
        shown = f"shard '{self.name}' at {address}"
        config = self._config
        until = time.perf_counter() + config.connect_seconds
        stream = connect(address, tls, config.connect_seconds)
        try:
            stream.shake_hands(until)
            ready = introduce(stream, self._plan, self._nets, config.security.secret, until, shown)
        except (OSError, RankdError):
            stream.close()
            raise
        with self._changed:
            self.generation += 1
            self._said_last = ready.contents
        return ShardLink(stream, ready, config, shown)


def _read_stats(payload: Array, address: str) -> ShardStats:
    try:
        return msgspec.json.decode(payload.data, type=ShardStats)
    except msgspec.DecodeError as error:
        raise ShardFailure(f"shard at {address} sent stats that cannot be read: {error}", Trouble.BROKEN) from error
