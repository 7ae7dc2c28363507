"""What look-ups of embedding tables did, and the metrics of it: how long requests waited, and how shards are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from rankd.observe.shown import Key, ShownFigures


@dataclass(frozen=True, slots=True)
class TableFigures:
    """A snapshot: look-ups since the start and the seconds that requests waited for them; calls of shards by what
    became of them, and how many replicas of each shard can be asked; rows by where they were looked up, and the bytes
    of those that are kept here. All of this is empty where all tables are in this process. `generation` is that of the
    placement in use, 0 where it does not change."""

    lookups: int = 0
    seconds: float = 0.0
    calls: Mapping[str, int] = field(default_factory=dict)
    replicas: Mapping[str, int] = field(default_factory=dict)
    generation: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)
    kept_bytes: int = 0


class TableCollector(ShownFigures[Key, TableFigures]):
    """Metrics of all model versions that have tables beside their graphs, as they were last shown."""

    def collect(self) -> Iterator[Metric]:
        """All figures of all versions."""
        labels = ("model", "version")
        lookups = CounterMetricFamily("rankd_table_lookups", "Look-ups of embedding tables.", labels=labels)
        seconds = CounterMetricFamily("rankd_table_lookup_seconds", "What requests waited for them.", labels=labels)
        calls = CounterMetricFamily("rankd_shard_calls", "Calls of shards by what became.", labels=(*labels, "what"))
        replicas = GaugeMetricFamily("rankd_shard_replicas", "That can be asked.", labels=(*labels, "shard"))
        generation = GaugeMetricFamily("rankd_table_generation", "Of the placement in use.", labels=labels)
        rows = CounterMetricFamily("rankd_table_rows", "Looked up, by where they were.", labels=(*labels, "where"))
        kept = GaugeMetricFamily("rankd_table_kept_bytes", "Hot rows of shards that are kept here.", labels=labels)
        for key, figures in self._shown.items():
            generation.add_metric(key, figures.generation)
            lookups.add_metric(key, figures.lookups)
            seconds.add_metric(key, figures.seconds)
            for what, count in figures.calls.items():
                calls.add_metric((*key, what), count)
            for shard, count in figures.replicas.items():
                replicas.add_metric((*key, shard), count)
            for where, count in figures.rows.items():
                rows.add_metric((*key, where), count)
            kept.add_metric(key, figures.kept_bytes)
        yield from (lookups, seconds, calls, replicas, generation, rows, kept)
