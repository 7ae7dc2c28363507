"""The schedule's configuration, and the rules that it makes with what was measured at warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from rankd.schedule.admission import Limits
from rankd.schedule.costs import CostModel, Warmed
from rankd.schedule.cutting import Cutter
from rankd.schedule.policy import CALL_MS, WORTH, Rules

Positive = Annotated[float, Meta(gt=0)]


class ScheduleConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How requests share the executors.

    A model lets so many candidates wait (`max_waiting_candidates`), and so much predicted work for each executor
    (`max_waiting_ms`). A call takes about `quantum_ms`, longer requests are cut evenly; but no finer than makes a
    candidate cost `overhead` more, as a part. Of two requests the one comes first whose arrival plus `stretch` times
    its work is earlier; no request lets another one pass that comes more than `fairness_ms` after it (a batch one:
    `batch_ms` more). With `spread` a request that is alone is shared by the idle executors. An executor hangs after
    `hang_seconds`.
    """

    max_waiting_candidates: Annotated[int, Meta(ge=1)] = 200_000
    max_waiting_ms: Positive = 2000.0
    quantum_ms: Positive = 10.0
    overhead: Annotated[float, Meta(ge=0)] = 0.1
    stretch: Annotated[float, Meta(ge=0)] = 4.0
    fairness_ms: Annotated[float, Meta(ge=0)] = 100.0
    batch_ms: Annotated[float, Meta(ge=0)] = 2000.0
    spread: bool = True
    hang_seconds: Positive = 10.0

    def limits(self) -> Limits:
        """For admission."""
        return Limits(self.max_waiting_candidates, self.max_waiting_ms)


def make_rules(
    config: ScheduleConfig,
    buckets: Sequence[int],
    warmed: Warmed,
    most_users: Callable[[int], int],
    num_executors: int,
) -> Rules:
    """The policy's rules on this machine."""
    costs = CostModel(warmed)
    cutter = Cutter(buckets, lambda bucket: costs.score(bucket) + costs.rows(bucket) + CALL_MS, max(buckets))
    return Rules(
        cutter=cutter,
        costs=costs,
        most_users=most_users,
        num_executors=num_executors,
        largest=cutter.quantum(config.quantum_ms, config.overhead),
        stretch=config.stretch,
        fairness_ms=config.fairness_ms,
        batch_ms=config.batch_ms,
        spread=config.spread,
        encode_wide=config.spread and warmed.wide_encode_ms <= WORTH * warmed.most_encode_ms,
    )
