"""Assembly: a history and candidate rows become the arrays that the graph reads.

In: UserHistory, candidate rows, user features, the moment. Out: Features, or an executor's own input arrays filled
(`staging.py`). Training, evaluation and serving all pack through this file, so the three cannot drift apart. Next:
`engine/` computes on what leaves here.

What is written into was used before: every array is written whole, its padding included.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np

from rankd.errors import InvalidRequest
from rankd.features.history import extract
from rankd.features.matching import check_shape, fill_match_features, kernels
from rankd.features.schema import PADDING_ROW, UNKNOWN_ROW, FeatureSchema, candidate_specs, history_specs
from rankd.features.staging import InputBuffers, allocate
from rankd.features.tables import ItemTable, UserFeatures, no_user_features
from rankd.types import Array, Features, Int32Array, Int64Array, UserHistory

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def bucket_of(size: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds `size`; the last one if none does."""
    return buckets[min(bisect_left(buckets, size), len(buckets) - 1)]


def assemble(
    schema: FeatureSchema,
    items: ItemTable,
    history: UserHistory,
    candidates: Int32Array,
    user: UserFeatures,
    now: int,
) -> Features:
    """Everything one request feeds the model, padded to the smallest warmed shapes.

    Args:
        candidates: (C,) int32 item rows, 1 <= C <= schema.max_candidates.
        now: the moment of the request in seconds since 1970-01-01 UTC; events after it are ignored.

    Raises:
        InvalidRequest: C is 0 or above the largest candidate bucket.
    """
    count = candidates.shape[0]
    if not 1 <= count <= schema.max_candidates:
        raise InvalidRequest(f"{count} candidates given; allowed are 1 to {schema.max_candidates}: split the request")
    history = until(history, now)
    return Features(
        history=history_arrays(schema, items, history),
        candidates=candidate_arrays(schema, items, history, candidates, user, now),
        num_candidates=count,
    )


def until(history: UserHistory, now: int) -> UserHistory:
    """The events that are not after `now`, in seconds since 1970-01-01 UTC, as views."""
    return history.until(int(np.searchsorted(history.times, now, side="right")))


def warm(schema: FeatureSchema, items: ItemTable) -> None:
    """Everything once for a user with one event and a candidate that nobody knows, so that no request waits for a
    compiler (3 s where no process before has kept the machine code)."""
    one, values = np.full(1, UNKNOWN_ROW, np.int32), np.zeros((1, len(schema.event_values)), np.float32)
    history = UserHistory(one, np.zeros(1, np.int32), np.zeros(1, np.int64), values)
    assemble(schema, items, history, one, no_user_features(schema), 0)


def history_arrays(schema: FeatureSchema, items: ItemTable, history: UserHistory) -> dict[str, Array]:
    """The inputs of `encode` (see `history_specs`), B = 1, T the smallest bucket that holds every sub-sequence.

    A history of rows 7 3 9 in bucket 4 becomes history_item [[7, 3, 9, 0]] and history_length [3].
    """
    picked, tokens = _extracted(schema, items, history)
    arrays = dict(allocate(history_specs(schema), {"B": 1, "T": tokens}).arrays)
    _write_history(schema, items, history, picked, arrays)
    return arrays


def fill_history(
    schema: FeatureSchema, items: ItemTable, history: UserHistory, buffers: InputBuffers
) -> Mapping[str, Array]:
    """As `history_arrays`, in an executor's buffers: what is returned is overwritten by the next history."""
    picked, tokens = _extracted(schema, items, history)
    arrays = buffers.history(tokens).arrays
    _write_history(schema, items, history, picked, arrays)
    return arrays


def _extracted(schema: FeatureSchema, items: ItemTable, history: UserHistory) -> tuple[list[Int64Array], int]:
    """The indices of each sub-sequence's events, and the smallest bucket that holds them all."""
    picked = [extract(history, part, schema, items.categories) for part in schema.sub_sequences]
    return picked, bucket_of(max(len(p) for p in picked), schema.history_buckets)


def _write_history(
    schema: FeatureSchema,
    items: ItemTable,
    history: UserHistory,
    picked: Sequence[Int64Array],
    into: Mapping[str, Array],
) -> None:
    """Write sub-sequence n, the events `picked[n]`, into place n of (1, N, T, ...); zeros follow it."""
    for block, indices in enumerate(picked):
        size = len(indices)
        into["history_length"][0, block] = size
        real = {name: array[0, block, :size] for name, array in into.items() if name != "history_length"}
        rows = real["history_item"]
        rows[...] = history.rows[indices]
        real["history_event"][...] = history.events[indices]
        seconds = history.times[indices] - schema.time_origin
        real["history_time"][...] = np.minimum(np.maximum(seconds, INT32_MIN), INT32_MAX)
        if schema.item_columns:
            _gather(items.categories, rows, real["history_categories"])
        if schema.event_values:
            real["history_values"][...] = history.values[indices]
        for name in real:
            into[name][0, block, size:] = 0


