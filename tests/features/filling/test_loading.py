"""Loading a table: whole or not at all, again from where it was, one at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import polars as pl
import pytest

from rankd.errors import DataError
from rankd.features.filling.loading import LoadOptions, LoadReport, list_tables, load_rows, read_table
from rankd.features.rows.row_schema import ColumnKind, RowColumn, RowSchema
from rankd.features.rows.table_meta import TableMeta, encode_meta
from rankd.features.stores.feature_store import FeatureStore
from rankd.features.stores.memory_store import MemoryStore
from rankd.features.stores.store_keys import meta_key, row_prefix
from tests.features.filling.small_tables import (
    SCHEMA,
    all_keys,
    check_rows,
    item_file,
    item_frame,
    price_of,
    stored_rows,
)

QUICK = LoadOptions(grace_seconds=0.0, watch_seconds=0.3, batch_rows=100, patience_seconds=5.0)


def load(store: FeatureStore, path: Path, options: LoadOptions = QUICK, schema: RowSchema = SCHEMA) -> LoadReport:
    return load_rows(store, "m", schema, path, options)


def interrupted(store: FeatureStore, path: Path, at: int, schema: RowSchema = SCHEMA) -> None:
    """Load, and press Ctrl-C when `at` rows are written."""

    def progress(done: int, total: int, line: str) -> None:
        if done >= at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_rows(store, "m", schema, path, QUICK, progress)


def test_a_large_table_is_there_as_it_was_packed(store: FeatureStore, tmp_path: Path) -> None:
    rows = 40_000  # more than a chunk of the file, and several batches of any store
    path = item_file(tmp_path / "items.parquet", rows)
    report = load(store, path, LoadOptions(grace_seconds=0.0))
    assert (report.rows, report.bytes, report.generation, report.resumed_at) == (rows, rows * SCHEMA.row_bytes, 1, 0)
    check_rows(store, 1, item_frame(rows))
    meta = read_table(store, "m", "items")
    assert (meta.rows, meta.schema, meta.loading, meta.retired) == (rows, SCHEMA, None, 0)
    assert list_tables(store) == [("m", "items")]
    load(store, item_file(path, rows // 2, price=2.0), LoadOptions(grace_seconds=0.0))
    check_rows(store, 2, item_frame(rows // 2, price=2.0))
    assert all_keys(store, row_prefix("m", "items", 1)) == set()


def test_readers_see_the_rows_before_or_the_new_ones(store: FeatureStore, tmp_path: Path) -> None:
    sizes = {1.0: 3000, 2.0: 2000, 3.0: 4000}
    paths = {price: item_file(tmp_path / f"{price}.parquet", rows, price) for price, rows in sizes.items()}
    prices_of_generations = (1.0, 2.0, 3.0, 1.0)
    options = LoadOptions(grace_seconds=1.0, watch_seconds=0.3, batch_rows=100)
    load(store, paths[1.0], options)
    stop, seen, wrong = threading.Event(), set(), []

    def read() -> None:
        while not stop.is_set():
            meta = read_table(store, "m", "items")
            ids = [f"i{n}" for n in range(0, meta.rows, 37)]
            rows = stored_rows(store, meta.generation, ids)
            prices = {row and price_of(row) for row in rows}
            if prices != {prices_of_generations[meta.generation - 1]}:
                wrong.append((meta.generation, prices))
            seen.add(meta.generation)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for price in prices_of_generations[1:]:
            load(store, paths[price], options)
    finally:
        stop.set()
        reader.join()
    assert wrong == []
    assert seen == {1, 2, 3, 4}


def test_an_interrupted_loading_goes_on_where_it_was(store: FeatureStore, tmp_path: Path) -> None:
    load(store, item_file(tmp_path / "before.parquet", 50, price=9.0))
    path = item_file(tmp_path / "items.parquet", 2000)
    interrupted(store, path, at=1000)
    meta = read_table(store, "m", "items")
    assert meta.loading is not None
    assert (meta.generation, meta.loading.rows_done, meta.loading.rows) == (1, 1000, 2000)
    check_rows(store, 1, item_frame(50, price=9.0))
    report = load(store, path)
    assert (report.resumed_at, report.rows, report.generation) == (1000, 2000, 2)
    check_rows(store, 2, item_frame(2000))
    assert all_keys(store, row_prefix("m", "items", 1)) == set()


@pytest.mark.parametrize("other", ["file", "schema"])
def test_another_file_or_schema_starts_over(store: FeatureStore, tmp_path: Path, other: str) -> None:
    path = item_file(tmp_path / "items.parquet", 2000)
    interrupted(store, path, at=1000)
    schema = SCHEMA if other == "file" else msgspec.structs.replace(SCHEMA, version=2)
    rows = 700 if other == "file" else 2000
    report = load(store, item_file(path, rows), schema=schema)
    assert (report.resumed_at, report.generation) == (0, 2)
    check_rows(store, 2, item_frame(rows), schema)
    assert all_keys(store, b"") == all_keys(store, row_prefix("m", "items", 2)) | {meta_key("m", "items")}


def test_the_rows_before_are_removed_by_the_next_loading_if_need_be(store: FeatureStore, tmp_path: Path) -> None:
    path = item_file(tmp_path / "items.parquet", 300)
    load(store, path)
    meta = read_table(store, "m", "items")
    store.put([(meta_key("m", "items"), encode_meta(msgspec.structs.replace(meta, generation=2, retired=1)))]).result()
    assert load(store, path).generation == 3
    assert all_keys(store, b"") == all_keys(store, row_prefix("m", "items", 3)) | {meta_key("m", "items")}
    assert read_table(store, "m", "items").retired == 0


def test_rows_that_nobody_knows_of_are_not_taken_in(store: FeatureStore, tmp_path: Path) -> None:
    """A store may lose its meta value and keep rows under numbers that will be used again."""
    load(store, item_file(tmp_path / "more.parquet", 500))
    store.delete([meta_key("m", "items")]).result()
    assert load(store, item_file(tmp_path / "items.parquet", 300)).generation == 1
    check_rows(store, 1, item_frame(300))


def test_an_update_writes_over_single_rows(store: FeatureStore, tmp_path: Path) -> None:
    update = LoadOptions(update=True, batch_rows=100, watch_seconds=0.0)
    load(store, item_file(tmp_path / "items.parquet", 1000))
    changed = pl.concat([item_frame(1000)[500:], item_frame(1200)[1000:]]).with_columns(price=5.0)
    changed.write_parquet(tmp_path / "update.parquet")
    report = load(store, tmp_path / "update.parquet", update)
    assert (report.rows, report.generation) == (700, 1)
    check_rows(store, 1, pl.concat([item_frame(500), changed]))
    assert read_table(store, "m", "items").rows == 1200
    load(store, tmp_path / "update.parquet", update)
    assert read_table(store, "m", "items").rows == 1200
    with pytest.raises(DataError, match=r"version 1 of its schema, and an update has to have the same"):
        load(store, tmp_path / "update.parquet", update, msgspec.structs.replace(SCHEMA, version=2))
    with pytest.raises(DataError, match="table 'items' of 'other' has no rows to update; load it without --update"):
        load_rows(store, "other", SCHEMA, tmp_path / "update.parquet", update)


def test_other_columns_need_another_version(store: FeatureStore, tmp_path: Path) -> None:
    path = item_file(tmp_path / "items.parquet", 10)
    load(store, path)
    fewer = msgspec.structs.replace(SCHEMA, columns=SCHEMA.columns[:2])
    with pytest.raises(DataError, match="version 1 of its schema already, with other columns; raise version to 2"):
        load(store, path, schema=fewer)
    fewer = msgspec.structs.replace(fewer, version=2)
    load(store, path, schema=fewer)
    check_rows(store, 2, item_frame(10), fewer)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    store = MemoryStore()
    path = tmp_path / "items.parquet"
    frame = item_frame(60_000)
    twice = frame["item_id"].to_list()
    twice[50_000] = "i10"
    cases = {
        r"id 'i10' of column 'item_id' comes more than once, as do 0 others": frame.with_columns(
            item_id=pl.Series(twice)
        ),
        r"row 40000 \(the first is 0\) has no id in column 'item_id'": frame.with_columns(
            item_id=pl.when(pl.int_range(pl.len()) == 40_000).then(None).otherwise("item_id")
        ),
        r"the embedding 'vector' of row 'i59999' has 3 numbers": frame.with_columns(
            vector=pl.when(pl.int_range(pl.len()) == 59_999)
            .then(pl.col("vector").arr.to_list().list.head(3))
            .otherwise(pl.col("vector").arr.to_list())
        ),
        r"column 'price' of the schema is missing": frame.drop("price"),
        r"has no rows": frame.clear(),
    }
    for words, wrong in cases.items():
        wrong.write_parquet(path)
        with pytest.raises(DataError, match=words):
            load(store, path)
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load(store, path)
    with pytest.raises(DataError, match=r"nowhere\.parquet: cannot be read"):
        load(store, tmp_path / "nowhere.parquet")
    with pytest.raises(DataError, match="namespace 'a:b' cannot be used"):
        load_rows(store, "a:b", SCHEMA, path, QUICK)
    assert all_keys(store, b"") == set()


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    store, path = MemoryStore(), item_file(tmp_path / "items.parquet", 40_000)

    def progress(done: int, total: int, line: str) -> None:
        if done == 5000:
            item_file(path, 40_000, price=2.0)

    with pytest.raises(DataError, match="was changed while it was read"):
        load_rows(store, "m", SCHEMA, path, LoadOptions(grace_seconds=0.0, batch_rows=5000), progress)
    assert read_table(store, "m", "items").generation == 0
    load(store, path)
    check_rows(store, 2, item_frame(40_000, price=2.0))


def test_of_two_loaders_the_second_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    path = item_file(tmp_path / "items.parquet", 2000)
    other = item_file(tmp_path / "other.parquet", 100, price=2.0)
    halfway, ended = threading.Event(), threading.Event()
    refusals = []

    def progress(done: int, total: int, line: str) -> None:
        if done >= 1000:
            halfway.set()
            ended.wait(0.03)  # each batch takes a while, so that the other one sees rows_done grow

    def second() -> None:
        halfway.wait()
        for file in (path, other):
            try:
                load(store, file)
            except DataError as error:
                refusals.append(str(error))
        try:
            load(store, other, LoadOptions(update=True, watch_seconds=0.3))
        except DataError as error:
            refusals.append(str(error))
        ended.set()

    thread = threading.Thread(target=second)
    thread.start()
    report = load_rows(store, "m", SCHEMA, path, QUICK, progress)
    thread.join()
    assert report.generation == 1
    check_rows(store, 1, item_frame(2000))
    assert len(refusals) == 3
    assert all("is being loaded by another process" in one for one in refusals)


def test_two_loaders_that_begin_at_the_same_moment(store: FeatureStore, tmp_path: Path) -> None:
    paths = [item_file(tmp_path / f"{price}.parquet", 1500, price) for price in (1.0, 2.0, 2.0)]
    together = threading.Barrier(len(paths))
    results: list[LoadReport | str] = []

    def one(path: Path) -> None:
        together.wait()
        try:
            results.append(load(store, path))
        except DataError as error:
            results.append(str(error))

    threads = [threading.Thread(target=one, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reports = [result for result in results if isinstance(result, LoadReport)]
    assert reports
    assert all("another process" in result for result in results if isinstance(result, str))
    generation = read_table(store, "m", "items").generation
    assert generation == max(report.generation for report in reports)
    row = stored_rows(store, generation, ["i0"])[0]
    assert row is not None
    check_rows(store, generation, item_frame(1500, price_of(row)))


def test_a_loader_that_slept_too_long_stops(tmp_path: Path) -> None:
    """The other one takes it for dead, takes over its rows, and ends first."""
    store, path = MemoryStore(), item_file(tmp_path / "items.parquet", 2000)
    reports = []

    def progress(done: int, total: int, line: str) -> None:
        if done == 1000:
            reports.append(load(store, path, LoadOptions(grace_seconds=0.0, watch_seconds=0.0, batch_rows=100)))

    with pytest.raises(DataError, match="no longer known to the store"):
        load_rows(store, "m", SCHEMA, path, QUICK, progress)
    assert [report.resumed_at for report in reports] == [1000]
    check_rows(store, 1, item_frame(2000))


def test_long_ids_and_large_rows(store: FeatureStore, tmp_path: Path) -> None:
    """Keys over LMDB's limit, and rows of which only a few fit into one write."""
    schema = RowSchema("users", "user_id", (RowColumn("v", ColumnKind.EMBEDDING, 4000),))
    ids = ["u" * 1000 + str(n) for n in range(300)]
    frame = pl.DataFrame({"user_id": ids, "v": [[float(n)] * 4000 for n in range(300)]})
    frame.write_parquet(tmp_path / "users.parquet")
    report = load_rows(store, "m", schema, tmp_path / "users.parquet", QUICK)
    assert report.bytes == 300 * (2 + 4000) * 4
    assert len(all_keys(store, row_prefix("m", "users", 1))) == 300


def test_an_unreadable_meta_value_is_named(store: FeatureStore, tmp_path: Path) -> None:
    store.put([(meta_key("m", "items"), b'{"generations": 3}')]).result()
    with pytest.raises(DataError, match="what the store says of table 'items' of 'm' cannot be read"):
        load(store, item_file(tmp_path / "items.parquet", 3))
    assert read_table(store, "m", "users") == TableMeta()
