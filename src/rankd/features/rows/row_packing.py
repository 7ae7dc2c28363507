"""Packing a table's columns into rows of 32-bit words, all rows of a column at once.

In: a frame read from Parquet and a `RowSchema` (declared in a TOML file, or guessed from the frame). Out: ids and words
as `row_schema.py` draws them. `loading.py` writes them to a store.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from rankd.config import read_struct
from rankd.errors import ConfigError, DataError, nearest
from rankd.features.rows.row_schema import HEADER_WORDS, ColumnKind, RowColumn, RowSchema
from rankd.features.stores.store_keys import hash_id
from rankd.features.tables import split_words
from rankd.types import Array

TABLES = ("items", "users")
MAX_ROW_BYTES = 64 << 10
MAX_WIDTH = 4096  # of `RowColumn.width`
MAX_GUESSED_WIDTH = 32
_WORD = np.dtype("<u4")
_WIDE = {ColumnKind.MULTI, ColumnKind.WORDS, ColumnKind.EMBEDDING}
_TAKEN = {
    ColumnKind.NUMERIC: "numbers or booleans",
    ColumnKind.CATEGORICAL: "texts, categories, whole numbers or booleans",
    ColumnKind.MULTI: "lists of texts or of whole numbers",
    ColumnKind.WORDS: "texts",
    ColumnKind.EMBEDDING: "lists of `width` numbers",
}


@dataclass(frozen=True, slots=True)
class PackedRows:
    """n rows: their ids, and `words` (n, row_words) uint32, C-contiguous and little-endian."""

    ids: tuple[str, ...]
    words: Array


def pack_rows(schema: RowSchema, frame: pl.DataFrame, now: int) -> PackedRows:
    """The rows of a frame, written at `now` (seconds since 1970); columns that are not in the schema are passed over.

    Missing values become NaN (numeric, and each number of an embedding) or 0 (the others); of a multi-valued column the
    first `width` different values stay, in their order.

    Raises:
        DataError: a column that is missing or of the wrong type, an id that is missing or comes twice, or an embedding
            that has not exactly `width` numbers.
    """
    check_columns(schema, frame.schema)
    ids = ids_of(schema.key, frame)
    words = np.zeros((len(ids), schema.row_words), _WORD)
    words[:, 0], words[:, 1] = schema.mark, now
    start = HEADER_WORDS
    for column in schema.columns:
        words[:, start : start + column.words] = _packed(column, frame[column.name], ids)
        start += column.words
    return PackedRows(tuple(ids), words)


def check_columns(schema: RowSchema, found: pl.Schema) -> None:
    """Whether a file with these columns can be packed.

    Raises:
        DataError: a column is missing or of a type that its kind does not take.
    """
    for name in (schema.key, *(column.name for column in schema.columns)):
        if name not in found:
            raise DataError(
                f"column '{name}' of the schema is missing; there are {', '.join(found)}.{nearest(name, found)} "
                f"Rename it, or take it out of the schema and raise its version"
            )
    if not _reads_as_text(found[schema.key]):
        raise DataError(
            f"the ids, column '{schema.key}', are {found[schema.key]}; they have to be texts or whole numbers"
        )
    for column in schema.columns:
        if not _takes(column.kind, found[column.name]):
            raise DataError(
                f"column '{column.name}' is {found[column.name]}, and kind \"{column.kind.value}\" takes "
                f"{_TAKEN[column.kind]}; convert it, or declare another kind and raise the schema's version"
            )


def ids_of(key: str, frame: pl.DataFrame) -> list[str]:
    """The ids of a frame's rows as texts.

    Raises:
        DataError: one is missing, or comes twice.
    """
    ids = frame[key].cast(pl.String)
    if ids.null_count():
        raise DataError(f"row {ids.is_null().arg_max()} has no id in column '{key}'; give it one, or leave the row out")
    if ids.n_unique() < len(ids):
        twice = ids.filter(~ids.is_first_distinct())[0]
        raise DataError(f"id '{twice}' of column '{key}' comes more than once; leave one row for each id")
    return ids.to_list()


def check_embeddings(schema: RowSchema, frame: pl.DataFrame, ids: Sequence[str] | pl.Series) -> None:
    """Whether the embeddings among a frame's columns have as many numbers as they should.

    Raises:
        DataError: one has not.
    """
    for column in schema.columns:
        if column.kind is ColumnKind.EMBEDDING:
            _checked_lists(column, frame[column.name], ids)


def schema_from_toml(path: Path) -> RowSchema:
    """A schema as declared in a TOML file (see `row_schema.py`).

    Raises:
        ConfigError: unreadable, an unknown key, or a declaration that no row can have.
    """
    schema = read_struct(RowSchema, path)
    check_schema(schema, str(path))
    return schema


def check_schema(schema: RowSchema, source: str) -> None:
    """Whether rows can be made of a schema.

    Raises:
        ConfigError: an unknown table, no columns, a column twice, a width that means nothing, or too long a row.
    """
    if schema.table not in TABLES:
        raise ConfigError(f"{source}: table is '{schema.table}'; it is one of {', '.join(TABLES)}")
    names = [column.name for column in schema.columns]
    if not names or not all(names) or not schema.key:
        raise ConfigError(f"{source}: a schema needs a key, at least one column, and a name for each")
    for column in schema.columns:
        if names.count(column.name) > 1:
            raise ConfigError(f"{source}: column '{column.name}' is declared more than once; leave one of them")
        if column.width != 1 and column.kind not in _WIDE:
            wide = ", ".join(sorted(kind.value for kind in _WIDE))
            raise ConfigError(
                f"{source}: column '{column.name}' has width {column.width} and is {column.kind.value}; only {wide} "
                f"have a width"
            )
    if schema.row_bytes > MAX_ROW_BYTES:
        raise ConfigError(
            f"{source}: a row has {schema.row_bytes:,} bytes, at most {MAX_ROW_BYTES:,} are allowed; "
            f"declare fewer columns or smaller widths"
        )


def guess_schema(frame: pl.DataFrame | pl.LazyFrame, table: str, key: str) -> RowSchema:
    """A schema for whoever has not declared one: each column by its type; what has no kind is left out.

    Numbers and booleans are numeric, texts categorical, lists of texts multi (as wide as the longest, at most
    MAX_GUESSED_WIDTH), lists of fractional numbers an embedding if all are of one length.

    Raises:
        DataError: no key column, or the frame cannot be read.
        ConfigError: no column of a known type, or rows that are too long.
    """
    found = frame.collect_schema()
    if key not in found:
        raise DataError(f"column '{key}', which holds the ids, is missing; there are {', '.join(found)}")
    lists = [name for name, kind in found.items() if isinstance(kind, pl.List)]
    lengths = {}
    if lists:
        length = pl.col(lists).list.len()
        try:
            sizes = frame.lazy().select(length.min().name.prefix("min "), length.max().name.prefix("max ")).collect()
        except pl.exceptions.PolarsError as error:
            raise DataError(f"the lists of the columns {', '.join(lists)} cannot be read: {error}") from error
        lengths = {name: (sizes["min " + name].item() or 0, sizes["max " + name].item() or 0) for name in lists}
    guesses = [_guessed(name, kind, lengths.get(name, (0, 0))) for name, kind in found.items() if name != key]
    schema = RowSchema(table, key, tuple(guess for guess in guesses if guess is not None))
    check_schema(schema, f"the schema guessed from the columns {', '.join(found)}")
    return schema


def schema_toml(schema: RowSchema) -> str:
    """A schema as the TOML that `schema_from_toml` reads."""
    lines = [f"table = {_quoted(schema.table)}", f"version = {schema.version}", f"key = {_quoted(schema.key)}"]
    for column in schema.columns:
        lines += ["[[columns]]", f"name = {_quoted(column.name)}", f"kind = {_quoted(column.kind.value)}"]
        if column.kind in _WIDE:
            lines.append(f"width = {column.width}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A TOML text; JSON's differs from it in the character 0x7f alone."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _guessed(name: str, kind: pl.DataType, lengths: tuple[int, int]) -> RowColumn | None:
    if kind.is_numeric() or kind == pl.Boolean:
        return RowColumn(name, ColumnKind.NUMERIC)
    if _reads_as_text(kind):
        return RowColumn(name, ColumnKind.CATEGORICAL)
    inner = _inner(kind)
    if isinstance(kind, pl.Array):
        lengths = (kind.shape[0], kind.shape[0])
    shortest, longest = lengths
    if inner is None or (inner.is_numeric() and not inner.is_float()):
        return None
    if inner.is_float():
        fixed = shortest == longest and 1 <= longest <= MAX_WIDTH
        return RowColumn(name, ColumnKind.EMBEDDING, longest) if fixed else None
    return RowColumn(name, ColumnKind.MULTI, min(max(longest, 1), MAX_GUESSED_WIDTH)) if _reads_as_text(inner) else None


def _inner(kind: pl.DataType) -> pl.DataType | None:
    """What a list holds; None for what is no list, or a list of lists."""
    if isinstance(kind, pl.List) or (isinstance(kind, pl.Array) and len(kind.shape) == 1):
        inner = kind.inner
        return inner if isinstance(inner, pl.DataType) else inner()
    return None


def _reads_as_text(kind: pl.DataType) -> bool:
    return kind == pl.String or isinstance(kind, (pl.Categorical, pl.Enum)) or kind.is_integer()


def _takes(kind: ColumnKind, found: pl.DataType) -> bool:
    """Whether a column of a polars type can be packed as a kind; one without any value is of type Null."""
    inner = _inner(found)
    if found == pl.Null:
        return True
    match kind:
        case ColumnKind.NUMERIC:
            return found.is_numeric() or found == pl.Boolean
        case ColumnKind.CATEGORICAL:
            return _reads_as_text(found) or found == pl.Boolean
        case ColumnKind.WORDS:
            return found == pl.String or isinstance(found, (pl.Categorical, pl.Enum))
        case ColumnKind.MULTI:
            return inner is not None and (_reads_as_text(inner) or inner == pl.Null)
        case ColumnKind.EMBEDDING:
            return inner is not None and (inner.is_numeric() or inner == pl.Null)


def _packed(column: RowColumn, values: pl.Series, ids: Sequence[str] | pl.Series) -> Array:
    """(n, words) of a column."""
    match column.kind:
        case ColumnKind.NUMERIC:
            numbers = values.cast(pl.Float32).fill_null(float("nan")).to_numpy().astype("<f4")
            return numbers.view(_WORD)[:, None]
        case ColumnKind.CATEGORICAL:
            return _words_of(_hashes(values.cast(pl.String))[:, None])
        case ColumnKind.MULTI:
            return _words_of(_multi(values.cast(pl.List(pl.String)), column.width))
        case ColumnKind.WORDS:
            distinct, places = _distinct(values.cast(pl.String))
            split = pl.Series([split_words(text) for text in distinct], dtype=pl.List(pl.String))
            return _words_of(_with_nothing(_multi(split, column.width))[places])
        case ColumnKind.EMBEDDING:
            return _embedding(column, values, ids).view(_WORD)


def _distinct(texts: pl.Series) -> tuple[list[str], Array]:
    """The different texts, and (n,) int64: which of them each one is, -1 where it is missing."""
    distinct = texts.drop_nulls().unique()
    places = texts.replace_strict(distinct, np.arange(len(distinct)), default=None, return_dtype=pl.Int64)
    return distinct.to_list(), places.fill_null(-1).to_numpy()


def _hashes(texts: pl.Series) -> Array:
    """(n,) uint64: the `hash_id` of each text, 0 where it is missing. Each text is hashed once."""
    distinct, places = _distinct(texts)
    return _with_nothing(np.fromiter(map(hash_id, distinct), "<u8", len(distinct)))[places]


def _with_nothing(table: Array) -> Array:
    """A table with a last row of 0, which is where place -1 points."""
    return np.concatenate([table, np.zeros((1, *table.shape[1:]), table.dtype)])


def _multi(lists: pl.Series, width: int) -> Array:
    """(n, width) uint64: the hashes of the first different texts of each list, 0-padded."""
    kept = lists.list.drop_nulls().list.unique(maintain_order=True).list.head(width)
    lengths = kept.list.len().fill_null(0).to_numpy().astype(np.int64)
    table = np.zeros((len(lists), width), "<u8")
    starts = np.cumsum(lengths) - lengths
    rows = np.repeat(np.arange(len(lists)), lengths)
    table[rows, np.arange(len(rows)) - starts[rows]] = _hashes(kept.explode().drop_nulls())
    return table


def _words_of(hashes: Array) -> Array:
    """(n, w) uint64 as (n, 2 w) words, the lower one first."""
    return np.ascontiguousarray(hashes, "<u8").view(_WORD)


def _embedding(column: RowColumn, values: pl.Series, ids: Sequence[str] | pl.Series) -> Array:
    """(n, width) float32; NaN in all places of a row that has no list."""
    lists = _checked_lists(column, values, ids)
    table = np.full((len(lists), column.width), np.nan, "<f4")
    there = lists.is_not_null().to_numpy()
    table[there] = lists.explode().drop_nulls().to_numpy().reshape(-1, column.width)
    return table


def _checked_lists(column: RowColumn, values: pl.Series, ids: Sequence[str] | pl.Series) -> pl.Series:
    """The lists of an embedding; each has `width` numbers, or is missing."""
    lists = values.arr.to_list() if isinstance(values.dtype, pl.Array) else values
    lists = lists.cast(pl.List(pl.Float32))
    entries, numbers = lists.list.len(), lists.list.drop_nulls().list.len()
    wrong = ((entries != column.width) | (numbers != column.width)).fill_null(value=False)
    if wrong.any():
        place = wrong.arg_max() or 0
        raise DataError(
            f"the embedding '{column.name}' of row '{ids[place]}' has {numbers[place]} numbers in {entries[place]} "
            f"places; the schema says exactly {column.width}. Correct it, or leave it empty where there is none"
        )
    return lists
