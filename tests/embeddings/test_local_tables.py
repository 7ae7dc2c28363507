"""Pooled look-up beside plain sums: every storage and width, parts, threads, and ids that are not there."""

from __future__ import annotations

import ctypes
import mmap
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankd.embeddings import local_tables
from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.local_tables import LocalTables
from rankd.embeddings.pooling import Pooling
from rankd.embeddings.row_storage import SCALED
from rankd.embeddings.table_file import Table
from rankd.embeddings.table_layout import COLUMN, layout
from rankd.embeddings.table_spec import TablePart, TableSpec, TableStorage
from rankd.errors import ConfigError, InvalidRequest
from rankd.types import Array, Float32Array

from .made_tables import WIDTHS, asked_of, made_table, part_of, plain_sums, requests, tables

EXACT = tuple(storage for storage in TableStorage if storage not in SCALED)


def random_request(names: tuple[str, ...], rows: int, samples: int, most: int, seed: int = 0) -> JaggedIds:
    random = np.random.default_rng(seed)
    offsets = np.cumsum([0, *random.integers(0, most + 1, len(names) * samples)])
    return JaggedIds(names, offsets, random.integers(0, rows, offsets[-1]))


@settings(deadline=None)
@given(st.data())
def test_sums_are_those_of_plain_additions(data: st.DataObject) -> None:
    known = data.draw(tables())
    asked = data.draw(requests(known))
    pooling: Pooling = LocalTables(known.values())
    # Numbers of up to 20 that nearly cancel out leave the rounding errors of the larger ones.
    np.testing.assert_allclose(pooling.pool(asked), plain_sums(known, asked), rtol=1e-5, atol=1e-4)


@settings(deadline=None)
@given(st.data())
def test_floats_are_added_in_the_order_of_the_ids(data: st.DataObject) -> None:
    known = data.draw(tables(EXACT))
    asked = data.draw(requests(known))
    assert np.array_equal(LocalTables(known.values()).pool(asked), plain_sums(known, asked))


