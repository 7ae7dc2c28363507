"""Point-in-time knowledge of items: what a nightly job would have written into the item table on a given day.

A snapshot sees only events strictly before its moment, so a training example never sees its own label in a popularity
or a similarity. Each example uses the newest snapshot before it; serving uses the newest of all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import sparse
from scipy.stats import rankdata

from rankd.features.schema import Categorical, Numeric
from rankd.features.tables import ItemTable, encode_values, normalise, split_words
from rankd.train.description import FeatureColumn, FeatureKind
from rankd.train.interactions import ANONYMOUS, InteractionLog
from rankd.types import Float32Array, Int32Array, Int64Array

Float64Array = npt.NDArray[np.float64]

SECONDS_A_DAY = 86_400
STATISTICS = (
    Numeric("popularity"),
    Numeric("popularity_30d"),
    Numeric("popularity_7d"),
    Numeric("users_30d"),
    Numeric("age"),
    Numeric("staleness"),
    Numeric("loyalty"),
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The items as known at `as_of` (seconds since 1970): raw (I, F) float32 with NaN for unknown, and neighbours."""

    as_of: int
    raw: Float32Array
    neighbours: Int32Array
    similarities: Float32Array

    @property
    def known(self) -> Int64Array:
        """Rows of the items that had been seen by then."""
        return np.flatnonzero(~np.isnan(self.raw[:, 0]))


