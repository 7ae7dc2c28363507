"""Assembly: a history and candidate rows become the arrays that the graph reads.

In: UserHistory, candidate rows, user features, the moment. Out: Features. Training, evaluation and serving all pack
through this file, so the three cannot drift apart. Next: `engine/` computes on what leaves here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np

from rankd.errors import InvalidRequest
from rankd.features.history import extract
from rankd.features.matching import match_features
from rankd.features.schema import FeatureSchema
from rankd.features.tables import ItemTable, UserFeatures
from rankd.types import Array, Features, Int32Array, UserHistory


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


def history_arrays(schema: FeatureSchema, items: ItemTable, history: UserHistory) -> dict[str, Array]:
    """The inputs of `encode` (see `history_specs`), B = 1, T the smallest bucket that holds every sub-sequence.

    A history of rows 7 3 9 in bucket 4 becomes history_item [[7, 3, 9, 0]] and history_length [3].
    """
    picked = [extract(history, part, schema, items.categories) for part in schema.sub_sequences]
    blocks, tokens = len(picked), bucket_of(max(len(p) for p in picked), schema.history_buckets)
    arrays: dict[str, Array] = {
        "history_item": np.zeros((1, blocks, tokens), np.int32),
        "history_event": np.zeros((1, blocks, tokens), np.int32),
        "history_time": np.zeros((1, blocks, tokens), np.int32),
        "history_length": np.asarray([[len(p) for p in picked]], np.int32),
    }
    if schema.item_columns:
        arrays["history_categories"] = np.zeros((1, blocks, tokens, schema.item_columns), np.int32)
    if schema.event_values:
        arrays["history_values"] = np.zeros((1, blocks, tokens, len(schema.event_values)), np.float32)
    for block, indices in enumerate(picked):
        size = len(indices)
        rows = history.rows[indices]
        arrays["history_item"][0, block, :size] = rows
        arrays["history_event"][0, block, :size] = history.events[indices]
        arrays["history_time"][0, block, :size] = _graph_time(history.times[indices], schema)
        if schema.item_columns:
            arrays["history_categories"][0, block, :size] = items.categories[rows]
        if schema.event_values:
            arrays["history_values"][0, block, :size] = history.values[indices]
    return arrays


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
    count = candidates.shape[0]
    padded = bucket_of(count, schema.candidate_buckets)
    rows = np.zeros((1, padded), np.int32)
    rows[0, :count] = candidates
    arrays: dict[str, Array] = {"candidate_item": rows, "context_time": _graph_time(np.asarray([now]), schema)}
    if schema.item_columns:
        arrays["candidate_categories"] = items.categories[rows]
    if schema.candidate_numeric:
        numeric = np.zeros((1, padded, schema.candidate_numeric), np.float32)
        own = len(schema.item_numeric)
        numeric[0, :count, :own] = items.numeric[candidates]
        numeric[0, :count, own:] = match_features(history, candidates, now, items, schema)
        arrays["candidate_numeric"] = numeric
    if schema.user_columns:
        arrays["context_categories"] = user.categories[None]
    if schema.user_numeric:
        arrays["context_numeric"] = user.numeric[None]
    return arrays


def _graph_time(times: Array, schema: FeatureSchema) -> Int32Array:
    """Seconds since the schema's origin, clipped to int32 (68 years each way)."""
    seconds: Int32Array = np.minimum(np.maximum(times - schema.time_origin, -(2**31)), 2**31 - 1).astype(np.int32)
    return seconds
