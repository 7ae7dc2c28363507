"""From a log to requests with answers: a user, a moment, the history before it, candidates, and what they became.

The catalogue and the histories are packed once (`Dataset`); a `Sample` is cut from them by position. The same
`assemble` as in serving turns a sample into arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

import msgspec
import numpy as np
import polars as pl

from rankd.errors import ConfigError, DataError
from rankd.features.schema import UNKNOWN_ROW, Categorical, DefaultTime, FeatureSchema, Numeric, SubSequence, Task
from rankd.features.tables import ItemTable, UserFeatures, normalise
from rankd.train.description import FeatureKind, TaskRule
from rankd.train.interactions import ANONYMOUS, InteractionLog
from rankd.train.snapshots import (
    Snapshot,
    categorical_columns,
    item_table,
    numeric_columns,
    snapshot_times,
    take_snapshot,
)
from rankd.types import Float32Array, Int32Array, Int64Array, UserHistory


@dataclass(frozen=True, slots=True)
class Sample:
    """One basket as a request: items (P,) int32 of the basket with labels (P, K) float32, before `time` of `user`."""

    user: int
    time: int
    snapshot: int
    items: Int32Array
    labels: Float32Array


@dataclass(frozen=True, slots=True)
class Dataset:
    """A log, packed: the schema, histories by user, and an item table for each snapshot (oldest first)."""

    log: InteractionLog
    schema: FeatureSchema
    histories: tuple[UserHistory, ...]
    snapshots: tuple[Snapshot, ...]
    tables: tuple[ItemTable, ...]
    users: tuple[UserFeatures, ...]
    vocabularies: dict[str, tuple[str, ...]]
    train_until: int
    validate_until: int

    def history_before(self, user: int, time: int) -> UserHistory:
        """The events of a user strictly before a moment, as many as a store keeps."""
        history = self.histories[user]
        end = int(np.searchsorted(history.times, time, side="left"))
        return history.until(end).last(self.schema.stored_history)


class Shapes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The part of the schema that a person chooses rather than the log."""

    sub_sequences: tuple[SubSequence, ...]
    history_length: int = 64
    history_buckets: tuple[int, ...] = ()
    candidate_buckets: tuple[int, ...] = (32, 128, 512)
    stored_history: int = 1000
    window_step: int = 1
    missing_item_score: float = -30.0


def seconds_of(date: str) -> int:
    """Midnight UTC of YYYY-MM-DD, in seconds since 1970.

    Raises:
        DataError: not a date.
    """
    try:
        return int(datetime.fromisoformat(date).replace(tzinfo=UTC).timestamp())
    except ValueError as error:
        raise DataError(f"'{date}' is not a date; write YYYY-MM-DD") from error


def date_of(seconds: int) -> str:
    """YYYY-MM-DD of a moment, UTC."""
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


def prepare(log: InteractionLog, shapes: Shapes) -> Dataset:
    """Pack a log: snapshots up to the log's end, the schema fitted on the time before `train_until`."""
    split = log.description.split
    train_until, validate_until = seconds_of(split.train_until), seconds_of(split.validate_until)
    end = int(log.times[-1]) + 1
    if not log.times[0] < train_until < validate_until < end:
        first, last = (date_of(int(t)) for t in (log.times[0], log.times[-1]))
        raise DataError(
            f"the split ({split.train_until}, {split.validate_until}) has to cut the log's time, {first} to {last}, "
            "into three parts in that order"
        )
    snapshots = [take_snapshot(log, time) for time in snapshot_times(log, (train_until, validate_until, end))]
    numeric = numeric_columns(log, [s for s in snapshots if s.as_of <= train_until])
    items = log.frame.with_columns(rankd_key=pl.Series(log.rows))
    item_columns, item_codes, item_words = categorical_columns(
        items, log.description.item_features, "rankd_key", log.num_item_rows
    )
    people = log.frame.with_columns(rankd_key=pl.Series(log.users))
    user_columns, user_codes, user_words = categorical_columns(
        people, log.description.user_features, "rankd_key", len(log.user_ids)
    )
    schema = _schema(log, shapes, numeric, item_columns, user_columns)
    return Dataset(
        log=log,
        schema=schema,
        histories=_histories(log, schema),
        snapshots=tuple(snapshots),
        tables=tuple(item_table(snapshot, numeric, item_codes) for snapshot in snapshots),
        users=tuple(UserFeatures(row, np.zeros(0, np.float32)) for row in user_codes),
        vocabularies={
            **{f"item.{name}": values for name, values in item_words.items()},
            **{f"user.{name}": values for name, values in user_words.items()},
        },
        train_until=train_until,
        validate_until=validate_until,
    )


