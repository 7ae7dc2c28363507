"""Which hot rows a byte budget in the main process is spent on."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from rankd.plan.table_plan import HotRows
from rankd.plan.table_statistics import TableLoad, hot_curve


def spend_on_hot_rows(loads: Iterable[TableLoad], budget_bytes: int) -> tuple[HotRows, ...]:
    """The rows of each table that save the most look-ups for the budget, hottest first.

    The stretch of rows, between two corners of a table's curve, that saves the most look-ups a byte is taken first.
    """
    curves = {load.name: (load, hot_curve(load)) for load in loads if load.statistics.lookups}
    taken: dict[str, int] = {}
    waiting: list[tuple[float, str, int]] = []

    def offer(name: str, corner: int) -> None:
        load, curve = curves[name]
        if corner < len(curve):
            (start, below), (end, above) = curve[corner - 1 : corner + 1]
            saved = load.statistics.lookups * (above - below)
            if saved:
                heapq.heappush(waiting, (-saved / ((end - start) * load.spec.row_bytes), name, corner))

    for name in curves:
        offer(name, 1)
    while waiting:
        _, name, corner = heapq.heappop(waiting)
        load, curve = curves[name]
        stretch = curve[corner][0] - curve[corner - 1][0]
        rows = min(stretch, budget_bytes // load.spec.row_bytes)
        if rows:
            taken[name] = taken.get(name, 0) + rows
            budget_bytes -= rows * load.spec.row_bytes
        if rows == stretch:
            offer(name, corner + 1)
    return tuple(HotRows(name, taken[name]) for name in curves if name in taken)
