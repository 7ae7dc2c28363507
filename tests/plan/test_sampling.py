"""Statistics are what a plain count gives, from files and from batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.embeddings.jagged import JaggedIds
from rankd.errors import DataError, InvalidRequest
from rankd.plan.sampling import count_batches, count_file
from rankd.plan.table_statistics import HOT_SHARES

ROWS = 30
Samples = list[list[int]]


def jagged(tables: Sequence[Samples]) -> JaggedIds:
    """Tables "0", "1", ...: a list of ids for each sample."""
    flat = [ids for table in tables for ids in table]
    offsets = np.cumsum([0, *map(len, flat)])
    return JaggedIds(
        tuple(map(str, range(len(tables)))), offsets, np.asarray([one for ids in flat for one in ids], np.int64)
    )


def plain_hot(samples: Samples, rows: int) -> list[float]:
    """Rows ranked in even samples, look-ups counted in odd ones, one by one."""
    ranking = Counter(sorted(one for ids in samples[::2] for one in ids))
    measured = [one for ids in samples[1::2] for one in ids]
    if not ranking or not measured:
        return list(HOT_SHARES)
    ranked = [row for row, _ in ranking.most_common()]
    shares = []
    for share in HOT_SHARES:
        count = int(rows * share)
        known = sum(one in ranked[:count] for one in measured)
        rest = sum(one not in ranked for one in measured) * max(count - len(ranked), 0) / max(rows - len(ranked), 1)
        shares.append((known + rest) / len(measured))
    return shares


samples_of_a_table = st.lists(st.lists(st.integers(0, ROWS - 1), max_size=5), min_size=6, max_size=6)


@given(st.lists(samples_of_a_table, min_size=1, max_size=3), st.integers(1, 5), st.integers(ROWS, 30_000))
def test_batches_are_counted_as_a_plain_loop_does(tables: list[Samples], cut: int, rows: int) -> None:
    batches = [jagged([table[:cut] for table in tables]), jagged([table[cut:] for table in tables])]
    found = count_batches(batches, {str(number): rows for number in range(len(tables))})
    assert found.samples == 6
    for one, samples in zip(found.tables, tables, strict=True):
        assert one.lookups == pytest.approx(sum(map(len, samples)) / 6)
        assert one.used == pytest.approx(sum(map(bool, samples)) / 6)
        assert one.hot == pytest.approx(plain_hot(samples, rows))


def test_rows_that_are_no_hotter_than_others_do_not_look_so() -> None:
    """Rows by chance: a sample of 4,000 ids of 40,000 rows has ids that come twice, which are not hot."""
    random = np.random.default_rng(0)
    ids = random.integers(0, 40_000, 4000)
    batch = JaggedIds(("0",), np.arange(4001), ids)
    (one,) = count_batches([batch], {"0": 40_000}).tables
    assert one.hot == pytest.approx(HOT_SHARES, abs=0.02)


def test_hot_rows_are_found() -> None:
    random = np.random.default_rng(0)
    ids = np.where(random.random(4000) < 0.8, random.integers(0, 10, 4000), random.integers(0, 10_000, 4000))
    (one,) = count_batches([JaggedIds(("0",), np.arange(4001), ids)], {"0": 10_000}).tables
    assert one.hot[1] == pytest.approx(0.8, abs=0.03)


def test_ids_outside_of_their_table_and_unknown_tables_are_refused() -> None:
    batch = jagged([[[1], [7]]])
    with pytest.raises(DataError, match="id 7 is outside of table '0', whose rows are 0 to 6"):
        count_batches([batch], {"0": 7})
    with pytest.raises(DataError, match="table '0' is not declared; declared are a"):
        count_batches([batch], {"a": 7})
    with pytest.raises(InvalidRequest):
        count_batches([JaggedIds(("0",), np.asarray([0, 5]), np.asarray([1]))], {"0": 7})


def test_files_of_both_kinds_say_the_same(tmp_path: Path) -> None:
    lists, single = [[1, 2], [], None, [2]], [4, None, 0, 3]
    pl.DataFrame({"a": lists, "b": single, "other": ["x"] * 4}).write_parquet(tmp_path / "sample.parquet")
    (tmp_path / "sample.csv").write_text("b,a,other\n4,1 2,x\n,,x\n0,,x\n3,2,x\n")
    rows = {"a": 10, "b": 5}
    parquet, csv = (count_file(tmp_path / f"sample.{kind}", rows) for kind in ("parquet", "csv"))
    assert parquet == csv
    a, b = parquet.tables
    assert (a.table, a.lookups, a.used) == ("a", 0.75, 0.5)
    assert (b.table, b.lookups, b.used) == ("b", 0.75, 0.75)


def test_a_csv_column_may_begin_with_single_ids(tmp_path: Path) -> None:
    path = tmp_path / "sample.csv"
    path.write_text("a\n" + "1\n" * 200 + "2 3 4\n")
    (one,) = count_file(path, {"a": 5}).tables
    assert one.lookups == pytest.approx(203 / 201)


def test_without_a_declaration_all_columns_are_tables(tmp_path: Path) -> None:
    path = tmp_path / "sample.parquet"
    pl.DataFrame({"a": [[0, 9], [9]], "b": [1, 2]}).write_parquet(path)
    assert [one.table for one in count_file(path, None).tables] == ["a", "b"]
    assert count_file(path, None) == count_file(path, {"a": 10, "b": 3})


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([0.5, 1.0], "column 'a' is Float64"),
        (["1 x", "2"], "column 'a' is String"),
        ([["x"], ["y"]], "column 'a' is List"),
        ([True, False], "column 'a' is Boolean"),
        ([3, 9], "id 9 is outside"),
        ([-1, 0], "id -1 is outside"),
    ],
)
def test_cells_that_are_no_ids_are_refused(tmp_path: Path, column: list[object], message: str) -> None:
    path = tmp_path / "sample.parquet"
    pl.DataFrame({"a": column}).write_parquet(path)
    with pytest.raises(DataError, match=message):
        count_file(path, {"a": 9})


def test_files_that_cannot_be_counted_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sample.parquet"
    with pytest.raises(DataError, match="cannot be read"):
        count_file(path, None)
    pl.DataFrame({"a": [1]}).write_parquet(path)
    with pytest.raises(DataError, match="no column for table 'b'; there are a"):
        count_file(path, {"b": 3})
    pl.DataFrame({"a": [1]}).clear().write_parquet(path)
    with pytest.raises(DataError, match="0 samples"):
        count_file(path, None)
