"""Rules, costs and requests of schedules that are made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from rankd.schedule.admission import Limits
from rankd.schedule.costs import CostModel, Warmed
from rankd.schedule.cutting import Cutter
from rankd.schedule.kinds import Mix
from rankd.schedule.policy import Priority, Rules
from rankd.schedule.simulation import Arrival

BUCKETS = (16, 64, 256)
CALL_MS = {(16, 1): 1.0, (16, 2): 1.2, (16, 4): 1.6, (64, 1): 3.0, (256, 1): 11.0}
ROOMY = Limits(candidates=10**9, work_ms=1e9)


def rules_of(
    num_executors: int = 2,
    largest: int = 64,
    stretch: float = 4.0,
    fairness_ms: float = 100.0,
    batch_ms: float = 1000.0,
    most_users: Callable[[int], int] = lambda bucket: 4 if bucket == 16 else 1,
    most_rows: int = 1024,
    scale: float = 1.0,
    speed: tuple[float, ...] | None = None,
) -> Rules:
    """Rules over three buckets; users share calls of the smallest one. Calls take `scale` times as long as above."""
    score_ms = {shape: scale * ms for shape, ms in CALL_MS.items()}
    costs = CostModel(Warmed(score_ms, encode_ms={64: scale * 5.0}, speed=speed))
    cutter = Cutter(BUCKETS, costs.score, most_rows)
    return Rules(cutter, costs, most_users, num_executors, largest, stretch, fairness_ms, batch_ms)


def some_arrivals(**prepare: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Arrival]]:
    """Up to 40 requests within two seconds, in any order; `prepare` says what preparing them takes."""
    one = st.builds(
        Arrival,
        at=st.floats(0, 2),
        rows=st.integers(1, 1024),
        resident=st.booleans(),
        timeout_ms=st.none() | st.floats(1, 300),
        priority=st.sampled_from(Priority),
        **prepare,
    )
    return st.lists(one, max_size=40)


def wide_rules(num_executors: int = 1, **more: Any) -> Rules:
    """A kind that takes 4 ms for any call, hardly longer for a long one, and whose calls serve four users."""
    score_ms = {(bucket, users): 4.0 + 0.002 * bucket * users for bucket in (32, 1024) for users in (1, 2, 4)}
    costs = CostModel(Warmed(score_ms, encode_ms={64: 2.0}))
    cutter = Cutter((32, 1024), costs.score, 1024)
    return Rules(cutter, costs, lambda bucket: 4, num_executors, 1024, 4.0, 100.0, 1000.0, name="wide", **more)


def two_kinds(quick: int = 2, wide: int = 1) -> Mix:
    """So many executors as in `rules_of`, which are quick with short lists, and of the kind above."""
    return Mix([rules_of(num_executors=quick), wide_rules(wide)])
