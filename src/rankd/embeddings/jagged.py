"""Ids of B samples in F tables, any number of them for each: what a look-up is asked for.

Worked example, 2 samples and 2 tables of widths 3 and 4:

    tables ("shop", "genre")    offsets [0, 1, 3, 3, 5]    ids [7, 2, 2, 9, 4]
    shop:  sample 0 has 7, sample 1 has 2 and 2    genre: sample 0 has none, sample 1 has 9 and 4
    pooled (2, 7): [shop 7 | zeros], [shop 2 + shop 2 | genre 9 + genre 4]
"""

from __future__ import annotations

from dataclasses import dataclass

from rankd.errors import InvalidRequest
from rankd.types import Int64Array


@dataclass(frozen=True, slots=True)
class JaggedIds:
    """`ids` (N,) int64; those of sample b in the f-th of `tables` are ids[offsets[f * B + b] : offsets[f * B + b + 1]],
    `offsets` (F * B + 1,) int64."""

    tables: tuple[str, ...]
    offsets: Int64Array
    ids: Int64Array

    @property
    def num_samples(self) -> int:
        """B; 0 without tables."""
        return (len(self.offsets) - 1) // len(self.tables) if self.tables else 0

    def check(self) -> None:
        """Do nothing if the offsets fit the ids.

        Raises:
            InvalidRequest: they do not.
        """
        offsets, count = self.offsets, len(self.tables)
        if len(offsets) < 1 or (len(offsets) - 1) % max(count, 1) or (not count and len(offsets) != 1):
            raise InvalidRequest(f"{len(offsets)} offsets do not fit {count} tables: there are F * B + 1 of them")
        if offsets[0] != 0 or offsets[-1] != len(self.ids) or (offsets[1:] < offsets[:-1]).any():
            raise InvalidRequest(f"offsets ascend from 0 to the number of ids, {len(self.ids)}; these do not")
