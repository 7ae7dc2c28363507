"""The store in Redis while Redis misbehaves: every Future ends in time, and what was lost is found again."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rankd.features.stores import redis_health
from rankd.features.stores.event_records import HEADER_BYTES
from rankd.features.stores.feature_store import FeatureStore, HistoryRead, StoreFailure, Trouble
from rankd.features.stores.open_store import open_store
from rankd.features.stores.store_config import StoreConfig
from rankd.features.stores.store_keys import history_key
from tests.features.stores.conftest import PATIENT_MS
from tests.features.stores.event_samples import identities, records
from tests.features.stores.redis_server import RedisServer, eventually
from tests.free_ports import free_port

USER = history_key("shop", "ada")
TIMEOUT_MS = 150.0
SLACK_S = 2.0  # of a machine that does other things as well
Opener = Callable[..., FeatureStore]


@pytest.fixture
def opened() -> Iterator[Opener]:
    """Opens stores that are closed in the end."""
    stores: list[FeatureStore] = []

    def open_one(server: RedisServer, **options: Any) -> FeatureStore:
        config = StoreConfig(server.url, timeout_ms=TIMEOUT_MS, write_timeout_ms=3 * TIMEOUT_MS)
        stores.append(open_store(msgspec.structs.replace(config, **options)))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that a test may hurt; not started."""
    made = RedisServer(tmp_path / "redis")
    yield made
    made.close()


def trouble_of(future: Future[Any]) -> Trouble | None:
    """What a Future failed with, if it did. It ends in time."""
    error = future.exception(timeout=3 * TIMEOUT_MS / 1e3 + SLACK_S)
    assert error is None or isinstance(error, StoreFailure)
    return None if error is None else error.trouble


def is_up(store: FeatureStore) -> bool:
    """Whether it says so and answers."""
    return store.health().up and trouble_of(store.get([b"a"])) is None


def is_denied(store: FeatureStore) -> bool:
    """Whether it says that it is not let in."""
    return store.health().trouble is Trouble.DENIED


def refuses_at_once(store: FeatureStore) -> bool:
    """Whether nobody waits for it."""
    return store.get([b"a"]).done()


def test_down_at_start(server: RedisServer, opened: Opener) -> None:
    server.port = free_port()
    started = time.monotonic()
    store = opened(server)
    assert time.monotonic() - started < SLACK_S
    assert trouble_of(store.get([b"a"])) is Trouble.DOWN
    assert trouble_of(store.append(USER, records(1), 5)) is Trouble.DOWN
    assert refuses_at_once(store)
    with pytest.raises(StoreFailure, match="not asked until it answers"):
        list(store.keys(b""))
    assert (store.health().up, store.health().trouble) == (False, Trouble.DOWN)
    server.start()
    eventually(lambda: is_up(store), "the store finds Redis")
    assert store.health().recoveries == 1
    assert store.append(USER, records(1), 5).result()
    assert store.health().failures["down"] >= 4


def test_the_first_question_waits_for_the_connection(redis_server: RedisServer, opened: Opener) -> None:
    store = opened(redis_server, timeout_ms=PATIENT_MS)
    assert store.get([b"none"]).result() == [None]
    assert store.health().recoveries == 0


def test_killed_and_restarted(server: RedisServer, opened: Opener) -> None:
    store = opened(server.start(), timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS)
    store.put([(b"a", b"1")]).result()
    header = store.append(USER, records(1, 2), 5).result()
    server.kill()
    assert eventually(lambda: trouble_of(store.get([b"a"])), "the loss is noticed") is Trouble.DOWN
    assert refuses_at_once(store)
    assert not store.health().up
    server.start()
    eventually(lambda: is_up(store), "the store finds Redis again")
    assert store.get([b"a"]).result() == [b"1"]
    assert store.history(USER, header).result() == HistoryRead(changed=False)
    assert store.append(USER, records(2, 3), 5).result() != header  # a script that the new server does not know
    assert store.health().recoveries >= 1


def test_frozen(server: RedisServer, opened: Opener) -> None:
    store = opened(server.start())
    eventually(lambda: is_up(store), "the store is up")
    server.freeze()
    started = time.monotonic()
    assert trouble_of(store.get([b"a"])) is Trouble.TIMEOUT
    assert trouble_of(store.append(USER, records(1), 5)) is Trouble.TIMEOUT
    assert time.monotonic() - started < 4 * TIMEOUT_MS / 1e3 + SLACK_S
    assert refuses_at_once(store)
    assert trouble_of(store.get([b"a"])) is Trouble.TIMEOUT
    assert trouble_of(store.append(USER, records(1), 5)) is Trouble.TIMEOUT
    assert (store.health().up, store.health().trouble) == (False, Trouble.TIMEOUT)
    assert store.health().failures["timeout"] >= 4
    server.thaw()
    eventually(lambda: is_up(store), "the store is up again")
    eventually(lambda: trouble_of(store.append(USER, records(1), 5)) is None, "an append works")
    assert identities(store.history(USER).result().record) == [
        1
    ]  # the one that timed out was done all the same, or not


