"""From packed rows to a model's columns: what a model takes from a row by name, worked out once.

In: the schema of the rows (`row_schema.py`), the columns and vocabularies of a model. Out: a `Decoding`, with which
`decoding_kernels.py` writes rows into the model's arrays as `tables.normalise` and `tables.encode_values` would: here
rows that were just fetched, in `cache/row_cache.py` those that lie in the cache.

Worked example, a model with the numeric columns price, text.0, text.1 and age over rows of price (numeric, word 2) and
text (embedding of 2, words 3 and 4): one run, from word 2, into column 0, of length 3. Age stays as the caller has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from rankd.errors import ConfigError
from rankd.features.rows.hash_index import HashIndex
from rankd.features.rows.row_schema import ColumnKind, RowColumn, RowSchema
from rankd.features.schema import Categorical, Numeric
from rankd.features.stores.store_keys import hash_id
from rankd.types import Array, Float32Array, Int32Array, Int64Array


class RowStatus(IntEnum):
    """What became of the row of a key; fits uint8. The kernels count on this order."""

    MISSING = 0  # not here
    FRESH = 1
    STALE = 2  # here, but its time is over
    ABSENT = 3  # the store has no such row
    ABSENT_STALE = 4  # it had none when it was asked, and that time is over
    SKIPPED = 5  # key 0: nothing was asked
    WRONG_SCHEMA = 6  # here, written under another schema: not decoded


class Decoding(NamedTuple):
    """What the kernels read. A run is a stretch of numeric columns that lie side by side in the row and in the model.

    mark: the row schema's; rows that begin otherwise are not decoded
    runs: (r, 4) int64: first word, first column, length, 1 if log1p comes first
    scales: (2, F) float32: mean and std by numeric column of the model
    lists: (q, 6) int64: first word, values in the row, first column, width, first slot of its table and slots - 1
    table: (slots, 2) uint64, the hash tables of all vocabularies end to end
    """

    mark: int
    runs: Int64Array
    scales: Float32Array
    lists: Int64Array
    table: Array


class RowDecoder:
    """What one model takes from the rows of one schema. Any thread may use it.

    `vocabularies` holds the known values of each categorical column by its name. `numeric_columns` and
    `category_columns` are the columns that a row overwrites; the others, which the row schema lacks, it leaves.

    Raises:
        ConfigError: a column of the model is of another kind in the rows.
    """

    def __init__(
        self,
        row_schema: RowSchema,
        numeric: Sequence[Numeric],
        categorical: Sequence[Categorical],
        vocabularies: Mapping[str, Sequence[str]],
    ) -> None:
        # Imported here: it brings numba, which takes half a second.
        from rankd.features.rows.decoding_kernels import write_rows

        self._write_rows = write_rows
        self.row_words = row_schema.row_words
        self.num_numeric, self.num_categories = len(numeric), sum(column.width for column in categorical)
        words = _number_words(row_schema, numeric)
        lists, table, taken = _lists(row_schema, categorical, vocabularies)
        self.numeric_columns: tuple[int, ...] = tuple(words)
        self.category_columns: tuple[int, ...] = tuple(taken)
        scales = np.asarray([[column.mean for column in numeric], [column.std for column in numeric]], np.float32)
        self.decoding = Decoding(row_schema.mark, _runs(words, numeric), scales.reshape(2, len(numeric)), lists, table)

    def decode(self, rows: Array, numeric: Float32Array, categories: Int32Array, at: Int64Array) -> Array:
        """Write row i of rows (m, words) uint32 into line at[i] of numeric (n, >= F) and categories (n, >= G).

        Returns decoded (m,) bool: False for a row of another schema, whose line is left as it is.

        Raises:
            ValueError: arrays whose shapes do not fit each other or this decoder.
            IndexError: a line that there is not.
        """
        self.check(numeric, categories)
        if rows.shape != (at.shape[0], self.row_words):
            raise ValueError(f"rows are {rows.shape}, expected {(at.shape[0], self.row_words)} for {at.shape[0]} lines")
        decoded = np.empty(at.shape[0], np.bool_)
        wrong = self._write_rows(rows, self.decoding, numeric, categories, at, decoded)
        if wrong >= 0:
            raise IndexError(f"row {wrong} is for line {at[wrong]} of {numeric.shape[0]}")
        return decoded

    def check(self, numeric: Float32Array, categories: Int32Array) -> None:
        """Whether arrays (n, F or more) and (n, G or more) take what is decoded.

        Raises:
            ValueError: they do not.
        """
        (lines, columns), (others, codes) = numeric.shape, categories.shape
        if lines != others or columns < self.num_numeric or codes < self.num_categories:
            raise ValueError(
                f"numeric is {numeric.shape} and categories {categories.shape}; expected as many lines, and at least "
                f"{self.num_numeric} and {self.num_categories} columns"
            )


def _number_words(schema: RowSchema, numeric: Sequence[Numeric]) -> dict[int, int]:
    """The numeric columns that rows have, in their order, and the word of a row that each of them comes from."""
    word_of: dict[str, int] = {}
    for column in schema.columns:
        found = schema.place_of(column.name)
        if found is not None and column.kind is ColumnKind.EMBEDDING:
            word_of |= {f"{column.name}.{number}": found[1] + number for number in range(column.width)}
    words: dict[int, int] = {}
    for number, wanted in enumerate(numeric):
        found = schema.place_of(wanted.name)
        if found is not None and found[0].kind is not ColumnKind.NUMERIC:
            raise _wrong_kind(schema, found[0], f"takes '{wanted.name}' as a number")
        if found is not None:
            words[number] = found[1]
        elif wanted.name in word_of:
            words[number] = word_of[wanted.name]
    return words


def _runs(words: Mapping[int, int], numeric: Sequence[Numeric]) -> Int64Array:
    """Runs of the columns that are in the rows, given the word of each."""
    runs: list[list[int]] = []
    for column, word in words.items():
        of_log = int(numeric[column].log1p)
        if runs and runs[-1][3] == of_log and runs[-1][0] + runs[-1][2] == word and runs[-1][1] + runs[-1][2] == column:
            runs[-1][2] += 1
        else:
            runs.append([word, column, 1, of_log])
    return np.asarray(runs, np.int64).reshape(-1, 4)


def _lists(
    schema: RowSchema, categorical: Sequence[Categorical], vocabularies: Mapping[str, Sequence[str]]
) -> tuple[Int64Array, Array, list[int]]:
    """`Decoding.lists` and `Decoding.table`, and the columns that they write."""
    lists: list[tuple[int, ...]] = []
    tables: list[Array] = [np.zeros((0, 2), np.uint64)]
    taken: list[int] = []
    start = slots = 0
    for column in categorical:
        found = schema.place_of(column.name)
        if found is not None:
            source, word = found
            kinds = (ColumnKind.WORDS,) if column.words else (ColumnKind.CATEGORICAL, ColumnKind.MULTI)
            if source.kind not in kinds:
                wanted = "the words of a text" if column.words else "one text or several"
                raise _wrong_kind(schema, source, f"takes '{column.name}' as {wanted}")
            codes = {hash_id(value): column.offset + code for code, value in enumerate(vocabularies[column.name])}
            index = HashIndex(
                np.fromiter(codes, np.uint64, len(codes)), np.fromiter(codes.values(), np.int32, len(codes))
            )
            values, size = source.words // 2, index.table.shape[0]
            lists.append((word, values, start, column.width, slots, size - 1))
            tables.append(index.table)
            taken += range(start, start + column.width)
            slots += size
        start += column.width
    return np.asarray(lists, np.int64).reshape(-1, 6), np.concatenate(tables), taken


def _wrong_kind(schema: RowSchema, column: RowColumn, use: str) -> ConfigError:
    return ConfigError(
        f"the model {use}, and table '{schema.table}' has '{column.name}' as {column.kind.value}; build the model from "
        f"such a column, or declare another kind in the table's schema and load it again"
    )
