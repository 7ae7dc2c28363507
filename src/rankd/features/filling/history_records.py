"""Events of a Parquet file as the records of histories (`stores/event_records.py`), all of a part at once.

In: columns user_id, item_id, time (a timestamp or whole seconds since 1970), event (or one name for all), and numeric
columns, which are the events' values. Out: for each user the newest events, oldest first. `history_loading.py` appends
them.

The id of an event is a hash of its user, item, time and type, and of its number among those that are the same in all
four. So the same event has the same id whenever and wherever it is read, and is not added twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from rankd.errors import DataError, nearest
from rankd.features.filling.row_file import ParquetFile
from rankd.features.parquet import _seconds as time_in_seconds
from rankd.features.stores.event_records import MAX_VALUES, RECORD, hash_name
from rankd.features.stores.store_keys import hash_id
from rankd.types import Array

PART_EVENTS = 4_000_000  # read and sorted at a time, about 1 GB
REQUIRED = ("user_id", "item_id", "time")


@dataclass(frozen=True, slots=True)
class UserRecords:
    """The newest events of one user as the file has them: `records` (n,) RECORD, oldest first; `cut` are left out."""

    user_id: str
    records: Array
    cut: int


class EventFile:
    """A file of events. `event` names those of a file without such a column, and of rows where it is empty.

    `values` are the columns to keep with each event; None takes all that are numeric.

    Raises:
        DataError: unreadable, a column is missing or of the wrong type, or there are too many values.
    """

    def __init__(self, path: Path, event: str = "", values: tuple[str, ...] | None = None) -> None:
        self.path, self.event = path, event
        self.file = ParquetFile(path)
        found = self.file.schema
        for name in REQUIRED:
            if name not in found:
                raise DataError(f"{path}: column '{name}' is missing; there are {', '.join(found)}")
        for name in ("user_id", "item_id"):
            if not (found[name].is_integer() or found[name] in (pl.String, pl.Categorical, pl.Enum)):
                raise DataError(f"{path}: column '{name}' is {found[name]}; ids are texts or whole numbers")
        self._time = time_in_seconds(pl.DataFrame(schema=found), path)
        if "event" not in found and not event:
            raise DataError(f"{path}: has no column 'event'; say with --event NAME what its rows are")
        self.values = self._values(values)

    @property
    def events(self) -> int:
        """Rows of the file."""
        return self.file.rows

    def parts(self, keep: int) -> Iterator[tuple[int, list[UserRecords]]]:
        """(rows of the file, users) part by part, the newest `keep` events of each user; a user is in one part.

        Each part is one pass over the file, so that the file may be in any order.

        Raises:
            DataError: damaged, changed meanwhile, or an event without a name.
        """
        num_parts = max(-(-self.events // PART_EVENTS), 1)
        rows = self.file.scan.select(
            pl.col("user_id", "item_id").cast(pl.String),
            self._time,
            self._named_event().alias("event"),
            *(pl.col(name).cast(pl.Float32).alias(f"value {name}") for name in self.values),
        )
        for part in range(num_parts):
            mine = rows.filter(pl.col("user_id").hash() % num_parts == part) if num_parts > 1 else rows
            frame = self.file.collect(mine)
            yield frame.height, self._users(frame.drop_nulls(REQUIRED), keep)

    def _values(self, chosen: tuple[str, ...] | None) -> tuple[str, ...]:
        found = self.file.schema
        numeric = [name for name, kind in found.items() if kind.is_numeric() and name not in (*REQUIRED, "event")]
        for name in chosen or ():
            if name not in numeric:
                raise DataError(
                    f"{self.path}: '{name}' is no numeric column; there are {', '.join(numeric) or 'none'}."
                    f"{nearest(name, numeric)}"
                )
        values = tuple(numeric if chosen is None else dict.fromkeys(chosen))
        if len(values) > MAX_VALUES:
            raise DataError(
                f"{self.path}: {len(values)} columns of values ({', '.join(values)}), and an event has at most "
                f"{MAX_VALUES}; choose with --values"
            )
        return values

    def _named_event(self) -> pl.Expr:
        if "event" not in self.file.schema:
            return pl.lit(self.event)
        named = pl.col("event").cast(pl.String)
        return named.fill_null(self.event) if self.event else named

    def _users(self, frame: pl.DataFrame, keep: int) -> list[UserRecords]:
        if frame.is_empty():
            return []
        if frame["event"].null_count():
            user = frame.filter(pl.col("event").is_null())["user_id"][0]
            raise DataError(f"{self.path}: an event of user '{user}' has no name; say with --event NAME what those are")
        frame = frame.sort("user_id", "time", maintain_order=True)
        same = pl.int_range(pl.len(), dtype=pl.UInt64).over("user_id", "item_id", "time", "event")
        frame = frame.with_columns(same.alias("number"))
        records = _records(frame, [f"value {name}" for name in self.values], self.values)
        runs = frame["user_id"].rle().struct.unnest()
        ends = np.cumsum(runs["len"].to_numpy().astype(np.int64)).tolist()
        users, start = [], 0
        for user_id, end in zip(runs["value"].to_list(), ends, strict=True):
            first = max(start, end - keep)
            users.append(UserRecords(user_id, records[first:end], first - start))
            start = end
        return users


def _records(frame: pl.DataFrame, columns: list[str], names: tuple[str, ...]) -> Array:
    """(n,) RECORD of sorted events."""
    records = np.zeros(frame.height, RECORD)
    users, records["item"] = _hashed(frame["user_id"]), _hashed(frame["item_id"])
    records["time"] = frame["time"].to_numpy()
    records["event"] = _hashed(frame["event"], of_names=True)
    places = np.zeros(frame.height, np.int64)
    for column, name in zip(columns, names, strict=True):
        value = frame[column].fill_null(float("nan")).to_numpy()
        (there,) = np.nonzero(~np.isnan(value))
        records["values"]["name"][there, places[there]] = hash_name(name)
        records["values"]["value"][there, places[there]] = value[there]
        places[there] += 1
    identity = users
    for part in (records["item"], records["time"].astype("<u8"), records["event"], frame["number"].to_numpy()):
        identity = _mixed(identity ^ part.astype(np.uint64))
    records["id"] = np.where(identity == 0, 1, identity)
    return records


def _hashed(texts: pl.Series, of_names: bool = False) -> Array:
    """(n,) uint64: the hash of each text, each different one hashed once."""
    distinct = texts.unique()
    hashes = np.fromiter(map(hash_name if of_names else hash_id, distinct), np.uint64, len(distinct))
    places = texts.replace_strict(distinct, np.arange(len(distinct)), return_dtype=pl.Int64)
    hashed: Array = hashes[places.to_numpy()]
    return hashed


def _mixed(words: Array) -> Array:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a small change in, all bits changed."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = words ^ (words >> np.uint64(31))
    return mixed
