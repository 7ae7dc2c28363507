"""Kinds of executors that serve one model version together: a kind's executors are alike, and have rules of their own.

In: `policy.Rules` of each kind. Out: what a request takes on all of them, for admission, order and deadlines, and how
the kinds stand at a moment, for `mixed_policy.py`. Of one kind alone its Rules say the same.

How fast a mix is depends on who gets what. Admission reckons with executors that are given requests like this one, each
as many as it can do: with n executors of a kind that takes w ms for it, N = sum of n executors take

    N / sum(n / w)      each, of work:     one that takes 2 ms and one that takes 6 ms: 3 ms each for every request

Executors of a kind that share a device count for as many as get as much done (`Rules.speed`): of four on a GPU that get
1.6 times as much done as one, n is 1.6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rankd.schedule.policy import Rules


@dataclass(frozen=True, slots=True)
class Standing:
    """A kind at a moment: how many of its executors are idle, and until when the others are predicted to be busy
    (seconds, in any order; of one that takes longer than was predicted it is over). `elsewhere` are executors of the
    same kind that other schedules have at work on the same device."""

    idle: int
    busy_until: tuple[float, ...] = ()
    elsewhere: int = 0

    @property
    def busy(self) -> int:
        """How many calls of the kind are under way."""
        return len(self.busy_until) + self.elsewhere


class Mix:
    """Rules of several kinds of executors. Order and fairness are those of the first; all kinds are given the same."""

    def __init__(self, kinds: Sequence[Rules]) -> None:
        self.kinds = tuple(kinds)
        self.num_executors = sum(rules.num_executors for rules in self.kinds)

    @property
    def speed(self) -> float:
        """As `Rules.speed`, of all kinds together."""
        return sum(rules.speed for rules in self.kinds)

    def estimates(self, rows: int, resident: bool, tokens: int | None) -> tuple[float, float]:
        """As `Rules.estimates`."""
        prepare_ms = [rules.costs.prepare(resident, tokens) for rules in self.kinds]
        return self._all(rows, prepare_ms)

    def left_ms(self, rows: int) -> float:
        """As `Rules.left_ms`."""
        return self._work_ms([rules.work_ms(rows, 0.0) for rules in self.kinds])

    def soonest_ms(self, rows: int) -> float:
        """As `Rules.soonest_ms`."""
        return self._all(rows, [0.0] * len(self.kinds))[1]

    def doubt(self) -> None:
        """As `Rules.doubt`, of all kinds."""
        for rules in self.kinds:
            rules.costs.doubt()

    def _all(self, rows: int, prepare_ms: Sequence[float]) -> tuple[float, float]:
        kinds = self.kinds
        works_ms = [rules.work_ms(rows, ms) for rules, ms in zip(kinds, prepare_ms, strict=True)]
        alone_ms = min(rules.shortest_ms(rows, ms) for rules, ms in zip(kinds, prepare_ms, strict=True))
        return self._work_ms(works_ms), min(alone_ms, self._together_ms(rows, works_ms, min(prepare_ms)))

    def _work_ms(self, works_ms: Sequence[float]) -> float:
        speed = sum(rules.speed / max(ms, 1e-6) for rules, ms in zip(self.kinds, works_ms, strict=True))
        return self.speed / speed

    def _together_ms(self, rows: int, works_ms: Sequence[float], prepare_ms: float) -> float:
        """How soon it is done if each kind gets as many candidates as it is fast."""
        speeds = [rules.speed / max(ms, 1e-6) for rules, ms in zip(self.kinds, works_ms, strict=True)]
        shares = [math.ceil(rows * speed / sum(speeds)) for speed in speeds]
        return prepare_ms + max(
            rules.shortest_ms(min(share, rows), 0.0) for rules, share in zip(self.kinds, shares, strict=True)
        )