def test_many_questions_to_a_frozen_server_end_in_time(server: RedisServer, opened: Opener) -> None:
    store = opened(server.start(), max_connections=2)
    eventually(lambda: is_up(store), "the store is up")
    server.freeze()
    futures = [store.get([b"a"]) for _ in range(200)]
    _, late = wait_for(futures, timeout=TIMEOUT_MS / 1e3 + SLACK_S)
    assert not late
    assert {trouble_of(future) for future in futures} == {Trouble.TIMEOUT}
    server.thaw()
    eventually(lambda: is_up(store), "the store is up again")
    assert [future.result() for future in [store.get([b"none"]) for _ in range(20)]] == [[None]] * 20


def test_more_questions_than_connections(redis_server: RedisServer, opened: Opener) -> None:
    store = opened(redis_server, timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS, max_connections=1)
    store.put([(b"a", bytes(100_000))]).result()
    futures = [store.get([b"a"]) for _ in range(300)]
    assert all(future.result() == [bytes(100_000)] for future in futures)


def test_a_question_that_is_cancelled_hurts_no_other(redis_server: RedisServer, opened: Opener) -> None:
    store = opened(redis_server, timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS, max_connections=2)
    keys = [b"k%d" % number for number in range(200)]
    store.put([(key, key) for key in keys]).result()
    for key in keys:
        futures = [store.get([key]) for _ in range(4)]
        for future in futures[:3]:
            future.cancel()
        assert futures[3].result() == [key]
    assert store.health().up


def test_connections_that_the_server_ends(redis_server: RedisServer, opened: Opener) -> None:
    store = opened(redis_server)
    eventually(lambda: is_up(store), "the store is up")
    redis_server.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    eventually(lambda: all(is_up(store) for _ in range(40)), "the store is up again")


def test_a_wrong_password_and_then_the_right_one(tmp_path: Path, opened: Opener) -> None:
    server = RedisServer(tmp_path, password="right")
    try:
        server.start()
        wrong, none, right = opened(server, password="wrong"), opened(server), opened(server, password="right")
        for store in (wrong, none):
            eventually(partial(is_denied, store), "it is noticed")
            assert refuses_at_once(store)
            assert trouble_of(store.get([b"a"])) is Trouble.DENIED
        with pytest.raises(StoreFailure, match="set user and password") as failed:
            wrong.get([b"a"]).result()
        assert "wrong@" not in str(failed.value)
        eventually(lambda: is_up(right), "the right one works")
        server.ask("CONFIG", "SET", "requirepass", "wrong")
        server.password = "wrong"
        eventually(lambda: is_up(wrong), "the wrong one is the right one now")
    finally:
        server.close()


def test_a_full_server_still_answers(server: RedisServer, opened: Opener) -> None:
    store = opened(server.start(), timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS)
    header = store.append(USER, records(1), 5).result()
    store.put([(b"a", b"1"), (b"b", b"2")]).result()
    server.ask("CONFIG", "SET", "maxmemory", 1)
    with pytest.raises(StoreFailure, match="raise its maxmemory") as failed:
        store.put([(b"c", b"3")]).result()
    assert failed.value.trouble is Trouble.FULL
    assert trouble_of(store.append(USER, records(2), 5)) is Trouble.FULL
    assert trouble_of(store.exchange(b"meta", None, b"1")) is Trouble.FULL
    assert store.get([b"a", b"c"]).result() == [b"1", None]
    assert store.history(USER, header).result() == HistoryRead(changed=False)
    store.delete([b"b"]).result()
    assert store.health().up
    assert store.health().failures == {"full": 3}
    server.ask("CONFIG", "SET", "maxmemory", 0)
    store.append(USER, records(2), 5).result()
    assert identities(store.history(USER).result().record) == [1, 2]


