"""What all versions of a model share of its features: tables of rows, histories, and the store and outbox behind them.

`FeatureService` is a server's: one store, one outbox, and a `SharedFeatures` for each namespace.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rankd.errors import ConfigError
from rankd.features.cache.row_cache import RowCache
from rankd.features.feature_config import FeatureConfig
from rankd.features.reading.history_table import HistoryTable
from rankd.features.reading.outbox import Outbox
from rankd.features.reading.row_table import RowTable
from rankd.features.stores.feature_store import FeatureStore, StoreFailure, StoreHealth
from rankd.features.stores.open_store import open_store
from rankd.gate import Alarm
from rankd.observe.feature_metrics import FeatureFigures, StoreFigures

log = logging.getLogger("rankd")
LOOK_SECONDS = 1.0
FIRST_LOOK_SECONDS = 2.0
ITEMS, USERS, HISTORIES = "items", "users", "histories"
MakeCache = Callable[[int, int], RowCache]


class SharedFeatures:
    """The features of one namespace."""

    def __init__(
        self,
        namespace: str,
        config: FeatureConfig,
        store: FeatureStore,
        outbox: Outbox | None,
        alarm: Alarm,
        make_cache: MakeCache = RowCache,
    ) -> None:
        self.namespace, self.config, self.store, self.alarm = namespace, config, store, alarm
        self.items = RowTable(ITEMS, namespace, store, config.items, make_cache)
        self.users = RowTable(USERS, namespace, store, config.users, make_cache)
        self.histories = HistoryTable(namespace, store, config.histories, outbox)

    def look(self) -> None:
        """Follow what the store says of the tables.

        Raises:
            StoreFailure, ConfigError: as `RowTable.look`, of one of them; the other one is followed all the same.
        """
        try:
            self.items.look()
        finally:
            self.users.look()

    def figures(self) -> FeatureFigures:
        """A snapshot."""
        tables = {table.table: table.figures() for table in (self.items, self.users)}
        return FeatureFigures(_store_figures(self.store.health()), tables, self.histories.figures())


class FeatureService:
    """The feature store of a server. `start()` connects and looks, `close()` ends it.

    `store` is used in place of the configured one; it is closed with the service.

    Raises:
        ConfigError: a store or an outbox that cannot be used.
    """

    def __init__(
        self, config: FeatureConfig, store: FeatureStore | None = None, make_cache: MakeCache = RowCache
    ) -> None:
        self.config, self._make_cache = config, make_cache
        self.store = store if store is not None else open_store(config.store)
        self._alarm = Alarm()
        self._outbox: Outbox | None = None
        if config.outbox and not self.store.local:
            try:
                self._outbox = Outbox(Path(config.outbox), self.store, config.outbox_keep_seconds)
            except BaseException:
                self.store.close()
                raise
        self._shared: dict[str, SharedFeatures] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="rankd-tables", daemon=True)
        self._said = ""

    def start(self) -> None:
        """Begin to follow the tables and to deliver the outbox."""
        if self._outbox is not None:
            self._outbox.start()
        self._thread.start()

    def of(self, model: str) -> SharedFeatures:
        """The features of a model; its tables have been looked for once, if the store answers."""
        namespace = self.config.namespace or model
        with self._lock:
            shared = self._shared.get(namespace)
            if shared is None:
                shared = SharedFeatures(namespace, self.config, self.store, self._outbox, self._alarm, self._make_cache)
                self._first_look(shared)
                self._shared[namespace] = shared
            return shared

    def figures(self) -> dict[str, FeatureFigures]:
        """Snapshots by namespace."""
        return {namespace: shared.figures() for namespace, shared in list(self._shared.items())}

    def close(self) -> None:
        """Finish what is under way; nothing is asked after this."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._outbox is not None:
            self._outbox.close()
        self._alarm.close()
        self.store.close()

    def _first_look(self, shared: SharedFeatures) -> None:
        """Give a store that is still connecting a moment; without it the tables are found later."""
        until = time.monotonic() + FIRST_LOOK_SECONDS
        while True:
            try:
                return shared.look()
            except StoreFailure as error:
                if time.monotonic() > until:
                    self._say(f"the feature store does not answer; its rows will be used when it does: {error}")
                    return None
            time.sleep(0.02)

    def _follow(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            trouble = ""
            for shared in list(self._shared.values()):
                try:
                    shared.look()
                except StoreFailure as error:
                    trouble = f"the feature store does not answer: {error}"
                except ConfigError as error:
                    trouble = f"a table of '{shared.namespace}' cannot be read: {error}"
            self._say(trouble)

    def _say(self, what: str) -> None:
        """Log what changed, once."""
        if what.partition(":")[0] == self._said:
            return
        if what:
            log.warning("%s", what)
        elif self._said:
            log.info("the feature store answers again")
        self._said = what.partition(":")[0]


def _store_figures(health: StoreHealth) -> StoreFigures:
    return StoreFigures(
        up=health.up,
        trouble=health.trouble.value if health.trouble is not None else "",
        failures=health.failures,
        read_keys=health.read_keys,
        read_bytes=health.read_bytes,
        written_bytes=health.written_bytes,
        recoveries=health.recoveries,
    )
