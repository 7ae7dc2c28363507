"""How a table is asked: look-ups a sample, and how far they go to the same few rows.

In: what was counted (`sampling.py`), or what is known of a model. Out: shares that `hot_rows.py` and the strategies
reckon with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from rankd.embeddings.table_spec import TableSpec

Share = Annotated[float, Meta(ge=0.0, le=1.0)]
HOT_SHARES = (0.0001, 0.001, 0.01, 0.1)
"""Of a table's rows: how many look-ups go to its hottest 0.01%, 0.1%, 1% and 10%."""


class TableStatistics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one table: mean look-ups a sample, the share of samples with any, and for each of HOT_SHARES the share of all
    look-ups that go to so many of the hottest rows. The defaults are one look-up in every sample and no row hotter
    than another."""

    table: str
    lookups: Annotated[float, Meta(ge=0.0)] = 1.0
    used: Share = 1.0
    hot: tuple[Share, Share, Share, Share] = HOT_SHARES


@dataclass(frozen=True, slots=True)
class TableLoad:
    """A table, the net that it belongs to, and how it is asked: what a strategy places."""

    spec: TableSpec
    net: str
    statistics: TableStatistics

    @property
    def name(self) -> str:
        """Of the table."""
        return self.spec.name


def hot_curve(load: TableLoad) -> list[tuple[int, float]]:
    """Corners (rows, share of look-ups that the hottest so many rows take) from (0, 0) to (all rows, 1), ascending.

    Between two corners rows are taken as equally hot. Shares of less than a row are left out.
    """
    rows = load.spec.rows
    corners = [(0, 0.0)]
    for part, share in zip(HOT_SHARES, load.statistics.hot, strict=True):
        count = int(rows * part)
        if corners[-1][0] < count < rows:
            corners.append((count, max(share, corners[-1][1])))
    return [*corners, (rows, 1.0)]


def hot_share(load: TableLoad, rows: int) -> float:
    """The share of a table's look-ups that go to its hottest `rows`."""
    counts, shares = zip(*hot_curve(load), strict=True)
    return float(np.interp(rows, counts, shares))
