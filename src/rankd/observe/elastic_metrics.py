"""Models that may answer from lighter variants, as Prometheus metrics: who may, who did, and how often that changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from rankd.observe.shown import ShownFigures


@dataclass(frozen=True, slots=True)
class ElasticFigures:
    """A snapshot of one model, by version: whether it can be used at all, whether it may answer now (of those the
    lightest is `current`, "" where there is none), the load if it alone answered, and how many requests without a
    version it has answered. `switches` counts changes by where to."""

    current: str
    usable: Mapping[str, bool]
    loads: Mapping[str, float]
    answers: Mapping[str, int]
    switches: Mapping[str, int]


class ElasticCollector(ShownFigures[str, ElasticFigures]):
    """Metrics of all elastic models, as they were last shown."""

    def collect(self) -> Iterator[Metric]:
        """All figures of all models."""
        labels = ("model", "version")
        answers = CounterMetricFamily(
            "rankd_elastic_answers", "Answers to requests that named no version, by who gave them.", labels=labels
        )
        switches = CounterMetricFamily(
            "rankd_elastic_switches", "Changes of who may answer, by where to.", labels=("model", "to")
        )
        current = GaugeMetricFamily("rankd_elastic_current", "1 for the lightest that may answer now.", labels=labels)
        usable = GaugeMetricFamily(
            "rankd_elastic_usable", "Whether the full version or a variant is loaded and accepted.", labels=labels
        )
        loads = GaugeMetricFamily(
            "rankd_elastic_load", "Share of the cores' time if this version alone answered.", labels=labels
        )
        for model, figures in self._shown.items():
            for version, can in figures.usable.items():
                usable.add_metric((model, version), float(can))
                current.add_metric((model, version), float(version == figures.current))
            for version, load in figures.loads.items():
                loads.add_metric((model, version), load)
            for version, count in figures.answers.items():
                answers.add_metric((model, version), count)
            for where, count in figures.switches.items():
                switches.add_metric((model, where), count)
        yield from (answers, switches, current, usable, loads)
