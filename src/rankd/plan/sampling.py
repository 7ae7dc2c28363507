"""Statistics of tables, counted in a sample of requests.

In: a Parquet or CSV file whose columns are tables and whose cells are ids or lists of ids (in CSV: ids with spaces
between), a row a sample; or batches of JaggedIds. Out: a StatisticsFile.

How hot rows are is found in halves: rows are ranked by every second sample, and what goes to the first of them is
counted in the others. In one and the same sample the hottest rows are partly those that chance made hot, and a small
sample would promise a cache more than it keeps. Rows that the first half does not have are taken as equally likely.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import polars as pl

from rankd.embeddings.jagged import JaggedIds
from rankd.errors import DataError
from rankd.plan.declaration import StatisticsFile
from rankd.plan.table_statistics import HOT_SHARES, TableStatistics
from rankd.types import Int64Array

NO_IDS = np.zeros(0, np.int64)


class _Counted:
    """What was seen of one table."""

    def __init__(self) -> None:
        self.lookups = self.used = 0
        self.ranking: list[Int64Array] = []
        self.measuring: list[Int64Array] = []

    def add(self, ids: Int64Array, lengths: Int64Array, first: int) -> None:
        """The ids of samples number `first` and on, each with so many."""
        self.lookups += len(ids)
        self.used += int(np.count_nonzero(lengths))
        even = np.repeat((np.arange(len(lengths)) + first) % 2 == 0, lengths)
        self.ranking.append(ids[even])
        self.measuring.append(ids[~even])

    def hot(self, rows: int) -> tuple[float, float, float, float]:
        """For each of HOT_SHARES: the share of look-ups that go to so many of the hottest rows."""
        ranked, counts = np.unique(np.concatenate([NO_IDS, *self.ranking]), return_counts=True)
        ranked = ranked[np.argsort(-counts, kind="stable")]
        measured = np.concatenate([NO_IDS, *self.measuring])
        if not len(measured) or not len(ranked):
            return HOT_SHARES
        found, times = np.unique(measured, return_counts=True)
        place = np.minimum(np.searchsorted(found, ranked), len(found) - 1)
        hits = np.where(found[place] == ranked, times[place], 0)
        covered = np.concatenate([[0.0], np.cumsum(hits) / len(measured)])
        rest, unseen = 1.0 - covered[-1], max(rows - len(ranked), 1)
        shares = []
        for share in HOT_SHARES:
            count = int(rows * share)
            seen = min(count, len(ranked))
            shares.append(min(float(covered[seen]) + float(rest) * (count - seen) / unseen, 1.0))
        return shares[0], shares[1], shares[2], shares[3]


def count_batches(batches: Iterable[JaggedIds], rows: Mapping[str, int]) -> StatisticsFile:
    """Statistics of the tables in all batches; `rows` is how many each has.

    Raises:
        InvalidRequest: offsets that do not fit. DataError: an unknown table, or an id outside of its table.
    """
    counted: dict[str, _Counted] = {}
    samples = 0
    for batch in batches:
        batch.check()
        size = batch.num_samples
        lengths = np.diff(batch.offsets).reshape(len(batch.tables), size)
        for number, table in enumerate(batch.tables):
            ids = batch.ids[batch.offsets[number * size] : batch.offsets[(number + 1) * size]]
            _check_ids(table, ids, rows)
            counted.setdefault(table, _Counted()).add(ids, lengths[number], samples)
        samples += size
    return StatisticsFile(
        samples,
        tuple(
            TableStatistics(table, one.lookups / max(samples, 1), one.used / max(samples, 1), one.hot(rows[table]))
            for table, one in counted.items()
        ),
    )


def count_file(path: Path, rows: Mapping[str, int] | None) -> StatisticsFile:
    """Statistics of a file's columns: those named in `rows`, or all, each with as many rows as its largest id asks for.

    Raises:
        DataError: unreadable, a table without a column, cells that are no ids, or an id outside of its table.
    """
    frame = _read(path)
    names = list(frame.columns if rows is None else rows)
    if lost := [name for name in names if name not in frame.columns]:
        raise DataError(f"{path}: there is no column for table '{lost[0]}'; there are {', '.join(frame.columns)}")
    if not names or not frame.height:
        raise DataError(f"{path}: {len(names)} columns of {frame.height} samples; there has to be one of each at least")
    columns = [_jagged(frame[name], path) for name in names]
    lengths = np.concatenate([lengths for _, lengths in columns])
    ids = np.concatenate([ids for ids, _ in columns])
    if rows is None:
        rows = {name: int(some.max(initial=0)) + 1 for name, (some, _) in zip(names, columns, strict=True)}
    return count_batches([JaggedIds(tuple(names), np.concatenate([[0], np.cumsum(lengths)]), ids)], rows)


def _check_ids(table: str, ids: Int64Array, rows: Mapping[str, int]) -> None:
    if table not in rows:
        raise DataError(f"table '{table}' is not declared; declared are {', '.join(rows)}")
    wrong = ids[(ids < 0) | (ids >= rows[table])]
    if len(wrong):
        raise DataError(f"id {wrong[0]} is outside of table '{table}', whose rows are 0 to {rows[table] - 1:,}")


def _read(path: Path) -> pl.DataFrame:
    try:
        return pl.read_csv(path, infer_schema=False) if path.suffix == ".csv" else pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet, or CSV if its name ends so: {error}") from error


def _jagged(column: pl.Series, path: Path) -> tuple[Int64Array, Int64Array]:
    """(ids, how many each sample has) of a column."""
    kind = column.dtype
    if kind == pl.String:
        column = column.str.strip_chars().replace("", None).str.split(" ")
    try:
        if isinstance(column.dtype, pl.List):
            column = column.list.drop_nulls()
            lengths = column.list.len().fill_null(0).cast(pl.Int64).to_numpy()
            return _int64(column.explode().drop_nulls()), lengths
        return _int64(column.drop_nulls()), column.is_not_null().cast(pl.Int64).to_numpy()
    except (pl.exceptions.PolarsError, TypeError) as error:
        raise DataError(
            f"{path}: column '{column.name}' is {kind}; cells have to be whole numbers, lists of them, or (in CSV) "
            f"numbers with single spaces between: {error}"
        ) from error


def _int64(ids: pl.Series) -> Int64Array:
    if ids.dtype != pl.String and not ids.dtype.is_integer():
        raise TypeError("these are no whole numbers")
    return ids.cast(pl.Int64).to_numpy()