@settings(deadline=None)
@given(st.data(), st.integers(1, 5))
def test_parts_add_up_to_the_whole(data: st.DataObject, modulus: int) -> None:
    known = data.draw(tables())
    asked = data.draw(requests(known))
    total = np.zeros_like(whole := LocalTables(known.values()).pool(asked))
    for remainder in range(modulus):
        own = asked.ids % modulus == remainder
        offsets = np.concatenate([[0], np.cumsum(own)])[asked.offsets]
        parts = LocalTables(part_of(table, modulus, remainder) for table in known.values())
        total += parts.pool(JaggedIds(asked.tables, offsets, asked.ids[own] // modulus))
    np.testing.assert_allclose(total, whole, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(st.data(), st.integers(2, 5))
def test_bags_that_lie_in_one_part_are_exact(data: st.DataObject, modulus: int) -> None:
    known = {"t": made_table("t", 40, data.draw(st.sampled_from(WIDTHS)), TableStorage.FP32)}
    bags = data.draw(st.lists(st.tuples(st.integers(0, modulus - 1), st.lists(st.integers(0, 4))), max_size=6))
    whole = asked_of(("t",), [[row * modulus + remainder for row in rows] for remainder, rows in bags])
    parts = [LocalTables([part_of(known["t"], modulus, remainder)]) for remainder in range(modulus)]
    sums = LocalTables(known.values()).pool(whole)
    for line, (remainder, rows) in zip(sums, bags, strict=True):
        assert np.array_equal(parts[remainder].pool(asked_of(("t",), [rows]))[0], line)


@settings(deadline=None)
@given(st.data(), st.sampled_from([-1, -(2**63), 2**63 - 1, 2**32, 0]))
def test_an_id_outside_of_its_table_is_named(data: st.DataObject, beyond: int) -> None:
    known = data.draw(tables())
    asked = data.draw(requests(known).filter(lambda one: len(one.ids) > 0))
    place = data.draw(st.integers(0, len(asked.ids) - 1))
    name = asked.tables[(int(np.searchsorted(asked.offsets, place, side="right")) - 1) // asked.num_samples]
    rows = len(known[name].records)
    asked.ids[place] = wrong = beyond or rows
    with pytest.raises(InvalidRequest, match=f"id {wrong} is not in table '{name}' of {rows} rows"):
        LocalTables(known.values()).pool(asked)


def test_a_part_without_rows_has_empty_bags_only() -> None:
    pooling = LocalTables([part_of(made_table("t", 2, 3, TableStorage.INT8), 5, 4)])
    assert np.array_equal(pooling.pool(asked_of(("t",), [[], []])), np.zeros((2, 3)))
    with pytest.raises(InvalidRequest, match="id 0 is not in table 't', which has no rows here"):
        pooling.pool(asked_of(("t",), [[], [0]]))


@pytest.mark.parametrize("storage", TableStorage)
def test_the_width_of_a_table_changes_no_sum(storage: TableStorage) -> None:
    """The same numbers are added by vectors of other widths, under a mask or not."""
    wide = made_table("t", 50, WIDTHS[-1], storage)
    asked = random_request(("t",), 50, 20, 40)
    sums = LocalTables([wide]).pool(asked)
    for dim in WIDTHS[:-1]:
        spec = TableSpec("t", 50, dim, storage)
        scales = 8 if storage in SCALED else 0
        kept = wide.records[:, : spec.row_bytes - scales]
        records = np.concatenate([kept, wide.records[:, wide.spec.row_bytes - scales :]], axis=1)
        assert np.array_equal(LocalTables([Table(spec, TablePart("t"), records)]).pool(asked), sums[:, :dim])


def guarded(records: Array) -> Array:
    """The same records, right before a page that nobody may read."""
    size = -(-records.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    region = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(region.ctypes.data + size), mmap.PAGESIZE, 0) == 0
    copy = region[size - records.nbytes : size].reshape(records.shape)
    copy[:] = records
    return copy


@pytest.mark.parametrize("storage", TableStorage)
@pytest.mark.parametrize("dim", WIDTHS)
def test_nothing_is_read_or_written_beside_its_place(storage: TableStorage, dim: int) -> None:
    plain = made_table("t", 3, dim, storage)
    table = Table(plain.spec, TablePart("t"), guarded(plain.records))
    asked = asked_of(("t", "t"), [[2], [], [0, 2], [2, 2, 1]])
    layouts = np.asarray([layout(table)] * 2)
    layouts[1, COLUMN] = dim
    around = np.full((4, 2 * dim), np.float32(7))
    from rankd.embeddings.table_kernels import sum_bags

    assert sum_bags(layouts, asked.offsets, asked.ids, 0, 4, around[1:3]) == -1
    assert (around[[0, 3]] == 7).all()
    np.testing.assert_allclose(around[1:3], plain_sums({"t": plain}, asked), rtol=1e-5, atol=1e-5)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Helpers are asked for a few ids already."""
    monkeypatch.setattr(local_tables, "LEAST_IDS", 8)
    monkeypatch.setattr(local_tables, "SHARED_IDS", 16)


def many() -> dict[str, Table]:
    shapes = zip(("a", "b", "c", "d"), TableStorage, (17, 64, 130, 33), strict=True)
    return {name: made_table(name, 50, dim, storage) for name, storage, dim in shapes}


@pytest.mark.usefixtures("eager")
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 4), st.integers(1, 40), st.integers(0, 20), st.integers(0, 99))
def test_any_number_of_threads_gives_the_same_bits(threads: int, samples: int, most: int, seed: int) -> None:
    known = many()
    asked = random_request(("b", "a", "d", "c", "a"), 50, samples, most, seed)
    with LocalTables(known.values(), threads) as several:
        assert several.pool(asked).tobytes() == LocalTables(known.values()).pool(asked).tobytes()


@pytest.mark.usefixtures("eager")
def test_the_first_wrong_id_is_named_by_any_number_of_threads() -> None:
    asked = random_request(("a", "b", "c"), 50, 30, 9)
    asked.ids[[40, 200, -1]] = 50, 51, 52
    with LocalTables(many().values(), 3) as pooling, pytest.raises(InvalidRequest, match="id 50 is not"):
        pooling.pool(asked)


@pytest.mark.usefixtures("eager")
def test_several_callers_at_once() -> None:
    known = many()
    asked = [random_request(("d", "a", "b", "c"), 50, 20, 12, seed) for seed in range(40)]
    alone = [LocalTables(known.values()).pool(one) for one in asked]
    with LocalTables(known.values(), 3) as shared, ThreadPoolExecutor(4) as callers:
        together: list[Float32Array] = list(callers.map(shared.pool, asked))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


@given(st.lists(st.integers(0, 60_000), max_size=40), st.integers(1, 4))
def test_spans_cover_all_bags_and_are_balanced(lengths: list[int], threads: int) -> None:
    offsets = np.cumsum([0, *lengths])
    cuts = local_tables._cuts(offsets, threads)
    spans = list(pairwise(cuts.tolist()))
    assert (cuts[0], cuts[-1]) == (0, len(lengths))
    assert (np.diff(cuts) >= 0).all()
    assert len(spans) <= threads * local_tables.SPANS_A_THREAD
    fair = int(offsets[-1]) / len(spans)
    assert all(offsets[last] - offsets[first] <= fair + max(lengths, default=0) + 1 for first, last in spans)


def test_what_is_asked_is_checked() -> None:
    pooling = LocalTables([made_table("shop", 9, 4, TableStorage.FP32)])
    offsets, ids = np.asarray([0, 1, 2]), np.asarray([3, 4])
    for asked, why in (
        (JaggedIds(("shops",), offsets, ids), r"no table 'shops' here.*Did you mean 'shop'\?"),
        (JaggedIds(("shop",), offsets, ids[:1]), "offsets ascend"),
        (JaggedIds(("shop", "shop", "shop"), offsets, ids), "do not fit 3 tables"),
        (JaggedIds(("shop",), np.asarray([0, 2, 1, 2]), ids), "offsets ascend"),
        (JaggedIds(("shop",), offsets.astype(np.int32), ids), "offsets are int64"),
        (JaggedIds(("shop",), offsets, ids.astype(np.float64)), "ids are int64"),
        (JaggedIds(("shop",), offsets, ids.reshape(2, 1)), "ids are int64 in one dimension"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            pooling.pool(asked)
    strided = JaggedIds(("shop",), np.repeat(offsets, 2)[::2], np.repeat(ids, 2)[::2])
    assert np.array_equal(pooling.pool(strided), pooling.pool(JaggedIds(("shop",), offsets, ids)))
    assert pooling.pool(JaggedIds((), np.asarray([0]), ids[:0])).shape == (0, 0)


def test_what_is_constructed_is_checked() -> None:
    table = made_table("shop", 9, 4, TableStorage.FP32)
    with pytest.raises(ConfigError, match="names of their own"):
        LocalTables([table, table])
    with pytest.raises(ConfigError, match="0 threads"):
        LocalTables([table], threads=0)
