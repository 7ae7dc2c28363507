"""Match features: what a user's own history says about each candidate, as (C, M) float32 columns.

They are computed at the moment of the request from the whole stored history, not from the tokens that fit the
model, and never enter the user's state. With h the matching events (`match_events`) of the user, oldest first:

    seen             1 if the candidate is in h
    count            log(1 + times it is in h)
    recency          log(1 + days since its newest event), 0 if never
    cadence          log(1 + days since its newest event / mean days between its events), 0 below two events
    affinity         log(1 + sum over distinct items i of h of similarity(i, candidate))
    recent_affinity  the same, each item weighted by exp(-days since its newest event / 30)
    events           log(1 + events in h), the same for every candidate
    idle             log(1 + days since the newest event of h), the same for every candidate
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rankd.features.schema import FIRST_ITEM_ROW, FeatureSchema
from rankd.features.tables import ItemTable
from rankd.types import Float32Array, Int32Array, Int64Array, UserHistory

SECONDS_A_DAY = 86_400.0
RECENT_DAYS = 30.0

_scratch = threading.local()


@dataclass(frozen=True, slots=True)
class _Seen:
    """The distinct items of h: rows (u,) int32 ascending; counts (u,); days since the first and newest event (u,)."""

    rows: Int32Array
    counts: Int64Array
    first_days: Float32Array
    last_days: Float32Array


def match_features(
    history: UserHistory, candidates: Int32Array, now: int, items: ItemTable, schema: FeatureSchema
) -> Float32Array:
    """The schema's match columns for candidate rows (C,) int32 at second `now`: (C, M) float32."""
    result = np.zeros((candidates.shape[0], len(schema.match)), np.float32)
    seen = _seen_items(history, now, schema)
    if not schema.match or seen.rows.shape[0] == 0:
        return result
    position = np.minimum(np.searchsorted(seen.rows, candidates), seen.rows.shape[0] - 1)
    hit = seen.rows[position] == candidates
    near = items.neighbours[candidates], items.similarities[candidates]
    for column, name in enumerate(schema.match):
        if name in _AFFINITIES:
            result[:, column] = _affinity(seen, *near, items.neighbours.shape[0], _AFFINITIES[name](seen))
        elif name in _OF_USER:
            result[:, column] = math.log1p(_OF_USER[name](seen))
        else:
            result[:, column] = np.where(hit, _OF_SEEN[name](seen)[position], 0.0)
    return result


def _seen_items(history: UserHistory, now: int, schema: FeatureSchema) -> _Seen:
    rows, times = history.rows, history.times
    keep = rows >= FIRST_ITEM_ROW
    if schema.match_events and len(schema.match_events) < len(schema.event_types):
        wanted = np.asarray([name in schema.match_events for name in schema.event_types])
        keep &= wanted[history.events]
    if not keep.all():
        rows, times = rows[keep], times[keep]
    order = np.argsort(rows, kind="stable")  # stable: within an item the events stay oldest first
    ranked = rows[order]
    days = np.maximum((now - times[order]) / SECONDS_A_DAY, 0.0).astype(np.float32)
    ends = np.flatnonzero(ranked[1:] != ranked[:-1])
    first = np.concatenate(([0], ends + 1)) if ranked.shape[0] else ends
    last = np.concatenate((ends, [ranked.shape[0] - 1])) if ranked.shape[0] else ends
    return _Seen(ranked[first], last - first + 1, days[first], days[last])


def _affinity(
    seen: _Seen, neighbours: Int32Array, similarities: Float32Array, num_rows: int, weights: Float32Array
) -> Float32Array:
    """log(1 + weighted similarity to what was seen) of candidates with neighbours and similarities (C, M)."""
    scratch = _row_weights(num_rows)
    scratch[seen.rows] = weights
    near = scratch[neighbours]
    scratch[seen.rows] = 0.0
    total: Float32Array = np.log1p((near * similarities).sum(axis=1))
    return total


def _row_weights(num_rows: int) -> Float32Array:
    """A zeroed array of one weight a row, kept by the thread so that a request allocates nothing of that size."""
    weights: Float32Array | None = getattr(_scratch, "weights", None)
    if weights is None or weights.shape[0] < num_rows:
        weights = _scratch.weights = np.zeros(num_rows, np.float32)
    return weights


def _cadence(seen: _Seen) -> Float32Array:
    gap = (seen.first_days - seen.last_days) / np.maximum(seen.counts - 1, 1)
    ratio: Float32Array = np.where(seen.counts > 1, np.log1p(seen.last_days / np.maximum(gap, 1.0)), 0.0)
    return ratio.astype(np.float32)


_OF_SEEN: dict[str, Callable[[_Seen], Float32Array]] = {
    "seen": lambda seen: np.ones(seen.rows.shape[0], np.float32),
    "count": lambda seen: np.log1p(seen.counts).astype(np.float32),
    "recency": lambda seen: np.log1p(seen.last_days),
    "cadence": _cadence,
}
_OF_USER: dict[str, Callable[[_Seen], float]] = {
    "events": lambda seen: float(seen.counts.sum()),
    "idle": lambda seen: float(seen.last_days.min()),
}
_AFFINITIES: dict[str, Callable[[_Seen], Float32Array]] = {
    "affinity": lambda seen: np.ones(seen.rows.shape[0], np.float32),
    "recent_affinity": lambda seen: np.exp(-seen.last_days / RECENT_DAYS),
}
