"""Packed rows, read back word by word as `row_schema.py` draws them."""

from __future__ import annotations

import math
import struct
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd.errors import ConfigError, DataError
from rankd.features.rows.row_packing import (
    check_schema,
    guess_schema,
    pack_rows,
    schema_from_toml,
    schema_toml,
)
from rankd.features.rows.row_schema import ColumnKind, RowColumn, RowSchema
from rankd.features.stores.store_keys import hash_id
from rankd.features.tables import split_words

WIDTH = 3
NOW = 1_700_000_000
SCHEMA = RowSchema(
    "items",
    "item_id",
    (
        RowColumn("price", ColumnKind.NUMERIC),
        RowColumn("brand", ColumnKind.CATEGORICAL),
        RowColumn("tags", ColumnKind.MULTI, WIDTH),
        RowColumn("title", ColumnKind.WORDS, WIDTH),
        RowColumn("vector", ColumnKind.EMBEDDING, WIDTH),
    ),
    version=7,
)
TYPES: dict[str, Any] = {
    "item_id": pl.String,
    "price": pl.Float64,
    "brand": pl.String,
    "tags": pl.List(pl.String),
    "title": pl.String,
    "vector": pl.List(pl.Float32),
}
singles = st.floats(width=32, allow_nan=False)
texts = st.text(max_size=4) | st.sampled_from(["a", "b", "c"])
row_values = st.fixed_dictionaries(
    {
        "price": st.none() | st.floats(width=32),
        "brand": st.none() | texts,
        "tags": st.none() | st.lists(st.none() | texts, max_size=6),
        "title": st.none() | st.text(max_size=12) | st.sampled_from(["Red red wine, RED", "a b", "one two three four"]),
        "vector": st.none() | st.lists(singles, min_size=WIDTH, max_size=WIDTH),
    }
)


def unpacked(row: bytes) -> dict[str, Any]:
    """A row of SCHEMA by hand: missing numbers are NaN, hashes come with their padding."""
    values = struct.unpack("<IIf" + "Q" + "QQQ" + "QQQ" + "fff", row)
    return {
        "mark": values[0],
        "written": values[1],
        "price": values[2],
        "brand": values[3],
        "tags": values[4:7],
        "title": values[7:10],
        "vector": values[10:13],
    }


def hashes(parts: list[str]) -> tuple[int, ...]:
    """What a multi-valued column has to hold."""
    kept = [hash_id(part) for part in dict.fromkeys(parts)][:WIDTH]
    return tuple(kept + [0] * (WIDTH - len(kept)))


def same(found: float, expected: float | None) -> bool:
    return math.isnan(found) if expected is None or math.isnan(expected) else found == expected


@settings(deadline=None)
@given(st.lists(row_values, max_size=8))
def test_every_kind_of_column_is_packed_as_drawn(rows: list[dict[str, Any]]) -> None:
    columns = {name: [row[name] for row in rows] for name in TYPES if name != "item_id"}
    ids = [f"i{n}" for n in range(len(rows))]
    frame = pl.DataFrame({"item_id": ids, **columns}, TYPES).with_columns(extra=1)
    packed = pack_rows(SCHEMA, frame, NOW)
    assert packed.words.shape == (len(rows), SCHEMA.row_words)
    assert packed.ids == tuple(ids)
    for row, words in zip(rows, packed.words, strict=True):
        found = unpacked(words.tobytes())
        assert (found["mark"], found["written"]) == (SCHEMA.mark, NOW)
        assert same(found["price"], row["price"])
        assert found["brand"] == (0 if row["brand"] is None else hash_id(row["brand"]))
        assert found["tags"] == hashes([tag for tag in row["tags"] or [] if tag is not None])
        assert found["title"] == hashes(split_words(row["title"] or ""))
        assert all(map(same, found["vector"], row["vector"] or [None] * WIDTH))


def packed_value(kind: ColumnKind, values: pl.Series, width: int = 1) -> list[tuple[Any, ...]]:
    """The words of a single column behind the header."""
    schema = RowSchema("items", "id", (RowColumn("c", kind, width),))
    frame = pl.DataFrame({"id": [str(n) for n in range(len(values))], "c": values})
    form = {ColumnKind.NUMERIC: "f", ColumnKind.EMBEDDING: "f" * width}.get(kind, "Q" * width)
    return [struct.unpack("<" + form, words[2:].tobytes()) for words in pack_rows(schema, frame, NOW).words]


