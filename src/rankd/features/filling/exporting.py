"""What a model's artifact knows of items and users, as a table that a store is filled from: raw values under their
names.

In: a Catalogue. Out: a DataFrame that `row_packing.py` packs and `row_decoding.py` decodes to what the artifact has,
to the last bits of float32. It is where a feature job of one's own starts from: the columns to deliver, and what is in
them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from rankd.features.catalogue import Catalogue
from rankd.features.rows.row_schema import ColumnKind, RowColumn, RowSchema
from rankd.features.schema import FIRST_ITEM_ROW, Categorical, FeatureSchema, Numeric
from rankd.types import Float32Array, Int32Array


def item_frame(catalogue: Catalogue, schema: FeatureSchema) -> tuple[RowSchema, pl.DataFrame]:
    """Every item of an artifact: `item_id`, and the schema's item columns by name."""
    table = catalogue.items
    words = {column.name: catalogue.vocabulary("item", column.name) for column in schema.item_categorical}
    numeric, codes = table.numeric[FIRST_ITEM_ROW:], table.categories[FIRST_ITEM_ROW:]
    columns = _columns(schema.item_numeric, numeric, schema.item_categorical, codes, words)
    declared = _declared("items", "item_id", schema.item_numeric, schema.item_categorical)
    return declared, pl.DataFrame({"item_id": catalogue.ids.items, **columns})


def user_frame(catalogue: Catalogue, schema: FeatureSchema) -> tuple[RowSchema, pl.DataFrame]:
    """Every user of an artifact: `user_id`, and the schema's user columns by name."""
    table = catalogue.users
    words = {column.name: catalogue.vocabulary("user", column.name) for column in schema.user_categorical}
    columns = _columns(schema.user_numeric, table.numeric, schema.user_categorical, table.categories, words)
    declared = _declared("users", "user_id", schema.user_numeric, schema.user_categorical)
    return declared, pl.DataFrame({"user_id": catalogue.ids.users, **columns})


def _declared(table: str, key: str, numeric: Sequence[Numeric], categorical: Sequence[Categorical]) -> RowSchema:
    numbers = tuple(RowColumn(column.name, ColumnKind.NUMERIC) for column in numeric)
    return RowSchema(table, key, numbers + tuple(RowColumn(c.name, _kind(c), c.width) for c in categorical))


def _kind(column: Categorical) -> ColumnKind:
    if column.words:
        return ColumnKind.WORDS
    return ColumnKind.CATEGORICAL if column.width == 1 else ColumnKind.MULTI


def _columns(
    numeric: Sequence[Numeric],
    numbers: Float32Array,
    categorical: Sequence[Categorical],
    codes: Int32Array,
    vocabularies: dict[str, tuple[str, ...]],
) -> dict[str, pl.Series]:
    columns = {column.name: pl.Series(_raw(column, numbers[:, place])) for place, column in enumerate(numeric)}
    start = 0
    for one in categorical:
        known = vocabularies[one.name]
        rows = codes[:, start : start + one.width].tolist()
        values = [[known[code - one.offset] for code in row if code] for row in rows]
        columns[one.name] = _texts(_kind(one), values)
        start += one.width
    return columns


def _texts(kind: ColumnKind, values: list[list[str]]) -> pl.Series:
    if kind is ColumnKind.MULTI:
        return pl.Series(values, dtype=pl.List(pl.String))
    if kind is ColumnKind.WORDS:
        return pl.Series([" ".join(row) for row in values], dtype=pl.String)
    return pl.Series([row[0] if row else None for row in values], dtype=pl.String)


def _raw(column: Numeric, seen: Float32Array) -> Float32Array:
    """The inverse of `tables.normalise`; a missing value is the mean, as the model sees it."""
    values = seen.astype(np.float64) * column.std + column.mean
    raw: Float32Array = (np.expm1(values) if column.log1p else values).astype(np.float32)
    return raw
