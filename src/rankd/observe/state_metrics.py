"""The figures of the user states as Prometheus metrics, read from the caches' own counts when they are scraped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from rankd.observe.shown import Key, ShownFigures


@dataclass(frozen=True, slots=True)
class SpillCounts:
    """What the tier on disk did and holds."""

    written: int = 0
    restored: int = 0
    corrupt: int = 0
    failed: int = 0
    files: int = 0
    used_bytes: int = 0


@dataclass(frozen=True, slots=True)
class GpuCounts:
    """What the states in GPU memory did and hold: calls found a state there, or it was sent, a transfer more."""

    found: int = 0
    sent: int = 0
    evicted: int = 0
    states: int = 0
    used_bytes: int = 0
    budget_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StateCounts:
    """What the states of one model version did since they were opened, and what they hold now.

    `origins` counts requests by where their state came from (`states.lending.Origin`); `encoded` are those that
    computed their whole history. Of those whose state was in memory `in_gpu` had it in GPU memory too.
    """

    origins: Mapping[str, int]
    evicted: int = 0
    waited: int = 0
    unkept: int = 0
    users: int = 0
    used_bytes: int = 0
    budget_bytes: int = 0
    spill: SpillCounts = SpillCounts()
    in_gpu: int = 0
    gpu: GpuCounts = GpuCounts()

    @property
    def tiers(self) -> dict[str, int]:
        """Requests by where their state lay when they came; of the computed ones nowhere, or of fewer events."""
        of = self.origins.get
        computed = of("extended", 0) + of("encoded", 0)
        host, disk = of("cached", 0) - self.in_gpu, of("restored", 0)
        return {"gpu": self.in_gpu, "host": host, "disk": disk, "computed": computed}

    @property
    def hit_rate(self) -> float:
        """The share of requests that did not compute their whole history."""
        total = sum(self.origins.values())
        return 1.0 - self.origins.get("encoded", 0) / total if total else 0.0


class StateCollector(ShownFigures[Key, StateCounts]):
    """Metrics of all model versions, as they were last shown."""

    def collect(self) -> Iterator[Metric]:
        """All figures of all versions."""
        labels = ("model", "version")
        origins = CounterMetricFamily(
            "rankd_states", "Requests by where the user's state came from.", labels=(*labels, "origin")
        )
        for key, figures in self._shown.items():
            for origin, number in figures.origins.items():
                origins.add_metric((*key, origin), number)
        yield origins
        tiers = CounterMetricFamily(
            "rankd_state_tiers", "Requests by where the user's state lay.", labels=(*labels, "tier")
        )
        for key, figures in self._shown.items():
            for tier, number in figures.tiers.items():
                tiers.add_metric((*key, tier), number)
        yield tiers
        for name, text, attribute in (
            ("rankd_states_evicted", "States that left memory for others.", "evicted"),
            ("rankd_states_waited", "Requests that waited for another one to compute their state.", "waited"),
            ("rankd_states_unkept", "States that could not be kept: all memory was in use.", "unkept"),
        ):
            yield self._family(CounterMetricFamily(name, text, labels=labels), attribute)
        for name, text, attribute in (
            ("rankd_state_users", "Users whose state is in memory.", "users"),
            ("rankd_state_bytes", "Memory of states in use.", "used_bytes"),
            ("rankd_state_budget_bytes", "Memory that states may use.", "budget_bytes"),
        ):
            yield self._family(GaugeMetricFamily(name, text, labels=labels), attribute)
        for name, text, attribute in (
            ("rankd_states_spilled", "States written to disk.", "written"),
            ("rankd_states_restored", "States read back from disk.", "restored"),
            ("rankd_states_corrupt", "Files of states that were damaged, and removed.", "corrupt"),
            ("rankd_states_spill_failed", "States that could not be written to disk.", "failed"),
        ):
            yield self._family(CounterMetricFamily(name, text, labels=labels), attribute, "spill")
        for name, text, attribute in (
            ("rankd_state_spill_files", "States on disk.", "files"),
            ("rankd_state_spill_bytes", "Bytes of states on disk.", "used_bytes"),
        ):
            yield self._family(GaugeMetricFamily(name, text, labels=labels), attribute, "spill")
        for name, text, attribute in (
            ("rankd_gpu_states_found", "States that calls found in GPU memory.", "found"),
            ("rankd_gpu_states_sent", "States that calls had to send to GPU memory.", "sent"),
            ("rankd_gpu_states_evicted", "States that left GPU memory for others.", "evicted"),
        ):
            yield self._family(CounterMetricFamily(name, text, labels=labels), attribute, "gpu")
        for name, text, attribute in (
            ("rankd_gpu_states", "States in GPU memory.", "states"),
            ("rankd_gpu_state_bytes", "GPU memory of states in use.", "used_bytes"),
            ("rankd_gpu_state_budget_bytes", "GPU memory that was taken for states.", "budget_bytes"),
        ):
            yield self._family(GaugeMetricFamily(name, text, labels=labels), attribute, "gpu")

    def _family(
        self, family: CounterMetricFamily | GaugeMetricFamily, attribute: str, part: str = ""
    ) -> CounterMetricFamily | GaugeMetricFamily:
        for key, figures in self._shown.items():
            family.add_metric(key, getattr(getattr(figures, part) if part else figures, attribute))
        return family