def test_other_types_of_the_same_kind() -> None:
    brand = [(hash_id("x"),), (0,), (hash_id("y"),)]
    for kind in (pl.Categorical(), pl.Enum(["y", "x"])):
        assert packed_value(ColumnKind.CATEGORICAL, pl.Series(["x", None, "y"], dtype=kind)) == brand
    assert packed_value(ColumnKind.CATEGORICAL, pl.Series([5, None])) == [(hash_id("5"),), (0,)]
    assert packed_value(ColumnKind.NUMERIC, pl.Series([True, False])) == [(1.0,), (0.0,)]
    assert packed_value(ColumnKind.NUMERIC, pl.Series([1e300])) == [(math.inf,)]
    tags = pl.Series([[1, 2], [1]], dtype=pl.List(pl.Int64))
    assert packed_value(ColumnKind.MULTI, tags, 2) == [(hash_id("1"), hash_id("2")), (hash_id("1"), 0)]
    fixed = pl.Series([["a", "a"], ["b", "c"]], dtype=pl.Array(pl.String, 2))
    assert packed_value(ColumnKind.MULTI, fixed, 2) == [(hash_id("a"), 0), (hash_id("b"), hash_id("c"))]
    vectors = pl.Series([[1.0, 2.0], [3.0, 4.0]], dtype=pl.Array(pl.Float64, 2))
    assert packed_value(ColumnKind.EMBEDDING, vectors, 2) == [(1.0, 2.0), (3.0, 4.0)]
    nothing = pl.Series([None, None])
    assert packed_value(ColumnKind.CATEGORICAL, nothing) == packed_value(ColumnKind.WORDS, nothing) == [(0,), (0,)]
    assert packed_value(ColumnKind.MULTI, nothing, 2) == [(0, 0), (0, 0)]
    assert all(math.isnan(one) for row in packed_value(ColumnKind.EMBEDDING, nothing, 2) for one in row)


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (ColumnKind.NUMERIC, pl.Series(["1"]), "column 'c' is String, and kind \"numeric\" takes numbers or booleans"),
        (ColumnKind.CATEGORICAL, pl.Series([1.5]), "is Float64"),
        (ColumnKind.MULTI, pl.Series(["a b"]), "takes lists of texts"),
        (ColumnKind.MULTI, pl.Series([[1.0]]), "takes lists of texts"),
        (ColumnKind.WORDS, pl.Series([1]), "takes texts"),
        (ColumnKind.EMBEDDING, pl.Series([1.0]), "takes lists of `width` numbers"),
        (ColumnKind.EMBEDDING, pl.Series([[[1.0]]]), "takes lists of `width` numbers"),
        (ColumnKind.NUMERIC, pl.Series([date(2026, 1, 1)]), "is Date"),
    ],
)
def test_a_column_of_the_wrong_type_is_refused(kind: ColumnKind, values: pl.Series, words: str) -> None:
    with pytest.raises(DataError, match=words):
        packed_value(kind, values)


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        ([[1.0, 2.0], [1.0]], r"'c' of row '1' has 1 numbers in 1 places; the schema says exactly 2"),
        ([None, [1.0, 2.0, 3.0]], r"row '1' has 3 numbers"),
        ([[None, 1.0]], r"row '0' has 1 numbers in 2 places"),
        ([[]], r"row '0' has 0 numbers"),
    ],
)
def test_an_embedding_has_exactly_its_width(vectors: list[Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        packed_value(ColumnKind.EMBEDDING, pl.Series(vectors, dtype=pl.List(pl.Float32)), 2)


def test_ids_are_there_and_come_once() -> None:
    schema = RowSchema("items", "item_id", (RowColumn("price", ColumnKind.NUMERIC),))
    prices = [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(DataError, match="id 'b' of column 'item_id' comes more than once"):
        pack_rows(schema, pl.DataFrame({"item_id": ["a", "b", "b", "a"], "price": prices}), NOW)
    with pytest.raises(DataError, match="row 1 has no id"):
        pack_rows(schema, pl.DataFrame({"item_id": ["a", None, "b", "c"], "price": prices}), NOW)
    with pytest.raises(DataError, match=r"column 'price' of the schema is missing.*Did you mean 'prices'"):
        pack_rows(schema, pl.DataFrame({"item_id": ["a"], "prices": [1.0]}), NOW)
    with pytest.raises(DataError, match="the ids, column 'item_id', are Float64"):
        pack_rows(schema, pl.DataFrame({"item_id": [1.0], "price": [1.0]}), NOW)
    assert pack_rows(schema, pl.DataFrame({"item_id": [3, 4], "price": [1, 2]}), NOW).ids == ("3", "4")


def test_a_schema_as_toml_and_back(tmp_path: Path) -> None:
    strange = RowColumn('quo"te\\ \u00e9 \x7f\n', ColumnKind.NUMERIC)
    schema = msgspec.structs.replace(SCHEMA, columns=(*SCHEMA.columns, strange))
    path = tmp_path / "items.toml"
    path.write_text(schema_toml(schema), newline="")
    assert schema_from_toml(path) == schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (RowSchema("films", "id", SCHEMA.columns), "table is 'films'; it is one of items, users"),
        (RowSchema("items", "id", ()), "at least one column"),
        (RowSchema("items", "", SCHEMA.columns), "a schema needs a key"),
        (RowSchema("items", "id", SCHEMA.columns + SCHEMA.columns[1:2]), "'brand' is declared more than once"),
        (RowSchema("items", "id", (RowColumn("x", ColumnKind.NUMERIC, 2),)), "'x' has width 2 and is numeric"),
        (
            RowSchema("items", "id", tuple(RowColumn(f"e{n}", ColumnKind.EMBEDDING, 4096) for n in range(4))),
            "a row has 65,544 bytes, at most 65,536",
        ),
    ],
)
def test_a_schema_of_which_no_row_can_be_made(schema: RowSchema, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_schema(schema, "items.toml")


def test_a_schema_file_with_a_typing_mistake(tmp_path: Path) -> None:
    path = tmp_path / "items.toml"
    path.write_text('table = "items"\nkey = "id"\n[[columns]]\nname = "x"\nkind = "numeric"\nwith = 2\n')
    with pytest.raises(ConfigError, match=r"unknown key 'columns\[0\].with'.*Did you mean 'width'"):
        schema_from_toml(path)


def test_a_schema_is_guessed_from_the_types() -> None:
    frame = pl.DataFrame(
        {
            "user_id": [1, 2],
            "age": [3, None],
            "paying": [True, False],
            "country": ["a", None],
            "level": pl.Series(["x", "y"], dtype=pl.Categorical),
            "tags": [["a"], ["b", "c", "d"]],
            "many": [["a"] * 40, None],
            "vector": [[0.5] * 8, [1.5] * 8],
            "fixed": pl.Series([[1.0, 2.0]] * 2, dtype=pl.Array(pl.Float32, 2)),
            "ragged": [[0.5], [1.0, 2.0]],
            "numbers": [[1], [2]],
            "born": [date(2000, 1, 1)] * 2,
        }
    )
    expected = (
        RowColumn("age", ColumnKind.NUMERIC),
        RowColumn("paying", ColumnKind.NUMERIC),
        RowColumn("country", ColumnKind.CATEGORICAL),
        RowColumn("level", ColumnKind.CATEGORICAL),
        RowColumn("tags", ColumnKind.MULTI, 3),
        RowColumn("many", ColumnKind.MULTI, 32),
        RowColumn("vector", ColumnKind.EMBEDDING, 8),
        RowColumn("fixed", ColumnKind.EMBEDDING, 2),
    )
    assert guess_schema(frame, "users", "user_id") == RowSchema("users", "user_id", expected)
    assert guess_schema(frame.lazy(), "users", "user_id").columns == expected
    assert len(pack_rows(guess_schema(frame, "users", "user_id"), frame, NOW).ids) == 2
    with pytest.raises(DataError, match="column 'item_id', which holds the ids, is missing"):
        guess_schema(frame, "items", "item_id")
    with pytest.raises(ConfigError, match="at least one column"):
        guess_schema(frame.select("user_id", "born"), "users", "user_id")
