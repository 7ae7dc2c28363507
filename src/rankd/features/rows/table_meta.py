"""What a store says of a table: its schema, which loading of it is the current one, and one that is under way."""

from __future__ import annotations

import msgspec

from rankd.features.rows.row_schema import RowSchema


class Loading(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A loading that is not finished: the rows of `generation` that are written, of the file with this mark."""

    generation: int
    schema: RowSchema
    source: str
    rows_done: int
    rows: int


class TableMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The value of a table's meta key, as JSON. Rows of `generation` are the ones to read; 0: none was loaded yet.

    `retired` is the generation before, which is removed when everybody has moved on.
    """

    generation: int = 0
    schema: RowSchema | None = None
    rows: int = 0
    loaded: str = ""
    loading: Loading | None = None
    retired: int = 0


def encode_meta(meta: TableMeta) -> bytes:
    """A meta value."""
    return msgspec.json.encode(meta)


def decode_meta(value: bytes) -> TableMeta:
    """A meta value.

    Raises:
        msgspec.MsgspecError: it is not one, or of a newer release.
    """
    return msgspec.json.decode(value, type=TableMeta)
