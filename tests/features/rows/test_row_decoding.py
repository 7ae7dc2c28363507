"""Decoding packed rows against what `tables.normalise` and `tables.encode_values` give for the same raw values."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rankd.features.rows.decoding_kernels  # noqa: F401 - compiles now, before deadlines count
from rankd.errors import ConfigError
from rankd.features.rows.row_decoding import RowDecoder
from rankd.features.rows.row_schema import ColumnKind, RowColumn, RowSchema
from rankd.features.schema import Categorical, Numeric
from rankd.features.stores.store_keys import hash_id
from rankd.features.tables import encode_values, normalise, split_words
from rankd.types import Array, Float32Array, Int32Array

KNOWN = ("red", "green", "blue", "sci fi", "drama", "action", "xx")
WORDS = (*KNOWN, "unheard", "never", "strange one")
FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)
DEFAULT_NUMBER, DEFAULT_CODE = np.float32(-7.5), 99


def pack(schema: RowSchema, raw: dict[str, Any]) -> bytes:
    """A row, from the words of `row_schema.py`."""
    parts = [struct.pack("<II", schema.mark, 1_700_000_000)]
    for column in schema.columns:
        value = raw[column.name]
        if column.kind is ColumnKind.NUMERIC:
            parts.append(struct.pack("<f", value))
        elif column.kind is ColumnKind.EMBEDDING:
            parts.append(struct.pack(f"<{column.width}f", *value))
        else:
            width = 1 if column.kind is ColumnKind.CATEGORICAL else column.width
            hashes = [hash_id(text) for text in value][:width]
            parts.append(struct.pack(f"<{width}Q", *hashes, *[0] * (width - len(hashes))))
    return b"".join(parts)


def as_rows(values: list[bytes], words: int) -> Array:
    """Rows (m, words) over bytes that cannot be written to, as they come from a store."""
    return np.frombuffer(b"".join(values), np.uint32).reshape(len(values), words)


@dataclass
class Case:
    """A row schema, raw rows, and a model that takes some of their columns and some that they do not have."""

    schema: RowSchema
    raws: list[dict[str, Any]]
    numeric: tuple[Numeric, ...]
    categorical: tuple[Categorical, ...]

    def decoder(self) -> RowDecoder:
        return RowDecoder(self.schema, self.numeric, self.categorical, dict.fromkeys(WORD_COLUMNS, KNOWN))

    def rows(self) -> Array:
        return as_rows([pack(self.schema, raw) for raw in self.raws], self.schema.row_words)

    def expected(self, lines: int, at: list[int]) -> tuple[Float32Array, Int32Array]:
        """What the plain functions make of the raw values, over the defaults."""
        numeric = np.full((lines, len(self.numeric) + 1), DEFAULT_NUMBER, np.float32)
        categories = np.full((lines, sum(c.width for c in self.categorical) + 1), DEFAULT_CODE, np.int32)
        for line, raw in zip(at, self.raws, strict=True):
            numbers = flat(raw)
            for index, number in enumerate(self.numeric):
                if number.name in numbers:
                    numeric[line, index] = normalise(number, np.asarray([numbers[number.name]], np.float32))[0]
            start = 0
            for column in self.categorical:
                if column.name in raw:
                    # A list of texts is encoded as a text of these words would be.
                    kind = next(c for c in self.schema.columns if c.name == column.name)
                    width = 1 if kind.kind is ColumnKind.CATEGORICAL else kind.width
                    categories[line, start : start + column.width] = encode(column, raw[column.name][:width])
                start += column.width
        return numeric, categories


def flat(raw: dict[str, Any]) -> dict[str, float]:
    """The numbers of a raw row by the names that a model knows them by."""
    numbers: dict[str, float] = {}
    for name, value in raw.items():
        if isinstance(value, float):
            numbers[name] = value
        elif isinstance(value, tuple):
            numbers |= {f"{name}.{index}": part for index, part in enumerate(value)}
    return numbers


def encode(column: Categorical, values: list[str]) -> Int32Array:
    if column.words:
        return encode_values(column, KNOWN, [" ".join(values)]).reshape(-1)
    if column.width == 1:
        first = next((value for value in values if value in KNOWN), None)
        return encode_values(column, KNOWN, [first]).reshape(-1)
    known = [code[0] for code in encode_values(Categorical("", column.offset, len(KNOWN)), KNOWN, values) if code[0]]
    codes = list(dict.fromkeys(known))[: column.width]
    return np.asarray(codes + [0] * (column.width - len(codes)), np.int32)


WORD_COLUMNS = ("one", "many", "text")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kinds: list[tuple[str, ColumnKind]] = [
        ("one", ColumnKind.CATEGORICAL),
        ("many", ColumnKind.MULTI),
        ("text", ColumnKind.WORDS),
        ("vector", ColumnKind.EMBEDDING),
        *((f"n{index}", ColumnKind.NUMERIC) for index in range(draw(st.integers(0, 20)))),
    ]
    chosen = draw(st.permutations(kinds))[: draw(st.integers(0, len(kinds)))]
    columns = tuple(
        RowColumn(name, kind, 1 if kind in (ColumnKind.NUMERIC, ColumnKind.CATEGORICAL) else draw(st.integers(1, 20)))
        for name, kind in chosen
    )
    schema = RowSchema("items", "item_id", columns)
    raws = [{column.name: draw(raw_values(column)) for column in columns} for _ in range(draw(st.integers(0, 4)))]
    names = draw(st.permutations([*(f"n{index}" for index in range(22)), *(f"vector.{index}" for index in range(22))]))
    numeric = tuple(
        Numeric(name, draw(st.floats(-1e3, 1e3)), draw(st.floats(1e-3, 1e3)), draw(st.booleans()))
        for name in sorted(names[: draw(st.integers(0, 44))], key=names.index if draw(st.booleans()) else None)
    )
    offsets = iter(range(1, 100, 10))
    categorical = tuple(
        Categorical(name, next(offsets), len(KNOWN), draw(st.integers(1, 5)), words=name == "text")
        for name in draw(st.permutations([*WORD_COLUMNS, "unknown"]))
    )
    return Case(schema, raws, numeric, categorical)


def raw_values(column: RowColumn) -> st.SearchStrategy[Any]:
    if column.kind is ColumnKind.NUMERIC:
        return FLOATS
    if column.kind is ColumnKind.EMBEDDING:
        return st.tuples(*[FLOATS] * column.width)
    if column.kind is ColumnKind.CATEGORICAL:
        return st.lists(st.sampled_from(WORDS), max_size=1)
    if column.kind is ColumnKind.MULTI:
        return st.lists(st.sampled_from(WORDS), max_size=12)
    return st.lists(st.sampled_from(WORDS), max_size=8).map(
        lambda texts: list(dict.fromkeys(split_words(" ".join(texts))))
    )


@given(cases(), st.data())
def test_decodes_what_the_plain_functions_give(case: Case, data: st.DataObject) -> None:
    lines = len(case.raws) + 2
    at = data.draw(st.permutations(range(lines)))[: len(case.raws)]
    with np.errstate(all="ignore"):
        expected_numeric, expected_categories = case.expected(lines, at)
    decoder = case.decoder()
    numeric, categories = (
        np.full_like(expected_numeric, DEFAULT_NUMBER),
        np.full_like(expected_categories, DEFAULT_CODE),
    )
    decoded = decoder.decode(case.rows(), numeric, categories, np.asarray(at, np.int64))
    assert decoded.tolist() == [True] * len(case.raws)
    np.testing.assert_array_equal(categories, expected_categories)
    plain = [index for index, column in enumerate(case.numeric) if not column.log1p]
    np.testing.assert_array_equal(numeric[:, plain], expected_numeric[:, plain])
    for index, column in enumerate(case.numeric):
        if column.log1p:  # NumPy's own log1p of float32 is off by up to two last bits; it depends on the processor
            bound = 2.0**-22 * (np.abs(expected_numeric[:, index]) + (89.0 + abs(column.mean)) / column.std)
            assert (np.abs(numeric[:, index] - expected_numeric[:, index]) <= bound).all()
    overwritten = set(decoder.numeric_columns)
    assert {case.numeric[index].name for index in overwritten} == {
        column.name for column in case.numeric if column.name in names_of(case.schema)
    }
    untouched = [index for index in range(categories.shape[1]) if index not in decoder.category_columns]
    assert (categories[:, untouched] == DEFAULT_CODE).all()


def names_of(schema: RowSchema) -> set[str]:
    """The numbers that rows have."""
    names = {column.name for column in schema.columns if column.kind is ColumnKind.NUMERIC}
    return names | {
        f"{column.name}.{index}"
        for column in schema.columns
        if column.kind is ColumnKind.EMBEDDING
        for index in range(column.width)
    }


@given(st.lists(st.floats(width=32, min_value=0.0, max_value=np.finfo(np.float32).max.item()), min_size=1))
def test_the_logarithm_is_rounded_once(raws: list[float]) -> None:
    schema = RowSchema("items", "item_id", (RowColumn("v", ColumnKind.EMBEDDING, len(raws)),))
    decoder = RowDecoder(schema, [Numeric(f"v.{n}", log1p=True) for n in range(len(raws))], [], {})
    numeric, categories = np.zeros((1, len(raws)), np.float32), np.zeros((1, 0), np.int32)
    decoder.decode(as_rows([pack(schema, {"v": raws})], schema.row_words), numeric, categories, np.zeros(1, np.int64))
    exact = np.log1p(np.asarray(raws, np.float64))
    assert (np.abs(numeric[0] - exact) <= np.spacing(exact.astype(np.float32)) * 0.5001).all()


SCHEMA = RowSchema(
    "items",
    "item_id",
    (
        RowColumn("price", ColumnKind.NUMERIC),
        RowColumn("text", ColumnKind.EMBEDDING, 2),
        RowColumn("brand", ColumnKind.CATEGORICAL),
        RowColumn("tags", ColumnKind.MULTI, 3),
        RowColumn("title", ColumnKind.WORDS, 3),
    ),
)
RAW = {"price": 3.0, "text": (0.5, -0.5), "brand": ["red"], "tags": ["never", "blue", "blue"], "title": ["xx"]}


def test_the_columns_of_a_model_come_in_its_own_order() -> None:
    numeric = [Numeric("text.1"), Numeric("age"), Numeric("price", mean=1.0, std=4.0), Numeric("text.2")]
    tags = Categorical("tags", 10, len(KNOWN), width=2)
    brand, shop = Categorical("brand", 1, len(KNOWN)), Categorical("shop", 30, 5)
    decoder = RowDecoder(SCHEMA, numeric, [tags, shop, brand], {"tags": KNOWN, "brand": KNOWN})
    assert decoder.numeric_columns == (0, 2)
    assert decoder.category_columns == (0, 1, 3)
    numbers, codes = np.full((2, 5), 8, np.float32), np.full((2, 4), 8, np.int32)
    row = as_rows([pack(SCHEMA, RAW)], SCHEMA.row_words)
    assert decoder.decode(row, numbers, codes, np.asarray([1], np.int64)).tolist() == [True]
    assert numbers.tolist() == [[8] * 5, [-0.5, 8, 0.5, 8, 8]]
    assert codes.tolist() == [[8] * 4, [12, 0, 8, 1]]


def test_a_row_of_another_schema_is_left_alone() -> None:
    newer = RowSchema(SCHEMA.table, SCHEMA.key, SCHEMA.columns, version=2)
    decoder = RowDecoder(SCHEMA, [Numeric("price")], [], {})
    rows = as_rows([pack(newer, RAW), pack(SCHEMA, RAW), bytes(SCHEMA.row_bytes)], SCHEMA.row_words)
    numbers, codes = np.full((3, 1), 8, np.float32), np.zeros((3, 0), np.int32)
    assert decoder.decode(rows, numbers, codes, np.arange(3)).tolist() == [False, True, False]
    assert numbers[:, 0].tolist() == [8, 3, 8]


@pytest.mark.parametrize("name", ["text.00", "text.2", "text.-1", "text.", "price.0", ".0", "brand.0"])
def test_a_number_that_rows_do_not_have_is_left_to_the_caller(name: str) -> None:
    assert RowDecoder(SCHEMA, [Numeric(name)], [], {}).numeric_columns == ()


@pytest.mark.parametrize(
    ("numeric", "categorical", "message"),
    [
        ([Numeric("brand")], [], "'brand' as a number, and table 'items' has 'brand' as categorical"),
        ([Numeric("text")], [], "'text' as a number, and table 'items' has 'text' as embedding"),
        ([], [Categorical("price", 1, 7)], "'price' as one text or several, .* has 'price' as numeric"),
        ([], [Categorical("title", 1, 7)], "'title' as one text or several, .* has 'title' as words"),
        ([], [Categorical("tags", 1, 7, words=True)], "'tags' as the words of a text, .* has 'tags' as multi"),
    ],
)
def test_a_column_of_another_kind_is_an_error(
    numeric: list[Numeric], categorical: list[Categorical], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        RowDecoder(SCHEMA, numeric, categorical, {column.name: KNOWN for column in categorical})


def test_arrays_that_do_not_fit_are_refused() -> None:
    decoder = RowDecoder(SCHEMA, [Numeric("price")], [Categorical("brand", 1, 7)], {"brand": KNOWN})
    rows = as_rows([pack(SCHEMA, RAW)], SCHEMA.row_words)
    numbers, codes, first = np.zeros((2, 1), np.float32), np.zeros((2, 1), np.int32), np.zeros(1, np.int64)
    for line in (2, -1):
        with pytest.raises(IndexError, match=f"row 0 is for line {line} of 2"):
            decoder.decode(rows, numbers, codes, np.asarray([line], np.int64))
    for wrong_numbers, wrong_codes in ((numbers[:1], codes), (numbers[:, :0], codes), (numbers, codes[:, :0])):
        with pytest.raises(ValueError, match="expected as many lines"):
            decoder.decode(rows, wrong_numbers, wrong_codes, first)
    for few in (rows[:0], rows[:, :-1]):
        with pytest.raises(ValueError, match="for 1 lines"):
            decoder.decode(few, numbers, codes, first)
    assert decoder.decode(rows[:0], numbers, codes, first[:0]).tolist() == []
    assert not numbers.any()
