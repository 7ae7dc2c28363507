"""Tables in memory for tests, and the plain sums that they are held to."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from hypothesis import strategies as st

from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.row_storage import pack_rows, unpack_rows
from rankd.embeddings.table_file import Table
from rankd.embeddings.table_spec import TablePart, TableSpec, TableStorage
from rankd.types import Float32Array

WIDTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 48, 64, 65, 100, 128, 129, 207, 256, 257)
"""Below, at and above each number of columns that is summed at once."""


def made_table(name: str, rows: int, dim: int, storage: TableStorage, seed: int = 0) -> Table:
    numbers = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return Table(TableSpec(name, rows, dim, storage), TablePart(name), pack_rows(numbers, storage))


def part_of(table: Table, modulus: int, remainder: int) -> Table:
    part = TablePart(table.spec.name, modulus, remainder)
    return Table(table.spec, part, table.records[remainder::modulus])


def numbers_of(table: Table) -> Float32Array:
    return unpack_rows(table.records, table.spec.storage, table.spec.dim)


def plain_sums(tables: Mapping[str, Table], asked: JaggedIds) -> Float32Array:
    """(B, W): one row added after the other."""
    blocks = []
    for f, name in enumerate(asked.tables):
        numbers = numbers_of(tables[name])
        block = np.zeros((asked.num_samples, numbers.shape[1]), np.float32)
        for b in range(asked.num_samples):
            bag = f * asked.num_samples + b
            for place in range(asked.offsets[bag], asked.offsets[bag + 1]):
                block[b] += numbers[asked.ids[place]]
        blocks.append(block)
    return np.concatenate(blocks, axis=1) if blocks else np.zeros((0, 0), np.float32)


def asked_of(names: tuple[str, ...], bags: list[list[int]]) -> JaggedIds:
    """Bags in the order of `JaggedIds`."""
    offsets = np.cumsum([0, *map(len, bags)])
    return JaggedIds(names, offsets, np.asarray([one for bag in bags for one in bag], np.int64))


@st.composite
def tables(draw: st.DrawFn, storages: tuple[TableStorage, ...] = tuple(TableStorage)) -> dict[str, Table]:
    made = {}
    for number in range(draw(st.integers(1, 4))):
        rows, dim, storage = draw(st.integers(1, 40)), draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(storages))
        made[f"t{number}"] = made_table(f"t{number}", rows, dim, storage, seed=number)
    return made


@st.composite
def requests(draw: st.DrawFn, known: Mapping[str, Table]) -> JaggedIds:
    """Any tables, some of them twice, none at all; bags with no ids, few, or more than are asked for ahead."""
    names = tuple(draw(st.lists(st.sampled_from(sorted(known)), max_size=5)))
    samples = draw(st.integers(0, 5)) if names else 0
    bags = []
    for name in names:
        rows = st.integers(0, len(known[name].records) - 1)
        bags += [draw(st.lists(rows, max_size=draw(st.sampled_from([0, 3, 70])))) for _ in range(samples)]
    return asked_of(names, bags)
