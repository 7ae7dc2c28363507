"""The declared schema of a table of feature rows, and how a row lies in memory.

    table = "items"                 the table: "items" or "users"
    version = 3                     raise it when a column changes
    key = "item_id"                 the column of the file that holds the ids
    [[columns]]
    name = "price"
    kind = "numeric"
    [[columns]]
    name = "tags"
    kind = "multi"
    width = 4

A row is a fixed number of 32-bit words, so that thousands are decoded at once:

    word 0       mark: of this schema
    word 1       when the row was written, seconds since 1970 (u32)
    then         each column in its order:
                 numeric              1 word, float32; NaN where missing
                 categorical          2 words, the `hash_id` of the value; 0 where missing
                 multi, words         2 x width words, the values in their order, 0-padded
                 embedding            width words, float32

What a model takes from a row it takes by name: a numeric column by its name, number i of an embedding as "name.i", the
categorical ones by their name. Values are raw, as in the log; a model's own vocabulary and normalisation are applied
when a row is decoded, so that no row belongs to one model version.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec
import xxhash

HEADER_WORDS = 2
WORD_BYTES = 4


class ColumnKind(Enum):
    """What a column holds."""

    NUMERIC = "numeric"
    CATEGORICAL = "categorical"
    MULTI = "multi"  # a list of texts
    WORDS = "words"  # a text whose words are the values (see `tables.split_words`)
    EMBEDDING = "embedding"  # a list of `width` numbers


class RowColumn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One column; `width` is the number of values of a multi-valued column or of an embedding."""

    name: str
    kind: ColumnKind
    width: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1

    @property
    def words(self) -> int:
        """32-bit words that it takes in a row."""
        return {ColumnKind.NUMERIC: 1, ColumnKind.CATEGORICAL: 2, ColumnKind.EMBEDDING: self.width}.get(
            self.kind, 2 * self.width
        )


class RowSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The columns of a table, as declared by whoever fills it; kept in the store beside the rows."""

    table: str
    key: str
    columns: tuple[RowColumn, ...]
    version: Annotated[int, msgspec.Meta(ge=1)] = 1

    @property
    def row_words(self) -> int:
        """32-bit words of a row, header included."""
        return HEADER_WORDS + sum(column.words for column in self.columns)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return WORD_BYTES * self.row_words

    @property
    def mark(self) -> int:
        """32 bits that differ for another version or other columns; every row begins with them."""
        return xxhash.xxh32_intdigest(msgspec.json.encode((self.table, self.version, self.columns)))

    def place_of(self, name: str) -> tuple[RowColumn, int] | None:
        """A column and its first word in a row; None if there is no such column."""
        word = HEADER_WORDS
        for column in self.columns:
            if column.name == name:
                return column, word
            word += column.words
        return None
