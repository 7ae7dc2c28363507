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
    for column, name in enumerate(schema.match):
        if name in _AFFINITIES:
            result[:, column] = _affinity(seen, candidates, items, _AFFINITIES[name](seen))
        elif name in _OF_USER:
            result[:, column] = np.log1p(_OF_USER[name](seen))
        else:
            result[:, column] = np.where(hit, _OF_SEEN[name](seen)[position], 0.0)
    return result


def _seen_items(history: UserHistory, now: int, schema: FeatureSchema) -> _Seen:
    rows, times = history.rows, history.times
    keep = rows >= FIRST_ITEM_ROW
    if schema.match_events:
        wanted = [schema.event_types.index(name) for name in schema.match_events]
        keep &= np.isin(history.events, wanted)
    rows, days = rows[keep], ((now - times[keep]) / SECONDS_A_DAY).astype(np.float32)
    unique, first, inverse, counts = np.unique(rows, return_index=True, return_inverse=True, return_counts=True)
    newest = np.empty(unique.shape[0], np.int64)
    newest[inverse] = np.arange(rows.shape[0])  # the last write to a slot is its newest event
    return _Seen(unique, counts, np.maximum(days[first], 0.0), np.maximum(days[newest], 0.0))


def _affinity(seen: _Seen, candidates: Int32Array, items: ItemTable, weights: Float32Array) -> Float32Array:
    scratch = _row_weights(items.neighbours.shape[0])
    scratch[seen.rows] = weights
    near = scratch[items.neighbours[candidates]]
    scratch[seen.rows] = 0.0
    total: Float32Array = np.log1p(np.einsum("cm,cm->c", near, items.similarities[candidates]))
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
