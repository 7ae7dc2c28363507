"""All shards of a layout as one `Pooling`.

In: JaggedIds over whole tables. Out: their sums, as if all tables were here: the same to the bit each time, since parts
of a table are added in the order of their remainders. `begin` sends and returns, so that its caller has other work done
meanwhile; `pool` also waits. Next: `routing.py`, then `pending.py`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from rankd.embeddings.jagged import JaggedIds
from rankd.errors import ConfigError, Unavailable, nearest
from rankd.gate import Alarm
from rankd.shards.client_counts import ClientCounts, RowsFrom
from rankd.shards.hot_row_cache import HotRowCache
from rankd.shards.kept_rows import KeptRows
from rankd.shards.pending import Pending
from rankd.shards.routing import Router
from rankd.shards.shard_client import ShardClient
from rankd.shards.shard_config import ShardClientConfig, SumFormat, TableDefault
from rankd.shards.shard_layout import ShardLayout
from rankd.shards.shard_stats import ShardStats
from rankd.types import Float32Array, Int64Array

FETCH_SECONDS = 5.0
"""That shards have for rows that are to be kept here."""


class ShardedPooling:
    """Asks the shards of a layout. `hot_rows`: of which tables how many rows are kept here. Thread-safe.

    Raises:
        ConfigError: the layout does not hold together, or the configuration does not fit it.
    """

    def __init__(
        self, layout: ShardLayout, config: ShardClientConfig, hot_rows: Mapping[str, int] | None = None
    ) -> None:
        self._router, self._config = Router(layout), config
        self._narrow = config.sums is SumFormat.BF16
        self._defaults = dict(_default(default, layout) for default in config.defaults)
        self._clients = [ShardClient(shard, layout.plan, layout.served_by(shard), config) for shard in layout.shards]
        self._counts, self._alarm = ClientCounts(), Alarm()
        self._hot: HotRowCache | None = None
        if hot_rows:
            self._hot = HotRowCache(self._router, hot_rows, self._rows_of, self._generation)

    def start(self) -> None:
        """Begin to connect; it goes on until `close`."""
        for client in self._clients:
            client.start()
        if self._hot is not None:
            self._hot.start()

    def wait_up(self, within_s: float) -> None:
        """Do nothing if each shard can be asked, at one replica at least, within this time.

        Raises:
            ShardFailure: one cannot.
        """
        until = time.perf_counter() + within_s
        for client in self._clients:
            client.wait_up(until)

    def replicas_up(self) -> dict[str, int]:
        """How many replicas of each shard can be asked."""
        return {client.name: client.replicas_up for client in self._clients}

    def contents(self) -> dict[str, str]:
        """See `TableSource.contents`; empty for a table of which two shards have different parts."""
        found: dict[str, str] = {}
        for client in self._clients:
            for table, content in client.contents().items():
                found[table] = content if found.get(table, content) == content else ""
        return found

    def close(self) -> None:
        """End all connections; whoever waits is told."""
        for client in self._clients:
            client.close()
        if self._hot is not None:
            self._hot.close()
        self._alarm.close()

    def begin(self, asked: Sequence[JaggedIds], deadline: float | None = None) -> Pending:
        """Ask all shards and do not wait; one call for each shard and net, however many questions. `deadline` in
        seconds of `time.perf_counter`, else `timeout_ms` from now.

        Raises:
            InvalidRequest: an unknown table, offsets that do not fit, an id outside of its table, or more than a shard
                takes at once.
        """
        if deadline is None:
            deadline = time.perf_counter() + self._config.timeout_ms / 1e3
        if self._hot is None:
            return self._send(asked, deadline, None, self._narrow)
        kept = self._hot.kept
        pending = self._send(asked, deadline, kept, self._narrow)
        if kept is not None and self._hot.kept is None:  # a shard came back meanwhile, maybe with other rows
            pending.forget()
            pending = self._send(asked, deadline, None, self._narrow)
        self._hot.saw(asked)
        return pending

    def _send(
        self, asked: Sequence[JaggedIds], deadline: float, kept: KeptRows | None, narrow: bool = False
    ) -> Pending:
        begun = time.perf_counter()
        routed = self._router.route(asked, None if kept is None else kept.index)
        pending = Pending(routed, self._defaults, deadline, self._counts, self._alarm, kept, narrow)
        pending.send(self._clients, begun)
        self._counts.add(RowsFrom.SHARDS, sum(routed.num_ids(call) for call in routed.calls))
        self._counts.add(RowsFrom.KEPT, 0 if routed.kept is None else routed.num_ids(routed.kept))
        return pending

    def pool(self, asked: JaggedIds) -> Float32Array:
        """As `Pooling.pool`; tables that cannot be had have their defaults.

        Raises:
            InvalidRequest: as `begin`.
            DeadlineExceeded: a table without a default was not there within `timeout_ms`.
            Unavailable: a table without a default could not be had.
        """
        return self.begin([asked]).result()[0].values

    def rows(self) -> dict[str, int]:
        """How many rows were looked up since the start, by `client_counts.RowsFrom` value."""
        return self._counts.snapshot(RowsFrom)

    def kept_bytes(self) -> int:
        """Of the rows that are kept here."""
        kept = None if self._hot is None else self._hot.kept
        return 0 if kept is None else kept.size_bytes

    def _rows_of(self, table: str, rows: Int64Array) -> Float32Array:
        """The numbers (n, dim) of rows (n,), asked of their shards one by one."""
        asked = JaggedIds((table,), np.arange(len(rows) + 1, dtype=np.int64), rows)
        (pooled,) = self._send([asked], time.perf_counter() + FETCH_SECONDS, None).result()
        if pooled.degraded:
            raise Unavailable(f"rows of table '{table}' could not be had")
        return pooled.values

    def _generation(self) -> int:
        return sum(client.generation for client in self._clients)

    def counts(self) -> dict[str, int]:
        """What was done since the start, by `client_counts.Counted` value."""
        return self._counts.snapshot()

    def stats(self, within_s: float) -> dict[str, ShardStats]:
        """What each replica that answers in time has done, by its address."""
        return {address: stats for client in self._clients for address, stats in client.stats(within_s).items()}


def _default(default: TableDefault, layout: ShardLayout) -> tuple[str, Float32Array]:
    specs = {spec.name: spec for net in layout.nets for spec in net.tables}
    if default.table not in specs:
        raise ConfigError(f"there is no table '{default.table}' to have a default.{nearest(default.table, specs)}")
    dim = specs[default.table].dim
    if default.vector and len(default.vector) != dim:
        raise ConfigError(
            f"the default of table '{default.table}' has {len(default.vector)} numbers; its rows have {dim}"
        )
    return default.table, np.asarray(default.vector or (0.0,) * dim, np.float32)
