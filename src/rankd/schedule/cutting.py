"""Cutting a list of candidates into pieces, each padded to a warmed bucket.

In: buckets and what a call of each costs. Out: the cheapest buckets for any number of candidates. Worked example,
buckets 16 (1.1 ms), 64 (3.4 ms), 256 (12.9 ms), .3 ms for a call itself:

    70  -> (64, 16)         4.8 ms with 10 padded rows, where one call of 256 would take 13.2 ms with 186 of them
    250 -> (256,)           13.2 ms; cut into 64s it is 14.8 ms, which pays where others wait
    250, none above 64 -> (64, 64, 64, 64)

Any cut gives the scores of the whole: a candidate sees the user's history and itself, never another one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache


class Cutter:
    """The cheapest cuts. `call_ms(bucket)` is what a call of a bucket takes with everything around it.

    Costs are read once: they are proportions, which a slower machine hardly changes. A bucket that was measured to take
    longer than a larger one counts as that: it was noise.
    """

    def __init__(self, buckets: Sequence[int], call_ms: Callable[[int], float], most_rows: int) -> None:
        self.buckets = tuple(sorted(buckets))
        self._call_ms = {bucket: min(call_ms(b) for b in self.buckets if b >= bucket) for bucket in self.buckets}
        self.most_rows = most_rows
        self._first = {largest: self._table(largest) for largest in self.buckets}
        self.pieces = lru_cache(maxsize=4096)(self._pieces)
        """`pieces(rows, largest)`: see `_pieces`."""
        self.even = lru_cache(maxsize=4096)(self._even)
        """`even(rows, quantum)`: see `_even`."""

    def first(self, rows: int, largest: int) -> int:
        """The bucket of the first piece of `rows` candidates, none above `largest`; what is left is cut the same
        way."""
        return self._first[largest][rows]

    def _pieces(self, rows: int, largest: int) -> tuple[int, ...]:
        """The buckets of all pieces, largest first: each full but the last."""
        made = []
        while rows > 0:
            made.append(self.first(rows, largest))
            rows -= made[-1]
        return tuple(made)

    def _even(self, rows: int, quantum: int) -> int:
        """The largest bucket that pieces may have which are to be about a quantum: as many pieces as come nearest to
        it, all alike. 300 candidates by 288 are one piece of 320, and not 288 and a call for 12 that costs a fifth."""
        pieces = max((2 * rows + quantum) // (2 * quantum), 1)
        return self.bucket_for(-(-rows // pieces))

    def cost_ms(self, rows: int, largest: int) -> float:
        """What all pieces take one after the other."""
        return sum(self._call_ms[bucket] for bucket in self.pieces(rows, largest))

    def bucket_for(self, rows: int) -> int:
        """The smallest bucket that holds so many rows, or the largest there is."""
        return self.buckets[min(bisect_left(self.buckets, rows), len(self.buckets) - 1)]

    def quantum(self, limit_ms: float, overhead: float) -> int:
        """The largest bucket whose call takes at most so long; but no smaller than the smallest one in which a row
        costs at most `overhead` more, as a part, than in the best bucket: cutting finer would waste the machine."""
        each = {bucket: self._call_ms[bucket] / bucket for bucket in self.buckets}
        bound = (1 + overhead) * min(each.values())
        worth = next(bucket for bucket in self.buckets if each[bucket] <= bound)
        return max([bucket for bucket in self.buckets if self._call_ms[bucket] <= limit_ms] + [worth])

    def _table(self, largest: int) -> list[int]:
        """For every number of rows, the largest bucket of its cheapest cut (least padding among equals)."""
        usable = [bucket for bucket in self.buckets if bucket <= largest]
        best: list[tuple[float, int]] = [(0.0, 0)]
        chosen = [usable[0]]
        for rows in range(1, self.most_rows + 1):
            options = []
            for bucket in usable:
                cost, padding = best[max(rows - bucket, 0)]
                options.append((cost + self._call_ms[bucket], padding + max(bucket - rows, 0), -bucket))
            cost, padding, bucket = min(options)
            best.append((cost, padding))
            chosen.append(-bucket)
        return chosen
