"""`rankd features`: filling a store from the command line, and looking into it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rankd.features.filling.loading import read_table
from rankd.features.rows.row_packing import schema_from_toml, schema_toml
from rankd.features.stores.feature_store import FeatureStore
from rankd.features.stores.lmdb_store import LmdbStore
from rankd.features.stores.store_keys import row_prefix
from tests.features.filling.small_tables import SCHEMA, all_keys, check_rows, item_file, item_frame
from tests.features.stores.redis_server import running_redis

SECRET = "hunter2 & more"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rankd", "features", *arguments]


def rankd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    return subprocess.run(command(*arguments), env=variables, capture_output=True, text=True, timeout=300)


def answer(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON object at the end."""
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def opened(folder: Path) -> FeatureStore:
    """A store that the command line fills; with its own limit, as all processes have to have the same."""
    return LmdbStore(folder, 64 << 30)


def test_load_update_and_status(tmp_path: Path) -> None:
    url, items, schema = f"lmdb:{tmp_path / 'store'}", tmp_path / "items.parquet", tmp_path / "items.toml"
    item_file(items, 3000)
    schema.write_text(schema_toml(SCHEMA))
    place = ("--store", url, "--namespace", "m")
    first = answer(rankd("load", str(items), *place, "--schema", str(schema), "--json"))
    size = 3000 * SCHEMA.row_bytes
    assert (first["rows"], first["bytes"], first["generation"], first["resumed_at"]) == (3000, size, 1, 0)
    item_frame(3100).with_columns(other=1)[2900:].write_parquet(items)
    told = rankd("load", str(items), *place, "--update")
    assert told.returncode == 0, told.stderr
    assert "not in the schema, passed over: other" in told.stdout
    assert "items of m" in told.stdout
    with closing(opened(tmp_path / "store")) as store:
        check_rows(store, 1, item_frame(3100))
    events = tmp_path / "events.parquet"
    pl.DataFrame(
        {"user_id": ["u", "v", "u"], "item_id": ["i1"] * 3, "time": [3, 2, 1], "stars": [1, 2, 3]}
    ).write_parquet(events)
    histories = ("load", str(events), *place, "--table", "histories", "--event", "view", "--json")
    first, again = answer(rankd(*histories)), answer(rankd(*histories))
    assert [first[name] for name in ("table", "users", "added", "known")] == ["histories", 2, 3, 0]
    assert [again[name] for name in ("added", "known")] == [0, 3]
    found = answer(rankd("status", "--store", url, "--histories", "--json"))
    assert found["histories"] == {"m": 2}
    (table,) = found["tables"]
    assert (table["table"], table["rows"], table["row_bytes"]) == ("items", 3100, SCHEMA.row_bytes)
    assert [column["name"] for column in table["columns"]] == ["price", "brand", "tags", "title", "vector"]
    shown = rankd("status", *place).stdout
    assert "items of m" in shown
    assert "3,100" in shown
    assert "no table is loaded" in rankd("status", "--store", url, "--namespace", "other").stdout


def test_a_guessed_schema_is_printed_and_kept(tmp_path: Path) -> None:
    url, users = f"lmdb:{tmp_path / 'store'}", tmp_path / "users.parquet"
    pl.DataFrame({"user_id": [1, 2], "age": [3, 4], "tags": [["a", "b"], []]}).write_parquet(users)
    load = ("load", str(users), "--store", url, "--namespace", "m", "--table", "users", "--grace", "0")
    told = rankd(*load)
    assert told.returncode == 0, told.stderr
    printed = told.stdout[: told.stdout.index("\n\n")]
    kept = tmp_path / "users.toml"
    kept.write_text(printed)
    assert [column.width for column in schema_from_toml(kept).columns] == [1, 2]
    pl.DataFrame({"user_id": [1, 2], "age": [3, 4], "tags": [["a", "b", "c"], []]}).write_parquet(users)
    again = answer(rankd(*load, "--json"))
    assert (again["generation"], again["schema_version"], again["guessed_schema"]) == (2, 1, "")
    kept.write_text(printed.replace("width = 2", "width = 3"))
    refused = rankd(*load, "--schema", str(kept))
    assert refused.returncode == 2
    assert "raise version to 2" in refused.stderr


