"""Loading into a store that does not answer, forgets, or lets nobody in."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import pytest

from rankd.errors import DataError
from rankd.features.filling.loading import LoadOptions, load_rows, read_table
from rankd.features.stores.feature_store import StoreFailure, Trouble
from rankd.features.stores.memory_store import MemoryStore
from rankd.features.stores.open_store import open_store
from rankd.features.stores.store_config import StoreConfig
from rankd.features.stores.store_keys import row_prefix
from tests.features.filling.small_tables import (
    SCHEMA,
    TroubledStore,
    all_keys,
    check_rows,
    failing_at,
    item_file,
    item_frame,
)
from tests.features.stores.conftest import PATIENT_MS
from tests.features.stores.redis_server import running_redis

QUICK = LoadOptions(grace_seconds=0.0, watch_seconds=0.0, batch_rows=100, patience_seconds=5.0)


@pytest.mark.parametrize("happened", [False, True])
def test_time_outs_are_asked_again(tmp_path: Path, happened: bool) -> None:
    """Whether what timed out had happened or not."""
    path = item_file(tmp_path / "items.parquet", 1000)
    for first in range(1, 24):
        store = TroubledStore(failing_at(first, first + 1), happened)
        assert load_rows(store, "m", SCHEMA, path, QUICK).generation == 1
        check_rows(store, 1, item_frame(1000))
        assert read_table(store, "m", "items").rows == 1000


def test_a_store_that_stays_away_ends_a_loading_that_goes_on_later(tmp_path: Path) -> None:
    path = item_file(tmp_path / "items.parquet", 2000)
    down = False

    def before(kind: str) -> None:
        if down:
            raise StoreFailure("nobody answers", Trouble.DOWN)

    def progress(done: int, total: int, line: str) -> None:
        nonlocal down
        down = done == 500

    store = TroubledStore(before)
    options = LoadOptions(patience_seconds=0.3, batch_rows=100, grace_seconds=0.0, watch_seconds=0.2)
    with pytest.raises(StoreFailure, match=r"nobody answers\. 600 of 2,000 rows are written, readers see the rows bef"):
        load_rows(store, "m", SCHEMA, path, options, progress)
    down = False
    assert load_rows(store, "m", SCHEMA, path, QUICK).resumed_at == 500  # the last that the store heard of
    check_rows(store, 1, item_frame(2000))


def test_a_wrong_password_is_not_tried_again(tmp_path: Path) -> None:
    calls = []

    def before(kind: str) -> None:
        calls.append(kind)
        raise StoreFailure("the password is wrong", Trouble.DENIED)

    with pytest.raises(StoreFailure, match="the password is wrong"):
        load_rows(TroubledStore(before), "m", SCHEMA, item_file(tmp_path / "items.parquet", 10), QUICK)
    assert calls == ["exchange"]


def test_a_store_that_loses_rows_is_not_switched_to(tmp_path: Path) -> None:
    store, path = MemoryStore(), item_file(tmp_path / "items.parquet", 1000)
    load_rows(store, "m", SCHEMA, item_file(tmp_path / "before.parquet", 10, price=3.0), QUICK)

    def progress(done: int, total: int, line: str) -> None:
        if done == 1000 and line == "writing":
            store.delete(sorted(all_keys(store, row_prefix("m", "items", 2)))[:7]).result()

    with pytest.raises(DataError, match=r"7 of 1,000 rows of table 'items' of 'm' are not in the store any more"):
        load_rows(store, "m", SCHEMA, path, QUICK, progress)
    check_rows(store, 1, item_frame(10, price=3.0))
    assert load_rows(store, "m", SCHEMA, path, QUICK).resumed_at == 0
    check_rows(store, 2, item_frame(1000))


def test_a_redis_that_is_killed_meanwhile_is_waited_for(tmp_path: Path) -> None:
    path = item_file(tmp_path / "items.parquet", 3000)
    with running_redis(tmp_path / "redis") as server:

        def progress(done: int, total: int, line: str) -> None:
            if done == 1000:
                server.kill()
                threading.Timer(0.5, server.start).start()

        with closing(open_store(StoreConfig(server.url, timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS))) as store:
            options = LoadOptions(grace_seconds=0.0, batch_rows=100, watch_seconds=0.0)
            assert load_rows(store, "m", SCHEMA, path, options, progress).generation == 1
            check_rows(store, 1, item_frame(3000))


def test_a_redis_that_forgot_everything_is_told(tmp_path: Path) -> None:
    path = item_file(tmp_path / "items.parquet", 3000)
    with running_redis(tmp_path / "redis", "--appendonly", "no") as server:

        def progress(done: int, total: int, line: str) -> None:
            if done == 1000:
                server.restart()

        with closing(open_store(StoreConfig(server.url, timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS))) as store:
            options = LoadOptions(grace_seconds=0.0, batch_rows=100, watch_seconds=0.0)
            with pytest.raises(
                DataError, match="no longer known to the store: another process ended it, or the store was emptied; run"
            ):
                load_rows(store, "m", SCHEMA, path, options, progress)
            assert load_rows(store, "m", SCHEMA, path, QUICK).resumed_at == 0
            check_rows(store, 1, item_frame(3000))
