"""The versions of one model that may answer requests which name none: the full one, and lighter variants while there is
more to do than it can.

In: requests, and which versions are loaded (`repository.py`). Out: who answers. All versions share the cores
(`schedule/core_sharing.py`). The load decides which of them may answer (`schedule/elastic_policy.py`); of those it is
the one that is predicted to take the least for this request: a user whose state the full version has in memory may be
cheaper there than on a variant that would have to encode the history. States are each version's own, for they are made
by its own graphs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from rankd.observe.elastic_metrics import ElasticFigures
from rankd.ranker import Ranker
from rankd.schedule.core_sharing import Cores
from rankd.schedule.elastic_config import ElasticConfig
from rankd.schedule.elastic_policy import LoadMeter, Seen, Standing, look
from rankd.types import RankRequest

log = logging.getLogger("rankd")
SWITCHES = ("lighter", "full")


class ElasticModel:
    """Thread-safe. `cores` are those that all versions of the model are loaded with."""

    def __init__(self, name: str, config: ElasticConfig, clock: Callable[[], float] = time.perf_counter) -> None:
        self.name, self.config, self.cores = name, config, Cores()
        self._clock = clock
        self._rankers: tuple[Ranker, ...] = ()  # the full one first, then the variants that can be used
        self._troubles: dict[str, str] = {}
        self._standing = Standing()
        self._meter = LoadMeter(config.dwell_seconds)
        self._answers: dict[str, int] = {}
        self._switches = dict.fromkeys(SWITCHES, 0)
        self._lock = threading.Lock()  # guards everything above; held while the lock of the cores is taken

    def use(self, full: Ranker | None, variants: Sequence[Ranker], troubles: Mapping[str, str]) -> None:
        """From now on these versions may answer; without a full one nobody. `troubles` says of each variant that cannot
        be used why; what is new in them is logged."""
        with self._lock:
            for version, trouble in troubles.items():
                if self._troubles.get(version) != trouble:
                    log.error("model %s: variant %s is not used: %s", self.name, version, trouble)
            self._troubles = dict(troubles)
            self._rankers = () if full is None else (full, *variants)
            if self._standing.level >= max(len(self._rankers), 1):
                now = self._clock()
                self._go(Standing(max(len(self._rankers) - 1, 0), now, now), "fewer variants can be used")

    def answers_for(self, full: Ranker) -> bool:
        """Whether this is the full version, as far as this has been told."""
        rankers = self._rankers
        return bool(rankers) and rankers[0] is full

    def choose(self, request: RankRequest, full: Ranker) -> Ranker:
        """Who is to answer a request that names no version; `full` if its versions have changed meanwhile.

        Raises:
            Unavailable: a version is being unloaded.
        """
        with self._lock:
            rankers = self._rankers
            if not rankers or rankers[0] is not full or not 0 < len(request.candidates) <= full.schema.max_candidates:
                return full  # which says what is wrong
            self._came(request, rankers)
            self._look()
            return self._cheapest(request, rankers)

    def refused(self, request: RankRequest, ranker: Ranker) -> Ranker | None:
        """A version has refused a request that it was chosen for, for want of time or room: another one, if that is a
        reason to let a lighter variant answer, or None."""
        with self._lock:
            rankers = self._rankers
            if ranker not in rankers:
                return None
            self._look(refused=True)
            other = self._cheapest(request, rankers)
            return None if other is ranker else other

    def answered(self, ranker: Ranker) -> None:
        """A version that was chosen has answered."""
        version = ranker.manifest.version
        with self._lock:
            self._answers[version] = self._answers.get(version, 0) + 1

    def figures(self) -> ElasticFigures:
        """A snapshot, as things stand now."""
        with self._lock:
            if self._rankers:
                self._look()
            versions, now = self._versions(), self._clock()
            loads = self._meter.loads(now, versions, self.cores.speed)
            return ElasticFigures(
                current=versions[self._standing.level] if versions else "",
                usable={**dict.fromkeys(versions, True), **dict.fromkeys(self._troubles, False)},
                loads=dict(zip(versions, loads, strict=True)),
                answers=dict(self._answers),
                switches=dict(self._switches),
            )

    def _came(self, request: RankRequest, rankers: Sequence[Ranker]) -> None:
        """What a request would take on each version if that had answered all along, so that it had the user's state
        wherever one of them has it."""
        resident = any(one.has_state(request.user_id) for one in rankers)
        works_ms = {one.manifest.version: one.work_ms(request, resident) for one in rankers}
        self._meter.came(self._clock(), works_ms)

    def _look(self, refused: bool = False) -> None:
        now = self._clock()
        loads = self._meter.loads(now, self._versions(), self.cores.speed)
        seen = Seen(now, self.cores.waiting_ms(), loads, refused)
        standing = look(self._standing, seen, self.config)
        if standing.level != self._standing.level:
            about = ", ".join(f"{version} {load:.2f}" for version, load in zip(self._versions(), loads, strict=True))
            self._go(standing, f"{seen.waiting_ms:.0f} ms of work wait for each core; loads: {about}")
        self._standing = standing

    def _go(self, standing: Standing, why: str) -> None:
        """Other versions than before may answer."""
        self._switches["lighter" if standing.level > self._standing.level else "full"] += 1
        may = ", ".join(self._versions()[: standing.level + 1]) or "none"
        log.info("model %s: versions that may answer: %s (%s)", self.name, may, why)
        self._standing = standing

    def _cheapest(self, request: RankRequest, rankers: Sequence[Ranker]) -> Ranker:
        """Of those that may answer the one that takes the least for this request; of equals the fullest."""
        may = rankers[: self._standing.level + 1]
        return min(may, key=lambda one: one.work_ms(request, one.has_state(request.user_id)))

    def _versions(self) -> tuple[str, ...]:
        return tuple(one.manifest.version for one in self._rankers)