def test_a_load_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    rows, folder = 100_000, tmp_path / "store"
    items, schema = item_file(tmp_path / "items.parquet", rows), tmp_path / "items.toml"
    schema.write_text(schema_toml(SCHEMA))
    load = command(
        "load", str(items), "--store", f"lmdb:{folder}", "--namespace", "m", "--schema", str(schema), "--json"
    )
    with closing(opened(folder)) as store:
        process = subprocess.Popen(load, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while (loading := read_table(store, "m", "items").loading) is None or loading.rows_done == 0:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        left = read_table(store, "m", "items")
        assert left.loading is not None
        assert (left.generation, 0 < left.loading.rows_done < rows) == (0, True)
        under_way = answer(rankd("status", "--store", f"lmdb:{folder}", "--json"))["tables"][0]["loading"]
        assert under_way["rows_done"] == left.loading.rows_done
        report = answer(subprocess.run(load, capture_output=True, text=True, timeout=300))
        assert report["resumed_at"] == left.loading.rows_done
        assert (report["rows"], report["generation"]) == (rows, 1)
        check_rows(store, 1, item_frame(rows))
        assert all_keys(store, b"rankd:r:") == all_keys(store, row_prefix("m", "items", 1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--store", "memory:"), "forgets everything when this command ends"),
        (("--store", "redsi://x"), "Did you mean 'redis'"),
        (("--schema", "nowhere.toml"), "nowhere.toml: No such file"),
        (("--schema", "items.toml", "--table", "users"), "is the schema of table 'items', and --table says 'users'"),
        (("--event", "view"), "--event goes with tables of histories only"),
        (("--table", "histories", "--update"), "--update goes with tables of items and users only"),
        (("--table", "histories"), "column 'user_id' is missing"),
        (("--table", "users"), "column 'user_id', which holds the ids, is missing"),
        (("--namespace", "a:b"), "namespace 'a:b' cannot be used"),
        (("--password-file", "nowhere"), "--password-file nowhere: cannot be read"),
        (("--update",), "has no rows to update"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    items = item_file(tmp_path / "items.parquet", 10)
    (tmp_path / "items.toml").write_text(schema_toml(SCHEMA))
    given = [str(tmp_path / one) if one == "items.toml" else one for one in arguments]
    result = rankd("load", str(items), "--store", f"lmdb:{tmp_path / 'store'}", "--namespace", "m", *given, "--json")
    assert result.returncode == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_password_is_read_and_never_shown(tmp_path: Path) -> None:
    items, secret = item_file(tmp_path / "items.parquet", 1000), tmp_path / "password"
    secret.write_text(SECRET + "\n")
    with running_redis(tmp_path / "redis", password=SECRET) as server:
        place = ("--store", server.url, "--namespace", "m")
        load = ("load", str(items), *place, "--grace", "0", "--patience", "1", "--json")
        named = {"RANKD_FEATURES__STORE__PASSWORD": SECRET}
        results = [
            rankd(*load, **named),
            rankd(*load, "--password-file", str(secret)),
            rankd("status", *place, "--json", **named),
        ]
        assert [answer(one).get("generation") for one in results[:2]] == [1, 2]
        assert answer(results[2])["tables"][0]["rows"] == 1000
        wrong = rankd(*load, RANKD_FEATURES__STORE__PASSWORD="wrong" + SECRET)
        results.append(wrong)
        assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
        results.append(rankd(*load, RANKD_FEATURES__STORE__PASWORD=SECRET))
        assert "unknown key 'pasword'" in results[-1].stderr
    assert not any(SECRET in one.stdout + one.stderr for one in results)
