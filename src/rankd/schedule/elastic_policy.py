"""Which versions of a model may answer: the full one alone, or lighter variants too. A pure function of what is seen.

In: `Seen`, and the `Standing` so far. Out: the next Standing. `serve/elastic_model.py` asks it for each request.

- *To a lighter one*, one at a time: too much work waits, or a request is refused while the load is high.
- *Back*, to the fullest version that could do what comes: little work has waited, and that version's load, with what
  requests would take if it had answered them all along, has been low, for `calm_seconds`. What waits says nothing of
  that, for a lighter variant keeps it short.
- *No flapping.* `dwell_seconds` are between two changes, and `calm_seconds` before each way back: in T seconds there
  are at most 1 + T / dwell_seconds changes, and 1 + T / calm_seconds ways back, whatever comes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rankd.schedule.elastic_config import ElasticConfig


@dataclass(frozen=True, slots=True)
class Seen:
    """What is seen at `now` (seconds): predicted work that waits for each core, in milliseconds, and for each version,
    the full one first, the load if it alone answered: the share of the cores' time that this takes. `refused`: a
    request has just been, for want of time or of room."""

    now: float
    waiting_ms: float
    loads: tuple[float, ...]
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    """The full version and the first `level` variants may answer, since `since`; `busy` is when there was last too much
    to go back (seconds)."""

    level: int = 0
    since: float = -math.inf
    busy: float = -math.inf


def look(standing: Standing, seen: Seen, config: ElasticConfig) -> Standing:
    """What may answer from now on. `seen.loads` has at least one version more than `standing.level`."""
    now, level = seen.now, standing.level
    too_much = seen.waiting_ms > config.to_lighter_ms or (seen.refused and seen.loads[level] > config.to_full_load)
    enough = next((one for one in range(level) if seen.loads[one] <= config.to_full_load), level)
    calm = enough < level and seen.waiting_ms <= config.to_full_ms and not too_much
    busy = standing.busy if calm else now
    if now - standing.since >= config.dwell_seconds:
        if too_much and level + 1 < len(seen.loads):
            return Standing(level + 1, now, now)
        if calm and now - busy >= config.calm_seconds:
            return Standing(enough, now, now)
    return Standing(level, standing.since, busy)


class LoadMeter:
    """The load of each version if it alone answered: of the work that came, what was `seconds` ago counts 1 / e."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._sums_ms: dict[str, float] = {}
        self._at = -math.inf

    def came(self, now: float, works_ms: Mapping[str, float]) -> None:
        """A request came, and what it would take on each version. A version that is new here is taken to have been as
        busy as the busiest of the others."""
        kept = self._kept(now)
        before = {version: ms * kept for version, ms in self._sums_ms.items()}
        most = max(before.values(), default=0.0)
        self._sums_ms = {version: before.get(version, most) + ms for version, ms in works_ms.items()}
        self._at = max(now, self._at)

    def loads(self, now: float, versions: Sequence[str], cores: float) -> tuple[float, ...]:
        """For each of the versions, as a share of the cores' time; `cores` as many as get so much done."""
        scale = self._kept(now) / (self._seconds * 1e3 * cores)
        most = max(self._sums_ms.values(), default=0.0)
        return tuple(self._sums_ms.get(version, most) * scale for version in versions)

    def _kept(self, now: float) -> float:
        return math.exp(min(self._at - now, 0.0) / self._seconds)
