"""A contestant of the suite `features` as a server process, and what it says of itself.

In: a model repository, the store's address, a Contestant. Out: requests over HTTP, and `ServerFigures` from /metrics.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from rankd.bench.placement import Cpus, cpu_seconds, on_cpus, resident_bytes
from rankd.bench.served_model import ServedModel
from rankd.features.feature_config import Mode
from rankd.features.reading.shared_features import ITEMS, USERS

PATIENCE_MS = 10_000.0
"""What a request waits for the store: so long that no contestant answers sooner because it goes without rows."""
HISTORIES_MIB = 256
USERS_MIB = 1
SOURCES = ("fresh", "stale", "default", "absent", "wrong_schema")


@dataclass(frozen=True, slots=True)
class Contestant:
    """What keeps rows next to the model, and what a request does about those that are not there."""

    name: str
    mode: Mode = Mode.SYNC
    keeps: bool = True
    command: tuple[str, ...] = ("rankd", "serve")
    """What `python -m` runs, with the folder of models behind it."""


CONTESTANTS = (
    Contestant("none", keeps=False),
    Contestant("dict", command=("rankd.bench.feature_suite.dict_server",)),
    Contestant("sync"),
    Contestant("async", Mode.ASYNC),
)
NONE, DICT, SYNC, ASYNC = CONTESTANTS


@dataclass(frozen=True, slots=True)
class Setting:
    """What all contestants have in common. `items_mib` and `ttl_seconds` are those of a cache of item rows."""

    root: Path
    store_url: str
    no_histories: Path
    items_mib: float
    ttl_seconds: float

    def variables(self, contestant: Contestant) -> dict[str, str]:
        """A contestant's configuration as RANKD_* variables."""
        budgets = {ITEMS: self.items_mib, USERS: float(USERS_MIB), "histories": float(HISTORIES_MIB)}
        values: dict[str, object] = {
            "HISTORIES": self.no_histories,
            "FEATURES__STORE__URL": self.store_url,
            "FEATURES__STORE__TIMEOUT_MS": PATIENCE_MS,
            "FEATURES__WAIT_MS": PATIENCE_MS,
        }
        for table, mib in budgets.items():
            values[f"FEATURES__{table.upper()}__MODE"] = contestant.mode.value
            values[f"FEATURES__{table.upper()}__BUDGET_MIB"] = repr(mib if contestant.keeps else 0.0)
        for table in (ITEMS, USERS):
            values[f"FEATURES__{table.upper()}__TTL_SECONDS"] = self.ttl_seconds
        return {f"RANKD_{key}": str(value) for key, value in values.items()}


@dataclass(frozen=True, slots=True)
class ServerFigures:
    """A snapshot. Counts are of the time since it started: item rows by where they came from, `fetched` and `shared`
    ones, bytes of values read from the store, states by origin. `caches` are (bytes, budget) by what is kept."""

    rows: Mapping[str, float] = field(default_factory=dict)
    fetched: float = 0.0
    shared: float = 0.0
    read_bytes: float = 0.0
    degraded: float = 0.0
    states: Mapping[str, float] = field(default_factory=dict)
    cached_rows: float = 0.0
    caches: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    cpu_s: float = 0.0
    resident_bytes: int = 0

    @property
    def fullest(self) -> float:
        """The largest share of its budget that anything kept takes; above 1 is too much."""
        return max((size / budget for size, budget in self.caches.values() if budget), default=0.0)

    @property
    def cache_bytes(self) -> float:
        """Memory of all that is kept of the store, the histories included."""
        return sum(size for size, _ in self.caches.values())


class FeatureServer(ServedModel):
    """A contestant's process while the context manager is open, on the cpus that are a server's."""

    def __init__(self, setting: Setting, contestant: Contestant, cpus: Cpus | None) -> None:
        super().__init__(setting.root, contestant.command, setting.variables(contestant))
        self.contestant, self._cpus = contestant, cpus

    def figures(self) -> ServerFigures:
        """A snapshot.

        Raises:
            Unavailable: it ended.
            OSError: it does not answer.
        """
        return figures_from(self.metrics_text(), cpu_seconds(self.pid), resident_bytes(self.pid))

    def _launch(self) -> subprocess.Popen[bytes]:
        with on_cpus(self._cpus):
            return super()._launch()


def figures_from(text: str, cpu_s: float = 0.0, resident: int = 0) -> ServerFigures:
    """The figures in the text of /metrics of a server of one model."""
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = (sample.labels.get(name, "") for name in ("table", "source", "origin"))
            key = (sample.name, *filter(None, labels))
            found[key] = found.get(key, 0.0) + sample.value
    tables = {
        table: (
            found.get(("rankd_feature_cache_bytes", table), 0.0),
            found[("rankd_feature_cache_budget_bytes", table)],
        )
        for table in (ITEMS, USERS)
        if ("rankd_feature_cache_budget_bytes", table) in found
    }
    histories = found.get(("rankd_history_bytes",), 0.0), found.get(("rankd_history_budget_bytes",), 0.0)
    return ServerFigures(
        rows={source: found.get(("rankd_feature_rows_total", ITEMS, source), 0.0) for source in SOURCES},
        fetched=found.get(("rankd_feature_fetched_rows_total", ITEMS), 0.0),
        shared=found.get(("rankd_feature_shared_rows_total", ITEMS), 0.0),
        read_bytes=found.get(("rankd_store_read_bytes_total",), 0.0),
        degraded=found.get(("rankd_degraded_total",), 0.0),
        states={key[1]: value for key, value in found.items() if key[0] == "rankd_states_total"},
        cached_rows=found.get(("rankd_feature_cached_rows", ITEMS), 0.0),
        caches={**tables, "histories": histories},
        cpu_s=cpu_s,
        resident_bytes=resident,
    )
