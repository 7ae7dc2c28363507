"""A Parquet file of rows, read a part at a time, and checked as a whole before any of it is used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import xxhash

from rankd.errors import DataError
from rankd.features.rows.row_packing import check_columns, check_embeddings
from rankd.features.rows.row_schema import ColumnKind, RowSchema
from rankd.types import Array

CHUNK_ROWS = 32_768  # a slice costs 40 ms whatever its size
CHUNK_BYTES = 64 << 20
_READ_BYTES = 1 << 20


class ParquetFile:
    """One file, and that it stays the same while it is read.

    Raises:
        DataError: not there, or not Parquet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._state = _state_of(path)
            self.scan = pl.scan_parquet(path, glob=False)
            self.schema = self.scan.collect_schema()
            self.rows = int(self.collect(self.scan.select(pl.len())).item())
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"{path}: cannot be read as Parquet: {error}") from error

    def collect(self, query: pl.LazyFrame) -> pl.DataFrame:
        """The result of a query on `scan`.

        Raises:
            DataError: the file is damaged, or another one than it was at first.
        """
        try:
            frame = query.collect()
        except (pl.exceptions.PolarsError, OSError) as error:
            self._check_unchanged()
            raise DataError(f"{self.path}: cannot be read as Parquet: {error}") from error
        self._check_unchanged()
        return frame

    def slices(self, names: list[str], first: int, rows: int) -> Iterator[tuple[int, pl.DataFrame]]:
        """(number of its first row, columns) of parts of the file from row `first` on, `rows` at a time.

        Raises:
            DataError: as `collect`.
        """
        columns = self.scan.select(list(dict.fromkeys(names)))
        for start in range(first, self.rows, rows):
            yield start, self.collect(columns.slice(start, rows))

    def mark(self) -> str:
        """What tells its content from any other: XXH3, 128 bits.

        Raises:
            DataError: cannot be read, or was changed meanwhile.
        """
        digest = xxhash.xxh3_128()
        try:
            with self.path.open("rb") as file:
                while part := file.read(_READ_BYTES):
                    digest.update(part)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from error
        self._check_unchanged()
        return digest.hexdigest()

    def _check_unchanged(self) -> None:
        try:
            unchanged = _state_of(self.path) == self._state
        except OSError:
            unchanged = False
        if not unchanged:
            raise DataError(f"{self.path}: was changed while it was read; run this again when it is whole")


class RowFile:
    """A file whose rows a schema can take.

    Raises:
        DataError: not there, not Parquet, without rows, or with columns that do not fit.
    """

    def __init__(self, path: Path, schema: RowSchema) -> None:
        self.file, self.schema = ParquetFile(path), schema
        if self.file.rows == 0:
            raise DataError(f"{path}: has no rows; a table needs at least one")
        try:
            check_columns(schema, self.file.schema)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.file.rows

    def check(self) -> None:
        """Whether every row can be packed and has an id of its own; takes 8 bytes of memory for each row.

        Raises:
            DataError: an id is missing or comes twice, or an embedding is of another length.
        """
        key = self.schema.key
        names = [column.name for column in self.schema.columns if column.kind is ColumnKind.EMBEDDING]
        hashes = np.empty(self.rows, np.uint64)
        for start, frame in self.file.slices([key, *names], 0, self._chunk_rows):
            ids = frame[key].cast(pl.String)
            if ids.null_count():
                row = start + (ids.is_null().arg_max() or 0)
                raise DataError(
                    f"{self.file.path}: row {row} (the first is 0) has no id in column '{key}'; give it one, or "
                    f"leave the row out"
                )
            hashes[start : start + len(ids)] = ids.hash().to_numpy()
            try:
                check_embeddings(self.schema, frame, ids)
            except DataError as error:
                raise DataError(f"{self.file.path}: {error}") from error
        hashes.sort()
        self._check_alike(np.unique(hashes[1:][hashes[1:] == hashes[:-1]]))

    def _check_alike(self, hashes: Array) -> None:
        """Whether different ids only happen to have these hashes."""
        if not len(hashes):
            return
        key = self.schema.key
        text = pl.col(key).cast(pl.String)
        alike = self.file.scan.select(text).filter(text.hash().is_in(hashes.tolist()))
        ids = self.file.collect(alike)[key]
        twice = ids.filter(~ids.is_first_distinct())
        if len(twice):
            raise DataError(
                f"{self.file.path}: id '{twice[0]}' of column '{key}' comes more than once, as do "
                f"{twice.n_unique() - 1:,} others; leave one row for each id"
            )

    def chunks(self, first: int) -> Iterator[pl.DataFrame]:
        """The columns of the schema, part by part, from row `first` on.

        Raises:
            DataError: the file is damaged, or was changed meanwhile.
        """
        names = [self.schema.key, *(column.name for column in self.schema.columns)]
        return (frame for _, frame in self.file.slices(names, first, self._chunk_rows))

    @property
    def _chunk_rows(self) -> int:
        return max(min(CHUNK_ROWS, CHUNK_BYTES // self.schema.row_bytes), 1)


def _state_of(path: Path) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns
