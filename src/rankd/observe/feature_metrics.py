"""The figures of feature stores and their caches as Prometheus metrics, read when they are scraped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from rankd.observe.shown import ShownFigures
from rankd.types import RowCounts


@dataclass(frozen=True, slots=True)
class RowFigures:
    """What a table of rows did since it was opened, and what its cache holds now. `oldest_seconds` is the age of the
    oldest row that was used since the last snapshot; `shared` counts keys that another request was fetching already."""

    counts: RowCounts = field(default_factory=RowCounts)
    fetched: int = 0
    shared: int = 0
    oldest_seconds: float = 0.0
    cached_rows: int = 0
    cache_bytes: int = 0
    budget_bytes: int = 0
    evicted: int = 0
    generation: int = 0


@dataclass(frozen=True, slots=True)
class HistoryFigures:
    """What a table of histories did: requests by freshness, `asked` of a remote store, `sent` by it because they were
    not the ones here; what is kept here; appends that are not delivered."""

    freshness: Mapping[str, int] = field(default_factory=dict)
    asked: int = 0
    sent: int = 0
    kept: int = 0
    kept_bytes: int = 0
    budget_bytes: int = 0
    undelivered: int = 0


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """What a store did; `trouble` is empty while it works."""

    up: bool = True
    trouble: str = ""
    failures: Mapping[str, int] = field(default_factory=dict)
    read_keys: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    recoveries: int = 0


@dataclass(frozen=True, slots=True)
class FeatureFigures:
    """Everything about the features of one namespace."""

    store: StoreFigures
    tables: Mapping[str, RowFigures]
    histories: HistoryFigures


class FeatureCollector(ShownFigures[str, FeatureFigures]):
    """Metrics of all namespaces, as they were last shown."""

    def collect(self) -> Iterator[Metric]:
        """All figures of all namespaces."""
        yield from self._rows()
        yield from self._tables()
        yield from self._histories()
        yield from self._stores()

    def _rows(self) -> Iterator[Metric]:
        rows = CounterMetricFamily(
            "rankd_feature_rows",
            "Rows that answers were made of, by where their values came from.",
            labels=("namespace", "table", "source"),
        )
        for namespace, figures in self._shown.items():
            for table, one in figures.tables.items():
                for source in ("fresh", "stale", "default", "absent", "wrong_schema"):
                    rows.add_metric((namespace, table, source), getattr(one.counts, source))
        yield rows

    def _tables(self) -> Iterator[Metric]:
        labels = ("namespace", "table")
        for kind, name, text, attribute in (
            (CounterMetricFamily, "rankd_feature_fetched_rows", "Rows asked of the store.", "fetched"),
            (CounterMetricFamily, "rankd_feature_shared_rows", "Rows another request was fetching already.", "shared"),
            (CounterMetricFamily, "rankd_feature_evicted_rows", "Rows that left the cache for others.", "evicted"),
            (GaugeMetricFamily, "rankd_feature_cached_rows", "Rows in the cache.", "cached_rows"),
            (GaugeMetricFamily, "rankd_feature_cache_bytes", "Memory of the cache.", "cache_bytes"),
            (GaugeMetricFamily, "rankd_feature_cache_budget_bytes", "Memory it may take.", "budget_bytes"),
            (GaugeMetricFamily, "rankd_feature_oldest_seconds", "Age of the oldest row used.", "oldest_seconds"),
            (GaugeMetricFamily, "rankd_feature_generation", "The loading that is read; 0: none.", "generation"),
        ):
            family = kind(name, text, labels=labels)
            for namespace, figures in self._shown.items():
                for table, one in figures.tables.items():
                    family.add_metric((namespace, table), getattr(one, attribute))
            yield family

    def _histories(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "rankd_histories", "Histories used by how new they were.", labels=("namespace", "freshness")
        )
        for namespace, figures in self._shown.items():
            for freshness, number in figures.histories.freshness.items():
                requests.add_metric((namespace, freshness), number)
        yield requests
        for kind, name, text, attribute in (
            (CounterMetricFamily, "rankd_histories_asked", "Reads of a history from a remote store.", "asked"),
            (CounterMetricFamily, "rankd_histories_sent", "Of these, how many brought a new record.", "sent"),
            (GaugeMetricFamily, "rankd_histories_kept", "Histories kept in memory.", "kept"),
            (GaugeMetricFamily, "rankd_history_bytes", "Memory of kept histories.", "kept_bytes"),
            (GaugeMetricFamily, "rankd_history_budget_bytes", "Memory they may take.", "budget_bytes"),
            (GaugeMetricFamily, "rankd_undelivered_appends", "In the outbox, not yet in the store.", "undelivered"),
        ):
            family = kind(name, text, labels=("namespace",))
            for namespace, figures in self._shown.items():
                family.add_metric((namespace,), getattr(figures.histories, attribute))
            yield family

    def _stores(self) -> Iterator[Metric]:
        labels = ("namespace",)
        failures = CounterMetricFamily(
            "rankd_store_failures", "Calls to the store that failed, by what was wrong.", labels=(*labels, "trouble")
        )
        for namespace, figures in self._shown.items():
            for what, number in figures.store.failures.items():
                failures.add_metric((namespace, what), number)
        yield failures
        trouble = GaugeMetricFamily(
            "rankd_store_trouble", "1 for what is wrong with the store now.", labels=(*labels, "trouble")
        )
        for namespace, figures in self._shown.items():
            if figures.store.trouble:
                trouble.add_metric((namespace, figures.store.trouble), 1)
        yield trouble
        for kind, name, text, attribute in (
            (GaugeMetricFamily, "rankd_store_up", "1 while the store answers.", "up"),
            (CounterMetricFamily, "rankd_store_read_keys", "Keys read.", "read_keys"),
            (CounterMetricFamily, "rankd_store_read_bytes", "Bytes of values read.", "read_bytes"),
            (CounterMetricFamily, "rankd_store_written_bytes", "Bytes of values written.", "written_bytes"),
            (CounterMetricFamily, "rankd_store_recoveries", "How often the store came back.", "recoveries"),
        ):
            family = kind(name, text, labels=labels)
            for namespace, figures in self._shown.items():
                family.add_metric((namespace,), float(getattr(figures.store, attribute)))
            yield family
