"""What a schedule counts, and the metrics of it: who came, how they ended, what waits, how good predictions are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from rankd.observe.shown import Key, ShownFigures


@dataclass(frozen=True, slots=True)
class CostErrors:
    """Means over the latest calls: |actual - predicted| / actual of scoring and of preparing, and what one call of the
    engine takes against its time at warm-up (`slowdown`)."""

    score: float = 0.0
    prepare: float = 0.0
    slowdown: float = 1.0


@dataclass(slots=True)
class ScheduleCounts:
    """Since the start: requests by how they came and ended, candidate rows that were scored and those that padded
    their calls, calls, executors that were lost, requests run again because of that, and what decisions took."""

    accepted: int = 0
    refused: int = 0
    finished: int = 0
    failed: int = 0
    late: int = 0
    cancelled: int = 0
    calls: int = 0
    rows: int = 0
    padded_rows: int = 0
    lost_executors: int = 0
    run_again: int = 0
    decisions: int = 0
    decision_seconds: float = 0.0

    def add(self, what: str) -> None:
        """One more of a count."""
        setattr(self, what, getattr(self, what) + 1)


def worst(errors: Sequence[CostErrors]) -> CostErrors:
    """Of each figure the largest."""
    return CostErrors(*(max(getattr(one, name) for one in errors) for name in ("score", "prepare", "slowdown")))


@dataclass(slots=True)
class KindCounts:
    """What the executors of one kind did since the start: calls that scored, their candidates, and the seconds that
    they were at work."""

    calls: int = 0
    rows: int = 0
    busy_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class KindFigures:
    """A kind of executors: the `name` of its target, how many there are, what they did, and how wrong predictions of
    its calls are. At most `at_once` of them have calls under way; `speed` is how much these get done, in units of one
    alone: as many as they are, or less where they share a device."""

    name: str
    num_executors: int
    counts: KindCounts
    errors: CostErrors
    at_once: int
    speed: float


@dataclass(frozen=True, slots=True)
class ScheduleFigures:
    """A snapshot: counts, what waits (requests, candidates, predicted milliseconds), how wrong predictions are, and
    what is added to them for that before they are held against a deadline. `kinds` are those of its executors; `errors`
    the worst of them."""

    counts: ScheduleCounts = field(default_factory=ScheduleCounts)
    unfinished: int = 0
    waiting_rows: int = 0
    waiting_ms: float = 0.0
    errors: CostErrors = field(default_factory=CostErrors)
    margin: float = 0.0
    kinds: tuple[KindFigures, ...] = ()


COUNTERS: tuple[tuple[str, str, Callable[[ScheduleFigures], float]], ...] = (
    ("rankd_schedule_calls", "Calls of the engine that scored candidates.", lambda f: f.counts.calls),
    ("rankd_schedule_rows", "Candidates scored.", lambda f: f.counts.rows),
    ("rankd_schedule_padded_rows", "Rows that filled calls up to their bucket.", lambda f: f.counts.padded_rows),
    ("rankd_executors_lost", "Executors that failed or hung and were replaced.", lambda f: f.counts.lost_executors),
    ("rankd_schedule_run_again", "Requests run again after that.", lambda f: f.counts.run_again),
    ("rankd_schedule_decisions", "Decisions of what an executor does next.", lambda f: f.counts.decisions),
    ("rankd_schedule_decision_seconds", "Time that decisions took.", lambda f: f.counts.decision_seconds),
)
GAUGES: tuple[tuple[str, str, Callable[[ScheduleFigures], float]], ...] = (
    ("rankd_unfinished_requests", "Accepted, not yet answered.", lambda f: f.unfinished),
    ("rankd_waiting_candidates", "Candidates that no executor has been given yet.", lambda f: f.waiting_rows),
    ("rankd_waiting_milliseconds", "Predicted work that is not done.", lambda f: f.waiting_ms),
    ("rankd_score_prediction_error", "Mean |actual - predicted| / actual of calls.", lambda f: f.errors.score),
    ("rankd_prepare_prediction_error", "The same of histories and states.", lambda f: f.errors.prepare),
    ("rankd_admission_margin", "Part of a prediction that is added to it against a deadline.", lambda f: f.margin),
    ("rankd_engine_slowdown", "What calls take against their time at warm-up.", lambda f: f.errors.slowdown),
)
KIND_COUNTERS: tuple[tuple[str, str, Callable[[KindFigures], float]], ...] = (
    ("rankd_executor_calls", "Calls that scored candidates, by kind of executors.", lambda f: f.counts.calls),
    ("rankd_executor_rows", "Candidates scored, by kind of executors.", lambda f: f.counts.rows),
    ("rankd_executor_busy_seconds", "Time at work of all executors of a kind.", lambda f: f.counts.busy_seconds),
)
KIND_GAUGES: tuple[tuple[str, str, Callable[[KindFigures], float]], ...] = (
    ("rankd_executors", "Executors of a kind.", lambda f: f.num_executors),
    ("rankd_executors_at_once", "Of those so many have calls under way at most.", lambda f: f.at_once),
    ("rankd_executor_speed", "What these get done at once, in units of one alone, as measured.", lambda f: f.speed),
    ("rankd_executor_prediction_error", "Mean |actual - predicted| / actual, by kind.", lambda f: f.errors.score),
    ("rankd_executor_slowdown", "What a kind's calls take against their time at warm-up.", lambda f: f.errors.slowdown),
)
OUTCOMES = ("refused", "finished", "failed", "late", "cancelled")


class ScheduleCollector(ShownFigures[Key, ScheduleFigures]):
    """Metrics of all model versions, as they were last shown."""

    def collect(self) -> Iterator[Metric]:
        """All figures of all versions."""
        labels = ("model", "version")
        ended = CounterMetricFamily("rankd_schedule", "Requests by how they ended.", labels=(*labels, "outcome"))
        for key, figures in self._shown.items():
            for outcome in OUTCOMES:
                ended.add_metric((*key, outcome), getattr(figures.counts, outcome))
        yield ended
        for kind, table in ((CounterMetricFamily, COUNTERS), (GaugeMetricFamily, GAUGES)):
            for name, text, figure in table:
                family = kind(name, text, labels=labels)
                for key, figures in self._shown.items():
                    family.add_metric(key, figure(figures))
                yield family
        for kind, by_kind in ((CounterMetricFamily, KIND_COUNTERS), (GaugeMetricFamily, KIND_GAUGES)):
            for name, text, of_kind in by_kind:
                family = kind(name, text, labels=(*labels, "target"))
                for key, figures in self._shown.items():
                    for one in figures.kinds:
                        family.add_metric((*key, one.name), of_kind(one))
                yield family