def snapshot_times(log: InteractionLog, cuts: Iterable[int]) -> list[int]:
    """One moment every `snapshot_days` from the start of the log, and one at each cut (split dates, the log's end)."""
    step = log.description.snapshot_days * SECONDS_A_DAY
    start = int(log.times[0]) // SECONDS_A_DAY * SECONDS_A_DAY
    cuts = sorted(set(cuts))
    regular = [time for time in range(start + step, cuts[0], step) if cuts[0] - time >= step // 2]
    return regular + cuts


def take_snapshot(log: InteractionLog, as_of: int) -> Snapshot:
    """Statistics of every item from the events before `as_of`, and its nearest items by co-occurrence."""
    past = log.before(as_of)
    matching = _matching(log, past)
    rows, users = log.rows[past][matching], log.users[past][matching]
    days = (as_of - log.times[past][matching]) / SECONDS_A_DAY
    raw = [*_statistics(rows, users, days, log.num_item_rows), *_item_numeric(log, past)]
    similarity = item_cosine(rows[users != ANONYMOUS], users[users != ANONYMOUS], log.num_item_rows)
    neighbours, similarities = _nearest(similarity, log.description.num_neighbours)
    return Snapshot(as_of, np.stack(raw, axis=1).astype(np.float32), neighbours, similarities)


def _matching(log: InteractionLog, past: slice) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    wanted = log.description.match_events or log.event_types
    return np.isin(log.events[past], [log.event_types.index(name) for name in wanted])


def _statistics(rows: Int32Array, users: Int32Array, days: Float64Array, size: int) -> list[Float64Array]:
    """The columns of STATISTICS, in their order, each as the share of the known items that are below.

    Shares and not amounts: amounts drift as the log grows (a network then meets values that it never saw in training),
    an item's place among the others does not.
    """

    def count(within: float) -> Float64Array:
        return np.bincount(rows[days <= within], minlength=size).astype(np.float64)

    recent = days <= 30.0
    pairs = np.unique(np.stack([rows[recent], users[recent]], 1), axis=0)[:, 0]
    first, last = np.full(size, np.nan), np.full(size, np.nan)
    first[rows[::-1]] = days[::-1]  # rows are in time order: the last write of each direction wins
    last[rows] = days
    named = users != ANONYMOUS
    owners = np.bincount(np.unique(np.stack([rows[named], users[named]], 1), axis=0)[:, 0], minlength=size)
    events = np.bincount(rows[named], minlength=size)
    columns = [
        count(np.inf),
        count(30.0),
        count(7.0),
        np.bincount(pairs, minlength=size),
        first,
        last,
        np.where(events > 0, 1.0 - owners / np.maximum(events, 1), np.nan),
    ]
    known = count(np.inf) > 0
    return [_share_below(np.where(known, column, np.nan)) for column in columns]


def _share_below(column: Float64Array) -> Float64Array:
    """The rank of each value among all that are not NaN, in 0..1, equal values sharing their mean rank."""
    result = np.full(column.shape, np.nan)
    given = ~np.isnan(column)
    result[given] = (rankdata(column[given]) - 0.5) / max(int(given.sum()), 1)
    return result


def _item_numeric(log: InteractionLog, past: slice) -> list[Float64Array]:
    """Each numeric item column of the description: its mean over the newest 20 lines of the item."""
    columns = []
    for feature in log.description.item_features:
        if feature.kind is not FeatureKind.NUMERIC:
            continue
        means = (
            pl.DataFrame({"row": log.rows[past], "value": log.frame[feature.column][past].cast(pl.Float64)})
            .group_by("row")
            .agg(pl.col("value").drop_nulls().tail(20).mean())
        )
        column = np.full(log.num_item_rows, np.nan)
        column[means["row"].to_numpy()] = means["value"].to_numpy()
        columns.append(column)
    return columns


def item_cosine(rows: Int32Array, groups: Int32Array, size: int) -> sparse.csr_matrix:
    """Cosine of two items' sets of groups (users, baskets): |both| / sqrt(|one| |other|), (I, I), no diagonal."""
    ones = np.ones(rows.shape[0], np.float32)
    matrix = sparse.csr_matrix((ones, (groups, rows)), shape=(int(groups.max(initial=0)) + 1, size))
    matrix.data[:] = 1.0  # the constructor added repeats up
    counts = np.asarray(matrix.sum(axis=0)).ravel()
    scale = sparse.diags(1.0 / np.sqrt(np.maximum(counts, 1.0)))
    cosine = sparse.csr_matrix(scale @ (matrix.T @ matrix) @ scale)
    cosine.setdiag(0.0)
    cosine.eliminate_zeros()
    return cosine


def _nearest(cosine: sparse.csr_matrix, count: int) -> tuple[Int32Array, Float32Array]:
    """The `count` most similar items of each row, 0-padded."""
    size = cosine.shape[0]
    neighbours, similarities = np.zeros((size, count), np.int32), np.zeros((size, count), np.float32)
    for row in range(size):
        start, end = cosine.indptr[row], cosine.indptr[row + 1]
        values, columns = cosine.data[start:end], cosine.indices[start:end]
        best = np.argsort(-values, kind="stable")[:count]
        neighbours[row, : len(best)] = columns[best]
        similarities[row, : len(best)] = values[best]
    return neighbours, similarities


def numeric_columns(log: InteractionLog, snapshots: list[Snapshot]) -> tuple[Numeric, ...]:
    """The schema of the items' numeric columns, mean and std taken over all snapshots of the training time."""
    declared = [f for f in log.description.item_features if f.kind is FeatureKind.NUMERIC]
    columns = [*STATISTICS, *(Numeric(feature.name, log1p=feature.log1p) for feature in declared)]
    values = np.concatenate([snapshot.raw[snapshot.known] for snapshot in snapshots])
    fitted = []
    for index, column in enumerate(columns):
        seen = normalise(column, values[:, index][~np.isnan(values[:, index])])
        mean, std = (float(seen.mean()), float(seen.std())) if len(seen) else (0.0, 1.0)
        fitted.append(Numeric(column.name, mean=mean, std=max(std, 1e-6), log1p=column.log1p))
    return tuple(fitted)


def item_table(snapshot: Snapshot, numeric: tuple[Numeric, ...], categories: Int32Array) -> ItemTable:
    """A snapshot as assembly reads it."""
    columns = [normalise(column, snapshot.raw[:, index]) for index, column in enumerate(numeric)]
    return ItemTable(categories, np.stack(columns, axis=1), snapshot.neighbours, snapshot.similarities)


def categorical_columns(
    frame: pl.DataFrame, features: tuple[FeatureColumn, ...], key: str, num_keys: int
) -> tuple[tuple[Categorical, ...], Int32Array, dict[str, tuple[str, ...]]]:
    """Categorical schema and codes (num_keys, G) int32 of items or users, and the vocabulary of each column.

    `key` is the frame's column of positions 0..num_keys-1 (negative: nobody); a key's value is its first one.
    """
    columns: list[Categorical] = []
    codes = [np.zeros((num_keys, 0), np.int32)]
    vocabularies: dict[str, tuple[str, ...]] = {}
    offset = 1
    for feature in features:
        if feature.kind is FeatureKind.NUMERIC:
            continue
        first = frame.filter(pl.col(key) >= 0).group_by(key).agg(pl.col(feature.column).drop_nulls().first())
        raw: list[str | None] = [None] * num_keys
        for position, value in first.iter_rows():
            raw[position] = None if value is None else str(value)
        words = feature.kind is FeatureKind.WORDS
        parts = [part for value in raw if value is not None for part in (split_words(value) if words else [value])]
        counts = (
            pl.Series("value", parts, dtype=pl.String).value_counts().sort("count", "value", descending=[True, False])
        )
        vocabulary = tuple(counts["value"].head(feature.vocabulary))
        column = Categorical(feature.name, offset, len(vocabulary), width=feature.width, words=words)
        columns.append(column)
        codes.append(encode_values(column, vocabulary, raw))
        vocabularies[feature.name] = vocabulary
        offset += column.size
    return tuple(columns), np.concatenate(codes, axis=1), vocabularies