def appended_tokens(tokens: Mapping[str, Array], lengths: Sequence[int], buckets: tuple[int, ...]) -> dict[str, Array]:
    """What follows the first `lengths[n]` tokens of each block: the inputs of `extend`, A the smallest bucket.

    >>> history_item [[7, 3, 9, 0]], history_length [3], lengths [1], bucket 4 -> [[3, 9, 0, 0]], history_length [2]
    """
    whole = tokens["history_length"][0]
    counts = whole - np.asarray(lengths, np.int32)
    room = bucket_of(int(counts.max()), buckets)
    new: dict[str, Array] = {"history_length": counts[None].astype(np.int32)}
    for name, array in tokens.items():
        if name == "history_length":
            continue
        new[name] = np.zeros((*array.shape[:2], room, *array.shape[3:]), array.dtype)
        for block, (start, count) in enumerate(zip(lengths, counts, strict=True)):
            new[name][0, block, :count] = array[0, block, start : start + count]
    return new


def candidate_arrays(
    schema: FeatureSchema,
    items: ItemTable,
    history: UserHistory,
    candidates: Int32Array,
    user: UserFeatures,
    now: int,
) -> dict[str, Array]:
    """The inputs of `score` beside the state (see `candidate_specs`), B = 1, C the smallest bucket."""
    padded = bucket_of(candidates.shape[0], schema.candidate_buckets)
    arrays = dict(allocate(candidate_specs(schema), {"B": 1, "C": padded}).arrays)
    fill_candidates(schema, items, history, candidates, user, now, arrays)
    return arrays


def fill_candidates(
    schema: FeatureSchema,
    items: ItemTable,
    history: UserHistory,
    candidates: Int32Array,
    user: UserFeatures,
    now: int,
    into: Mapping[str, Array],
) -> None:
    """As `candidate_arrays`, in given arrays (1, C or more, ...): those of `CandidateBuffers.row`.

    Nothing is allocated whose size depends on the request.

    Raises:
        IndexError: a row that the item table does not have.
        ValueError: more candidates than the arrays have room for.
    """
    fill_item_columns(schema, items, candidates, into)
    fill_request_columns(schema, items, history, candidates, user, now, into)


def fill_item_columns(
    schema: FeatureSchema, items: ItemTable, candidates: Int32Array, into: Mapping[str, Array]
) -> None:
    """What is known of the candidates whoever asks: rows, categories, and the first columns of candidate_numeric.

    Fresher values (of a feature store) may be written over these, before or after `fill_request_columns`.
    """
    count, own = candidates.shape[0], len(schema.item_numeric)
    rows = into["candidate_item"][0]
    rows[:count] = candidates
    rows[count:] = PADDING_ROW
    if schema.item_columns:
        categories = into["candidate_categories"][0]
        _gather(items.categories, candidates, categories[:count])
        categories[count:] = items.categories[PADDING_ROW]
    if own:
        numeric = into["candidate_numeric"][0, :, :own]
        _gather(items.numeric, candidates, numeric[:count])
        numeric[count:] = 0.0


def fill_request_columns(
    schema: FeatureSchema,
    items: ItemTable,
    history: UserHistory,
    candidates: Int32Array,
    user: UserFeatures,
    now: int,
    into: Mapping[str, Array],
) -> None:
    """What depends on who asks and when: the match features, the moment, the user. It reads nothing in `into`."""
    into["context_time"][0] = min(max(now - schema.time_origin, INT32_MIN), INT32_MAX)
    if schema.match:
        count = candidates.shape[0]
        match = into["candidate_numeric"][0, :, len(schema.item_numeric) :]
        fill_match_features(schema, items, history, candidates, now, match[:count])
        match[count:] = 0.0
    if schema.user_columns:
        into["context_categories"][0] = user.categories
    if schema.user_numeric:
        into["context_numeric"][0] = user.numeric


def _gather(table: Array, rows: Int32Array, into: Array) -> None:
    """Rows (n,) of a table (I, F) into (n, F): NumPy's own `take` would allocate for an output with gaps."""
    check_shape(into, (rows.shape[0], table.shape[1]))
    kernels().gather_rows(table, rows, into)
