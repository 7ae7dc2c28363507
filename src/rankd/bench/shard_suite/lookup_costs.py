"""What a row takes that is looked up and added, in each storage: the first of the costs that plans reckon with.

In: a folder for tables. Out: a LookupCost for each storage, and what a float32 of a pooled row takes. One core looks up
rows of two widths in tables that no cache holds, in bags of many ids and of one: the difference between widths is what
bytes take, that between bags what sums take.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.local_tables import LocalTables
from rankd.embeddings.table_file import open_table, pages_for
from rankd.embeddings.table_spec import TableSpec, TableStorage
from rankd.embeddings.table_writing import write_table
from rankd.plan.cost_model import LookupCost
from rankd.types import Float32Array

DIMS = (32, 128)
BAG = 16
IDS, CALLS = 32_768, 9
BLOCK_ROWS = 1 << 16


def lookup_costs(folder: Path, table_bytes: int) -> tuple[dict[TableStorage, LookupCost], float]:
    """Of each storage, in us, and a pooled float32; tables of so many bytes are written, one at a time."""
    found, pooled = {}, []
    for storage in TableStorage:
        rows = []
        for dim in DIMS:
            row_bytes = TableSpec("row", 1, dim, storage).row_bytes
            spec = TableSpec("row", max(table_bytes // row_bytes, 1), dim, storage)
            alone_us, bag_us = _taken_us(folder, spec)
            value_us = max(alone_us - bag_us, 0.0) / (IDS * dim * (1 - 1 / BAG))
            pooled.append(value_us)
            rows.append((row_bytes, max(bag_us / IDS - value_us * dim / BAG, 0.0)))
        found[storage] = line_of_rows(rows)
    return found, statistics.median(pooled)


def line_of_rows(rows: list[tuple[int, float]]) -> LookupCost:
    """The line through two rows (bytes, us); never one that falls, or that begins below nothing."""
    (few, short_us), (many, long_us) = rows
    byte_us = min(max((long_us - short_us) / (many - few), 0.0), short_us / few)
    return LookupCost(max(short_us - few * byte_us, 0.0), byte_us)


def _taken_us(folder: Path, spec: TableSpec) -> tuple[float, float]:
    """Median microseconds of CPU of IDS look-ups in bags of one and of BAG."""
    path = write_table(folder, spec, _blocks(spec))
    random = np.random.default_rng(0)
    table = open_table(path, pages=pages_for(spec.size_bytes))
    with LocalTables([table]) as tables:
        taken: dict[int, list[float]] = {1: [], BAG: []}
        for _ in range(CALLS):
            for bag, times in taken.items():
                offsets = np.arange(0, IDS + 1, bag, dtype=np.int64)
                asked = JaggedIds((spec.name,), offsets, random.integers(0, spec.rows, IDS))
                started = time.thread_time()
                tables.pool(asked)
                times.append((time.thread_time() - started) * 1e6)
    path.unlink()
    return statistics.median(taken[1]), statistics.median(taken[BAG])


def _blocks(spec: TableSpec) -> Iterator[Float32Array]:
    """One block again and again: what numbers stand there changes nothing."""
    block = np.random.default_rng(0).random((min(BLOCK_ROWS, spec.rows), spec.dim), np.float32)
    for first in range(0, spec.rows, BLOCK_ROWS):
        yield block[: spec.rows - first]