def test_a_server_that_evicts_takes_no_events(tmp_path: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_health, "LOOK_EVERY_S", 0.05)
    server = RedisServer(tmp_path, "--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru")
    try:
        store = opened(server.start())
        eventually(lambda: is_up(store), "the store is up")
        assert trouble_of(store.append(USER, records(1), 5)) is Trouble.EVICTING
        with pytest.raises(StoreFailure, match="set it to noeviction"):
            store.append(USER, records(1), 5).result()
        assert (store.health().up, store.health().trouble) == (True, Trouble.EVICTING)
        store.put([(b"a", b"1")]).result()
        assert store.get([b"a"]).result() == [b"1"]
        server.ask("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
        eventually(lambda: trouble_of(store.append(USER, records(1), 5)) is None, "the change is noticed")
        assert store.health().trouble is None
        server.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lfu")
        eventually(lambda: store.health().trouble is Trouble.EVICTING, "the change back too")
        server.ask("CONFIG", "SET", "maxmemory", "0")
        eventually(lambda: store.health().trouble is None, "without a limit nothing is evicted")
    finally:
        server.close()


def test_another_type_of_value(redis_server: RedisServer, opened: Opener) -> None:
    store = opened(redis_server, timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS)
    redis_server.ask("DEL", USER)
    redis_server.ask("LPUSH", USER, "x")
    for future in (store.history(USER), store.append(USER, records(1), 5), store.exchange(USER, None, b"1")):
        assert trouble_of(future) is Trouble.BROKEN
    assert store.get([USER]).result() == [None]
    assert store.health().up
    redis_server.ask("DEL", USER)


def test_a_user_without_rights(redis_server: RedisServer, opened: Opener) -> None:
    redis_server.ask("ACL", "SETUSER", "reader", "on", ">secret", "~rankd:*", "+@read", "+ping", "+info")
    store = opened(redis_server, user="reader", password="secret", timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS)
    assert store.get([b"rankd:r:x"]).result() == [None]
    with pytest.raises(StoreFailure, match=r"rankd:\*") as failed:
        store.put([(b"rankd:r:x", b"1")]).result()
    assert failed.value.trouble is Trouble.DENIED
    assert trouble_of(store.get([b"other"])) is Trouble.DENIED
    assert store.health().up


def test_scripts_that_the_server_forgot(redis_server: RedisServer, opened: Opener) -> None:
    store = opened(redis_server, timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS)
    redis_server.ask("DEL", USER)
    for identity in (1, 2):
        redis_server.ask("SCRIPT", "FLUSH")
        store.append(USER, records(identity), 5).result()
        redis_server.ask("SCRIPT", "FLUSH")
        assert identities(store.history(USER).result().record)[-1] == identity


def test_closed(server: RedisServer, opened: Opener) -> None:
    before = threading.active_count()
    store = opened(server.start())
    eventually(lambda: is_up(store), "the store is up")
    server.freeze()
    asked: list[Future[Any]] = [store.get([b"a"]), store.append(USER, records(1), 5)]
    started = time.monotonic()
    store.close()
    assert time.monotonic() - started < 2 * 3 * TIMEOUT_MS / 1e3 + SLACK_S
    assert all(future.done() for future in asked)
    assert trouble_of(store.get([b"a"])) is not None
    assert trouble_of(store.append(USER, records(1), 5)) is not None
    with pytest.raises(StoreFailure):
        list(store.keys(b""))
    store.close()
    server.thaw()
    assert threading.active_count() == before


FORK = """
import os, sys
from rankd.features.stores.feature_store import StoreFailure
from rankd.features.stores.open_store import open_store
from rankd.features.stores.store_config import StoreConfig
store = open_store(StoreConfig(sys.argv[1], timeout_ms=10_000))
store.get([b"a"]).result()
child = os.fork()
if child == 0:
    failed = store.get([b"a"]).exception(timeout=10)
    store.close()
    os._exit(0 if isinstance(failed, StoreFailure) else 1)
_, status = os.waitpid(child, 0)
assert store.get([b"none"]).result() == [None]
store.close()
sys.exit(status)
"""


def test_a_forked_process_is_refused(redis_server: RedisServer) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, redis_server.url], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_appends_are_heard(redis_server: RedisServer, opened: Opener) -> None:
    options = {"timeout_ms": PATIENT_MS, "write_timeout_ms": PATIENT_MS}
    store, other = opened(redis_server, **options), opened(redis_server, **options)
    redis_server.ask("DEL", USER)
    heard: list[tuple[bytes, bytes]] = []

    def hear(key: bytes, new: bytes) -> None:
        heard.append((key, new))
        raise ValueError("what is made of it must not matter")

    assert store.listening() == 0
    store.listen(hear)
    number = eventually(store.listening, "it listens")
    other.append(USER, records(1, 2), 5).result()
    other.append(USER, records(2), 5).result()
    store.append(USER, records(2, 3), 5).result()
    redis_server.ask("PUBLISH", "rankd:appended", "x")
    eventually(lambda: len(heard) >= 2, "they are heard")
    assert heard == [(USER, records(1, 2)), (USER, records(3))]
    assert store.listening() == number


def test_a_subscription_that_broke_has_another_number(server: RedisServer, opened: Opener) -> None:
    store = opened(server.start())
    heard = threading.Event()
    store.listen(lambda key, new: heard.set())
    first = eventually(store.listening, "it listens")
    server.kill()
    eventually(lambda: store.listening() == 0, "the loss is noticed")
    server.start()
    second = eventually(store.listening, "it listens again")
    assert second != first
    eventually(lambda: trouble_of(store.append(USER, records(1), 5)) is None, "an append works")
    assert heard.wait(SLACK_S)
    server.freeze()
    eventually(lambda: store.listening() == 0, "silence is noticed")
    server.thaw()
    eventually(store.listening, "it listens again")


def test_unchanged_histories_do_not_travel(redis_server: RedisServer, opened: Opener) -> None:
    store = opened(redis_server, timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS)
    redis_server.ask("DEL", USER)
    header = store.append(USER, records(*range(1, 400)), 1000).result()
    assert len(header) == HEADER_BYTES
    sent = redis_server.ask("INFO", "stats")["total_net_output_bytes"]
    for _ in range(10):
        assert store.history(USER, header).result() == HistoryRead(changed=False)
    after = redis_server.ask("INFO", "stats")["total_net_output_bytes"]
    assert after - sent < 20_000
    assert store.health().read_bytes == 0
