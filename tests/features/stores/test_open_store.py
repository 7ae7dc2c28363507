"""Configurations of stores: which URL opens what, what is refused, and that no password is shown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from rankd.errors import ConfigError
from rankd.features.stores.feature_store import FeatureStore
from rankd.features.stores.lmdb_store import LmdbStore
from rankd.features.stores.memory_store import MemoryStore
from rankd.features.stores.open_store import open_store
from rankd.features.stores.redis_address import address_of
from rankd.features.stores.store_config import StoreConfig, redacted


def test_the_url_decides(tmp_path: Path) -> None:
    urls = ("", "memory:", f"lmdb:{tmp_path / 'store'}")
    stores: list[FeatureStore] = [open_store(StoreConfig(url)) for url in urls]
    assert [type(store) for store in stores] == [MemoryStore, MemoryStore, LmdbStore]
    assert (tmp_path / "store" / "data.mdb").exists()
    for store in stores:
        store.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory:x", "write memory:, lmdb:"),
        ("lmdb:", "write memory:, lmdb:"),
        ("/var/store", "write memory:, lmdb:"),
        ("redis-cluster://h", r"Did you mean 'redis\+cluster'"),
        ("reddis://ada:secret@h", r"reddis://ada:\*\*\*@h.*Did you mean 'redis'"),
        ("redis:", "write redis://host"),
        ("redis://", "write redis://host"),
        ("redis://h:port", "write redis://host"),
        ("redis://h:99999", "write redis://host"),
        ("redis://h/one", "number of a database"),
        ("redis://h?ssl_cert_reqs=none", "keys of their own"),
        ("redis+cluster://h/1", "database 0 only"),
    ],
)
def test_urls_that_are_refused(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        open_store(StoreConfig(url))
    assert "secret" not in str(refused.value)


def test_addresses() -> None:
    plain = address_of(StoreConfig("redis://ada:p%40ss@[::1]:7000/3"))
    assert (plain.place, plain.db, plain.user, plain.password) == (("::1", 7000), 3, "ada", "p@ss")
    assert (plain.tls, plain.cluster, plain.shown) == (False, False, "redis://ada:***@[::1]:7000/3")
    given = address_of(StoreConfig("rediss+cluster://ada:one@h", user="bob", password="two"))
    assert (given.place, given.user, given.password) == (("h", 6379), "bob", "two")
    assert (given.tls, given.cluster) == (True, True)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory:", "memory:"),
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:secret@h", "redis://:***@h"),
        ("redis://secret@h", "redis://***@h"),
        ("redis://ada:secret@h:1/0", "redis://ada:***@h:1/0"),
        ("redis://ada:se@cr:et@h", "redis://ada:***@h"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert redacted(url) == shown


@pytest.mark.parametrize("bad", [{"timeout_ms": 0}, {"max_connections": 0}, {"map_gib": 0}, {"uri": "memory:"}])
def test_values_that_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(bad, StoreConfig)


def test_a_store_imports_only_what_it_needs() -> None:
    code = (
        "import sys\n"
        "from rankd.features.stores.open_store import open_store\n"
        "from rankd.features.stores.store_config import StoreConfig\n"
        "open_store(StoreConfig()).close()\n"
        "sys.exit(str([m for m in ('redis', 'lmdb', 'hiredis', 'uvloop', 'ssl') if m in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""


def test_memory_forgets_who_changed_longest_ago() -> None:
    store = MemoryStore(max_histories=2)
    users = [b"rankd:h:shop:%d" % number for number in range(3)]
    store.put([(b"rankd:r:x", b"1"), (b"rankd:r:y", b"2"), (b"rankd:r:z", b"3")])
    for user in (users[0], users[1], users[0], users[2]):
        store.append(user, bytes(56) + store.health().written_bytes.to_bytes(8, "little"), 5)
    assert [value is not None for value in store.get(users).result()] == [True, False, True]
    assert len([key for batch in store.keys(b"") for key in batch]) == 5
    store.delete([users[0]])
    store.append(users[1], bytes(64), 5)
    assert [value is not None for value in store.get(users).result()] == [False, True, True]
    store.close()
    assert store.get(users).result() == [None] * 3
