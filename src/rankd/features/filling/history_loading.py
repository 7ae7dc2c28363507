"""Filling a store's histories from a Parquet file of events (`history_records.py`).

A user is written in one step, by appending. What a history has already is not added again, so that a load may be
repeated after an interruption, or with a longer file. A history only grows at its new end: events that are older than
its newest one are passed over and counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from rankd.features.filling.history_records import EventFile, UserRecords
from rankd.features.filling.loading import Progress, check_namespace
from rankd.features.filling.patience import Patience
from rankd.features.stores.event_records import counts_of, unpack_events
from rankd.features.stores.feature_store import FeatureStore, HistoryRead, StoreFailure
from rankd.features.stores.store_keys import history_key, history_prefix
from rankd.types import Array


@dataclass(frozen=True, slots=True)
class HistoryOptions:
    """How histories are filled.

    `event` is what events are that have no name in the file. `values` are the columns that go with them; None takes
    all numeric ones. The newest `keep` events of a user stay. A store in trouble is asked again for
    `patience_seconds`. `in_flight` users are written at once.
    """

    event: str = ""
    values: tuple[str, ...] | None = None
    keep: int = 1000
    patience_seconds: float = 30.0
    in_flight: int = 256


@dataclass(frozen=True, slots=True)
class HistoryReport:
    """What became of `events` rows: `added`; `known`, which the history had; `older` than its newest event; `cut`,
    beyond the newest that are kept of a user; `incomplete`, without user, item or time."""

    namespace: str
    users: int
    events: int
    added: int
    known: int
    older: int
    cut: int
    incomplete: int
    seconds: float


def load_histories(
    store: FeatureStore,
    namespace: str,
    path: Path,
    options: HistoryOptions = HistoryOptions(),
    progress: Progress = lambda done, total, line: None,
) -> HistoryReport:
    """Append the events of a file to the histories of their users, in the order of their times.

    Raises:
        DataError: the file does not fit.
        StoreFailure: no answer within the patience; the same command goes on from there.
    """
    began = time.monotonic()
    check_namespace(namespace)
    file = EventFile(path, options.event, options.values)
    patience = Patience(options.patience_seconds)
    counts = _Counts()
    done = 0
    try:
        for rows, users in file.parts(options.keep):
            counts.cut += sum(user.cut for user in users)
            for start in range(0, len(users), options.in_flight):
                some = users[start : start + options.in_flight]
                _append(store, namespace, some, options.keep, patience, counts)
                counts.users += len(some)
                done += sum(len(user.records) + user.cut for user in some)
                progress(done, file.events, "appending")
            counts.incomplete += rows - sum(len(user.records) + user.cut for user in users)
    except StoreFailure as failure:
        raise StoreFailure(
            f"{failure}. The events of {counts.users:,} users are in the store; run the same command again, nothing is "
            f"added twice",
            failure.trouble,
        ) from failure
    return HistoryReport(
        namespace,
        counts.users,
        file.events,
        counts.added,
        counts.known,
        counts.older,
        counts.cut,
        counts.incomplete,
        time.monotonic() - began,
    )


def count_histories(store: FeatureStore, namespace: str) -> int:
    """About how many users have a history; reads the names of all keys, of which a store may give some twice.

    Raises:
        StoreFailure: no answer.
    """
    return sum(len(keys) for keys in store.keys(history_prefix(namespace)))


@dataclass(slots=True)
class _Counts:
    users: int = 0
    added: int = 0
    known: int = 0
    older: int = 0
    cut: int = 0
    incomplete: int = 0


def _append(
    store: FeatureStore,
    namespace: str,
    users: Sequence[UserRecords],
    keep: int,
    patience: Patience,
    counts: _Counts,
) -> None:
    """Write what is new of some users, all of them at once."""
    keys = [history_key(namespace, user.user_id) for user in users]
    asked = [store.history(key) for key in keys]
    appending: list[tuple[bytes, Array]] = []
    for key, user, future in zip(keys, users, asked, strict=True):
        read = patience.answer(future, partial(store.history, key))
        new = _new_events(user.records, read, counts)
        if len(new):
            appending.append((key, new))
    answers = store.append_many([(key, new.tobytes()) for key, new in appending], keep)
    for answer, (key, new) in zip(answers, appending, strict=True):
        patience.answer(answer, partial(store.append, key, new.tobytes(), keep))
        counts.added += len(new)


def _new_events(records: Array, read: HistoryRead, counts: _Counts) -> Array:
    """The events that can be put behind a history."""
    if read.record is None:
        return records
    there = unpack_events(read.record)
    known = np.isin(records["id"], there["id"])
    newest = there["time"].max(initial=np.iinfo(np.int64).min)
    # Of the second of the newest event some may have been dropped, which must not come back.
    late = records["time"] > newest if counts_of(read.record)[0] else records["time"] >= newest
    counts.known += int(known.sum())
    counts.older += int((~known & ~late).sum())
    new: Array = records[~known & late]
    return new
