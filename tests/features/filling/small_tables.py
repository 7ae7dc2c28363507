"""Small tables in Parquet, and stores that fail on purpose, for the tests of loading."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import polars as pl

from rankd.features.rows.row_packing import pack_rows
from rankd.features.rows.row_schema import ColumnKind, RowColumn, RowSchema
from rankd.features.stores.done_futures import refused
from rankd.features.stores.feature_store import FeatureStore, Pair, StoreFailure, Trouble
from rankd.features.stores.memory_store import MemoryStore
from rankd.features.stores.store_keys import row_key, row_prefix

SCHEMA = RowSchema(
    "items",
    "item_id",
    (
        RowColumn("price", ColumnKind.NUMERIC),
        RowColumn("brand", ColumnKind.CATEGORICAL),
        RowColumn("tags", ColumnKind.MULTI, 2),
        RowColumn("title", ColumnKind.WORDS, 3),
        RowColumn("vector", ColumnKind.EMBEDDING, 4),
    ),
)


def item_frame(rows: int, price: float = 1.0) -> pl.DataFrame:
    """Items "i0", "i1", ... whose rows all differ; `price` tells one file from another."""
    numbers = np.arange(rows)
    return pl.DataFrame(
        {
            "item_id": [f"i{n}" for n in range(rows)],
            "price": np.full(rows, price),
            "brand": [None if n % 7 == 0 else f"brand {n % 50}" for n in range(rows)],
            "tags": [[f"t{n % 3}", f"t{n % 5}"][: n % 3] for n in range(rows)],
            "title": [f"item number {n}" for n in range(rows)],
            "vector": list((numbers[:, None] + np.arange(4)).astype(np.float32)),
        }
    )


def item_file(path: Path, rows: int, price: float = 1.0) -> Path:
    """A Parquet file of `item_frame`."""
    item_frame(rows, price).write_parquet(path)
    return path


def stored_rows(store: FeatureStore, generation: int, ids: Sequence[str], namespace: str = "m") -> list[bytes | None]:
    """Rows of items as they are in a store."""
    prefix = row_prefix(namespace, "items", generation)
    return store.get([row_key(prefix, identity) for identity in ids]).result()


def price_of(row: bytes) -> float:
    """The price in a row of SCHEMA."""
    (price,) = struct.unpack_from("<f", row, 8)
    return float(price)


def check_rows(store: FeatureStore, generation: int, frame: pl.DataFrame, schema: RowSchema = SCHEMA) -> None:
    """A store has exactly the rows of a frame in a generation, whenever they were written."""
    packed = pack_rows(schema, frame, 0)
    found = stored_rows(store, generation, packed.ids)
    assert None not in found
    words = np.frombuffer(b"".join(filter(None, found)), np.uint32).reshape(packed.words.shape).copy()
    words[:, 1] = 0
    np.testing.assert_array_equal(words, packed.words)
    assert len(all_keys(store, row_prefix("m", "items", generation))) == len(packed.ids)


def all_keys(store: FeatureStore, prefix: bytes) -> set[bytes]:
    """All keys that begin with a prefix."""
    return {key for keys in store.keys(prefix) for key in keys}


class TroubledStore(MemoryStore):
    """A store in memory in which a function is called before each write; what it raises is the answer.

    `after` makes it happen although the answer is a failure, as with a store that times out.
    """

    local = False  # several writes are on their way at once, as to Redis

    def __init__(self, before: Callable[[str], None], after: bool = False) -> None:
        super().__init__()
        self._before, self._after = before, after

    def put(self, pairs: Sequence[Pair]) -> Future[None]:
        """Write values, or fail."""
        try:
            self._before("put")
        except StoreFailure as failure:
            if self._after:
                super().put(pairs)
            return refused(failure)
        return super().put(pairs)

    def exchange(self, key: bytes, expected: bytes | None, value: bytes) -> Future[bool]:
        """Exchange a value, or fail."""
        try:
            self._before("exchange")
        except StoreFailure as failure:
            if self._after:
                super().exchange(key, expected, value)
            return refused(failure)
        return super().exchange(key, expected, value)


def failing_at(*calls: int) -> Callable[[str], None]:
    """Time-outs at the writes of these numbers, counted from 1."""
    count = 0

    def before(kind: str) -> None:
        nonlocal count
        count += 1
        if count in calls:
            raise StoreFailure(f"no answer to {kind} {count}", Trouble.TIMEOUT)

    return before
