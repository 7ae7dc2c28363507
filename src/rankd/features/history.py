"""Extraction: from the whole history of a user to the N sub-sequences that a model reads.

In: a UserHistory. Out: for each sub-sequence the indices of its events, oldest first. `assembly.py` gathers them.
"""

from __future__ import annotations

import numpy as np

from rankd.features.schema import FeatureSchema, Strategy, SubSequence
from rankd.types import Int32Array, Int64Array, UserHistory


def extract(
    history: UserHistory, sub_sequence: SubSequence, schema: FeatureSchema, item_categories: Int32Array
) -> Int64Array:
    """Indices (n,) int64, ascending, of the newest events that the strategy picks, at most `history_length`.

    `item_categories` is (rows, G) int32, read by `category` alone.

    >>> rows 7 3 7 9 3   recent, length 3 -> 2 3 4    distinct -> 2 3 4    repeated -> 2 4
    """
    size, length = len(history), schema.history_length
    match sub_sequence.strategy:
        case Strategy.RECENT:
            return np.arange(_window_start(max(size - length, 0), history, schema), size)
        case Strategy.EVENT:
            wanted = [schema.event_types.index(name) for name in sub_sequence.events]
            picked = np.flatnonzero(np.isin(history.events, wanted))
            oldest = int(picked[-length]) if len(picked) > length else 0
            return picked[np.searchsorted(picked, _window_start(oldest, history, schema)) :]
        case Strategy.DISTINCT:
            picked, _ = _last_events(history.rows)
        case Strategy.REPEATED:
            last, counts = _last_events(history.rows)
            picked = last[counts > 1]
        case Strategy.CATEGORY:
            picked = _in_top_categories(history.rows, sub_sequence, schema, item_categories)
    return np.sort(picked)[-length:]


def _window_start(oldest: int, history: UserHistory, schema: FeatureSchema) -> int:
    """The index from which events are read, given the oldest that would fit: the next number of an event that is a
    multiple of `window_step`.

    Counted from the user's first event ever, so that the window stands still for `window_step` events and the state of
    a history can be extended meanwhile, whoever computes it and whenever.

    >>> step 4, length 8: after 8 events all are read; after 9..12 those from number 4 on (5 to 8); after 13 from 8 on
    """
    step = schema.window_step
    return -(-(history.dropped + oldest) // step) * step - history.dropped


def _last_events(rows: Int32Array) -> tuple[Int64Array, Int64Array]:
    """The index of the newest event of each distinct item, and how often the item came."""
    _, first_from_end, counts = np.unique(rows[::-1], return_index=True, return_counts=True)
    return rows.shape[0] - 1 - first_from_end, counts


def _in_top_categories(
    rows: Int32Array, sub_sequence: SubSequence, schema: FeatureSchema, item_categories: Int32Array
) -> Int64Array:
    start = 0
    for column in schema.item_categorical:
        if column.name == sub_sequence.column:
            break
        start += column.width
    codes = item_categories[rows, start : start + column.width]
    counts = np.bincount(codes.ravel(), minlength=schema.num_item_codes)
    counts[0] = 0  # no value
    top = np.argsort(-counts, kind="stable")[: sub_sequence.top]
    wanted = np.zeros(counts.shape[0], bool)
    wanted[top] = counts[top] > 0
    return np.flatnonzero(wanted[codes].any(axis=1))