def _schema(
    log: InteractionLog,
    shapes: Shapes,
    numeric: tuple[Numeric, ...],
    item_columns: tuple[Categorical, ...],
    user_columns: tuple[Categorical, ...],
) -> FeatureSchema:
    description = log.description
    if not 1 <= shapes.window_step <= shapes.history_length <= shapes.stored_history:
        raise ConfigError(
            f"window_step {shapes.window_step}, history_length {shapes.history_length} and stored_history "
            f"{shapes.stored_history} have to be at least 1 and none larger than the next"
        )
    if any(feature.kind is FeatureKind.NUMERIC for feature in description.user_features):
        raise DataError("numeric user features are not read from a log yet; give them as categories")
    before = log.before(seconds_of(description.split.train_until))
    values = []
    for index, value in enumerate(description.event_values):
        column = Numeric(value.name, log1p=value.log1p)
        seen = normalise(column, log.values[before, index])
        values.append(msgspec.structs.replace(column, mean=float(seen.mean()), std=max(float(seen.std()), 1e-6)))
    return FeatureSchema(
        num_item_rows=log.num_item_rows,
        event_types=log.event_types,
        sub_sequences=shapes.sub_sequences,
        history_length=shapes.history_length,
        history_buckets=shapes.history_buckets or default_buckets(shapes.history_length),
        candidate_buckets=shapes.candidate_buckets,
        tasks=tuple(Task(rule.name, rule.rank_weight) for rule in description.tasks),
        stored_history=shapes.stored_history,
        window_step=shapes.window_step,
        item_categorical=item_columns,
        item_numeric=numeric,
        user_categorical=user_columns,
        event_values=tuple(values),
        match=description.match,
        match_events=description.match_events,
        time_origin=int(log.times[0]),
        log_end=int(log.times[-1]),
        default_time=DefaultTime(description.default_time),
        missing_item_score=shapes.missing_item_score,
    )


def default_buckets(length: int) -> tuple[int, ...]:
    """A quarter, a half and the whole of a length."""
    return tuple(sorted({max(length // 4, 1), max(length // 2, 1), length}))


def _histories(log: InteractionLog, schema: FeatureSchema) -> tuple[UserHistory, ...]:
    wanted = log.description.history_events or log.event_types
    keep = (log.users != ANONYMOUS) & np.isin(log.events, [log.event_types.index(name) for name in wanted])
    users = log.users[keep]
    order = np.argsort(users, kind="stable")
    values = np.stack(
        [normalise(column, log.values[keep, index]) for index, column in enumerate(schema.event_values)]
        or [np.zeros((users.shape[0], 0), np.float32)],
        axis=1,
    ).reshape(users.shape[0], -1)
    packed = UserHistory(log.rows[keep][order], log.events[keep][order], log.times[keep][order], values[order])
    bounds = np.searchsorted(users[order], np.arange(len(log.user_ids) + 1))
    return tuple(
        UserHistory(packed.rows[a:b], packed.events[a:b], packed.times[a:b], packed.values[a:b])
        for a, b in pairwise(bounds)
    )


def baskets_between(
    dataset: Dataset, start: int, end: int, keep_unseen: bool = False
) -> tuple[list[Sample], dict[str, int]]:
    """Every basket of a known user that begins in [start, end) and has a positive label, with counts of the rest.

    The snapshot of a sample is the newest that is not after the basket; in the test time it is the one taken when
    the test began. Items that the snapshot has never seen are left out, or become the unknown item where
    `keep_unseen` (in a test they belong to the truth, and no contestant can score them).
    """
    log = dataset.log
    lookup = np.asarray([snapshot.as_of for snapshot in dataset.snapshots])
    known = np.stack([_known_mask(snapshot, log.num_item_rows) for snapshot in dataset.snapshots])
    chosen = np.flatnonzero((log.users != ANONYMOUS) & (log.times >= start) & (log.times < end))
    order = chosen[np.lexsort((chosen, log.baskets[chosen], log.users[chosen]))]
    edges = np.flatnonzero(np.diff(log.baskets[order], prepend=-1) | np.diff(log.users[order], prepend=-1))
    samples: list[Sample] = []
    counts = {"baskets": 0, "without a positive label": 0, "before the first snapshot": 0, "items not seen before": 0}
    for lines in np.split(order, edges[1:]):
        counts["baskets"] += 1
        time = int(log.times[lines[0]])
        snapshot = int(np.searchsorted(lookup, _frozen_at(dataset, time), side="right")) - 1
        if snapshot < 0:
            counts["before the first snapshot"] += 1
            continue
        items, labels = _labels(log, lines)
        unseen = ~known[snapshot, items]
        counts["items not seen before"] += int(unseen.sum())
        items[unseen] = UNKNOWN_ROW
        if not keep_unseen:
            items, labels = items[~unseen], labels[~unseen]
        if not labels[:, 0].any():
            counts["without a positive label"] += 1
            continue
        samples.append(Sample(int(log.users[lines[0]]), time, snapshot, items, labels))
    samples.sort(key=lambda sample: (sample.time, sample.user))
    return samples, counts


def _frozen_at(dataset: Dataset, time: int) -> int:
    """In the test time items are known as they were when it began: nothing is learnt on the way."""
    return dataset.validate_until if time >= dataset.validate_until else time


def _known_mask(snapshot: Snapshot, size: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    mask = np.zeros(size, bool)
    mask[snapshot.known] = True
    return mask


def _labels(log: InteractionLog, lines: Int64Array) -> tuple[Int32Array, Float32Array]:
    """The distinct items of a basket and their K labels."""
    items, inverse = np.unique(log.rows[lines], return_inverse=True)
    labels = np.zeros((items.shape[0], len(log.description.tasks)), np.float32)
    for task, rule in enumerate(log.description.tasks):
        labels[inverse[_satisfies(log, lines, rule)], task] = 1.0
    return items, labels


def _satisfies(log: InteractionLog, lines: Int64Array, rule: TaskRule) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    wanted = np.isin(log.events[lines], [log.event_types.index(name) for name in rule.events])
    if rule.value:
        column = [value.name for value in log.description.event_values].index(rule.value)
        wanted &= log.values[lines, column] >= rule.at_least
    return wanted
