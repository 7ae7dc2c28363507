"""How much executors get done that compute at once: n times as much as one, or less, where they share a device.

In: a curve that was measured (`Backend.speed`), or None: they are independent. Out: what the cost model and the policy
ask of it. A curve of four executors on one GPU, of which a second one hides the transfers of the first:

    n at once        1     2     3     4
    speed            1   1.5   1.6   1.6      what they get done together, in units of one alone
    contention       1  1.33  1.88   2.5      n / speed: how many times as long each of their calls takes as alone
    worth            yes  yes  yes    no      1.6 / 1.02 = 1.57: two get less done than that, three do not

A list of 128 takes 6 ms in one call and 3 ms in each of two. On independent executors it is cut: 3 ms. Here the halves
take 3 x 1.33 = 4 ms side by side, which pays (`policy.WORTH`); where two get 1.2 times as much done they take 5 ms, and
the list goes whole. Ten seconds of work that wait are over in 10 / 1.6 = 6.3 s, not in 10 / 4.

One more call beside b is begun only while more at once would get done 2% more, for else nothing is won by it: what is
under way takes longer by what this one takes. It waits instead, may be passed by who is in a hurry, and may share a
call. That costs a short request the rest of a call at most, which is about a quantum.
"""

from __future__ import annotations

from collections.abc import Sequence

WORTH = 1.02
"""So many times as much has to be got done by more calls at once. Less is noise of the measurement; more is missed near
the most that the device can do (docs/log.md, 2026-12-01: 1.05 made latencies there several times as long)."""


class Speed:
    """Of executors that are alike. `curve` is for 1, 2, ... of them: from 1 on, it falls nowhere, and n get done at
    most n times as much; more than it is long get no more done. None: they are independent."""

    def __init__(self, curve: Sequence[float] | None = None) -> None:
        self.curve = None if curve is None else tuple(curve)
        self._most = 0 if self.curve is None else next(n for n, one in enumerate(self.curve, 1) if self._enough(one))

    def of(self, number: int) -> float:
        """What so many at once get done, in units of one alone."""
        if self.curve is None:
            return float(number)
        return self.curve[min(number, len(self.curve)) - 1] if number else 0.0

    def contention(self, number: int) -> float:
        """How many times as long each of so many calls at once takes as alone."""
        return 1.0 if self.curve is None else max(number / max(self.of(number), 1.0), 1.0)

    def beside(self, busy: int, calls: int) -> float:
        """How many times as long as alone each of so many calls takes that are begun at once beside `busy` ones, if
        these keep what they have beside one of them: nothing is won for all by what is taken from others.

        >>> with 1, 1.2, 1.25: two beside one get .6, which is half of 1.2, and .05 more: 2 / .65 = 3.1 times as long
        """
        if self.curve is None:
            return 1.0
        one, all_of_them = self.of(busy + 1), self.of(busy + calls)
        return max(calls / (one / (busy + 1) + all_of_them - one), 1.0)

    def between(self, number: int, other: int) -> float:
        """The same of a call that began as one of so many, and ended as one of `other`."""
        return (self.contention(number) + self.contention(other)) / 2

    def most(self, number: int) -> int:
        """How many of so many executors are put to work at once."""
        return number if self.curve is None else min(number, self._most)

    def room(self, idle: int, busy: int) -> int:
        """How many of so many idle executors may begin beside `busy` ones."""
        return idle if self.curve is None else max(min(idle, self._most - busy), 0)

    def _enough(self, speed: float) -> bool:
        return self.curve is not None and WORTH * speed > self.curve[-1]
