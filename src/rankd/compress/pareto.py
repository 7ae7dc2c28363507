"""Which points are worth a look when several things count: the Pareto front, and an order for all points.

In: costs (n, m), every column the better the lower. Nothing here knows what the columns are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]


def front(costs: Float64Array) -> list[int]:
    """The points that no other point is better than: nowhere worse, and somewhere better."""
    found = []
    for number, own in enumerate(costs):
        better = (costs <= own).all(axis=1) & (costs < own).any(axis=1)
        if not better.any():
            found.append(number)
    return found


def ranked(costs: Float64Array) -> list[int]:
    """All points: the front first, then the front of the rest, and so on.

    Within a front those come first that have the most room around them (Deb et al. 2002), so that the first few of them
    are spread over it.
    """
    order: list[int] = []
    left = np.arange(len(costs))
    while len(left):
        best = left[front(costs[left])]
        room = _room(costs[best])
        order += [int(best[place]) for place in np.lexsort((best, -room))]
        left = np.setdiff1d(left, best)
    return order


def _room(costs: Float64Array) -> Float64Array:
    """For each point the distance between its neighbours on each side, summed over columns; infinite at the ends."""
    room = np.zeros(len(costs))
    for column in costs.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        if span > 0:  # else there are no ends
            room[order[[0, -1]]] = np.inf
            room[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return room
