"""The server's figures: Prometheus metrics for the on-call person, and plain sums for the protocol's statistics."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

import rankd
from rankd.observe.elastic_metrics import ElasticCollector
from rankd.observe.feature_metrics import FeatureCollector
from rankd.observe.schedule_metrics import ScheduleCollector
from rankd.observe.state_metrics import StateCollector
from rankd.observe.table_metrics import TableCollector
from rankd.types import Scores

STAGES = ("queue", "features", "encode", "score", "order", "total")
MILLISECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
CANDIDATES = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """What one model version has done since it was loaded; times are sums in nanoseconds."""

    successes: int = 0
    failures: int = 0
    queue_ns: int = 0
    features_ns: int = 0
    engine_ns: int = 0
    order_ns: int = 0
    total_ns: int = 0
    failed_ns: int = 0
    last_request_ms: int = 0


class ServerMetrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        model = ("model", "version")
        self._requests = Counter(
            "rankd_requests", "Rank requests by how they ended.", (*model, "outcome"), registry=self.registry
        )
        self._stages = Histogram(
            "rankd_stage_milliseconds",
            "Time of each stage of a rank request.",
            (*model, "stage"),
            buckets=MILLISECONDS,
            registry=self.registry,
        )
        self._candidates = Histogram(
            "rankd_candidates", "Candidates a request.", model, buckets=CANDIDATES, registry=self.registry
        )
        self._unknown = Counter(
            "rankd_unknown_candidates", "Candidates that the model has never heard of.", model, registry=self.registry
        )
        self._events = Counter("rankd_events", "Events appended to histories.", ("model",), registry=self.registry)
        self.ready = Gauge(
            "rankd_model_ready", "1 where a model version takes requests.", model, registry=self.registry
        )
        self.states = StateCollector()
        self.registry.register(self.states)
        self.schedules = ScheduleCollector()
        self.registry.register(self.schedules)
        self.tables = TableCollector()
        self.registry.register(self.tables)
        self.features = FeatureCollector()
        self.registry.register(self.features)
        self.elastic = ElasticCollector()
        self.registry.register(self.elastic)
        self._degraded = Counter(
            "rankd_degraded", "Answers that had to do without something.", (*model, "what"), registry=self.registry
        )
        Gauge("rankd_build_info", "Always 1.", ("release",), registry=self.registry).labels(rankd.__version__).set(1)
        self._statistics: dict[tuple[str, str], ModelStatistics] = {}
        self._children: dict[tuple[str, str], tuple[dict[str, Histogram], Histogram]] = {}
        self._lock = threading.Lock()

    def succeeded(self, scores: Scores) -> None:
        """Book an answered request."""
        key = (scores.model, scores.version)
        stages, candidates = self._children.get(key) or self._make_children(key)
        ms = scores.timings_ms
        for stage, histogram in stages.items():
            histogram.observe(ms[stage])
        candidates.observe(len(scores.candidates))
        self._requests.labels(*key, "ok").inc()
        for what in scores.degraded:
            self._degraded.labels(*key, what).inc()
        if scores.unknown:
            self._unknown.labels(*key).inc(len(scores.unknown))
        with self._lock:
            self._statistics[key] = _added(self._statistics.get(key, ModelStatistics()), ms)

    def failed(self, model: str, version: str, error: str, seconds: float) -> None:
        """Book a request that ended in an error of the given type."""
        self._requests.labels(model, version, error).inc()
        with self._lock:
            known = self._statistics.get((model, version), ModelStatistics())
            self._statistics[model, version] = replace(
                known, failures=known.failures + 1, failed_ns=known.failed_ns + int(seconds * 1e9)
            )

    def appended(self, model: str, events: int) -> None:
        """Book acknowledged events."""
        self._events.labels(model).inc(events)

    def statistics(self, model: str, version: str) -> ModelStatistics:
        """The sums of one model version; zeros before its first request."""
        return self._statistics.get((model, version), ModelStatistics())

    def text(self) -> bytes:
        """Everything, in the Prometheus text format."""
        return generate_latest(self.registry)

    def _make_children(self, key: tuple[str, str]) -> tuple[dict[str, Histogram], Histogram]:
        stages = {stage: self._stages.labels(*key, stage) for stage in STAGES}
        self._children[key] = stages, self._candidates.labels(*key)
        return self._children[key]


def _added(known: ModelStatistics, ms: Mapping[str, float]) -> ModelStatistics:
    def nanoseconds(*stages: str) -> int:
        return int(sum(ms[stage] for stage in stages) * 1e6)

    return replace(
        known,
        successes=known.successes + 1,
        queue_ns=known.queue_ns + nanoseconds("queue"),
        features_ns=known.features_ns + nanoseconds("features"),
        engine_ns=known.engine_ns + nanoseconds("encode", "score"),
        order_ns=known.order_ns + nanoseconds("order"),
        total_ns=known.total_ns + nanoseconds("total"),
        last_request_ms=int(time.time() * 1e3),
    )
