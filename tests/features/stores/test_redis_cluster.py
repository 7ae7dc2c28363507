"""A cluster whose slots move and whose servers fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot

from rankd.features.stores.feature_store import FeatureStore, StoreFailure, Trouble
from rankd.features.stores.open_store import open_store
from rankd.features.stores.store_config import StoreConfig
from rankd.features.stores.store_keys import history_key
from tests.features.stores.conftest import PATIENT_MS
from tests.features.stores.event_samples import identities, records
from tests.features.stores.redis_server import RedisServer, cluster_url, eventually, running_cluster

KEYS = [b"rankd:r:shop:items:1:%d" % number for number in range(300)]
FIRST_HALF = [key for key in KEYS if key_slot(key) < 8192]
USER = next(user for user in (history_key("shop", str(number)) for number in range(99)) if key_slot(user) < 8192)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[RedisServer]]:
    """A cluster that a test may hurt."""
    with running_cluster(tmp_path) as started:
        yield started


@pytest.fixture
def store(nodes: list[RedisServer]) -> Iterator[FeatureStore]:
    """A store in it, with a row at each of KEYS."""
    opened = open_store(StoreConfig(cluster_url(nodes), timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS))
    opened.put([(key, key) for key in KEYS]).result()
    yield opened
    opened.close()


def begin_move(source: RedisServer, target: RedisServer, slot: int) -> None:
    """A slot is about to move; its keys have gone already, so that the source answers ASK."""
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.ask("CLUSTER", "MYID"))
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target.ask("CLUSTER", "MYID"))
    for key in source.ask("CLUSTER", "GETKEYSINSLOT", slot, 1000):
        source.ask("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)


def end_move(source: RedisServer, target: RedisServer, slot: int) -> None:
    """The slot has moved: the source answers MOVED."""
    for node in (target, source):
        node.ask("CLUSTER", "SETSLOT", slot, "NODE", target.ask("CLUSTER", "MYID"))


def test_slots_that_move(nodes: list[RedisServer], store: FeatureStore) -> None:
    header = store.append(USER, records(1), 50).result()
    identity = 1
    for step in (begin_move, end_move):
        for key in (*FIRST_HALF[:5], USER):  # to the server whose word counts more, so that the two never disagree
            step(nodes[0], nodes[1], key_slot(key))
        assert store.get([*KEYS, b"none"]).result() == [*KEYS, None]
        assert store.history(USER, header).result().changed is False
        identity += 1
        header = store.append(USER, records(identity), 50).result()
        assert identities(store.history(USER).result().record) == list(range(1, identity + 1))
        moving, staying = FIRST_HALF[0], FIRST_HALF[20]
        store.put([(moving, b"new"), (staying, b"new")]).result()
        assert store.get([staying, moving]).result() == [b"new", b"new"]
        store.delete([b"none", moving]).result()
        assert store.get([moving, staying]).result() == [None, b"new"]
        store.put([(key, key) for key in KEYS]).result()
    assert sorted(key for batch in store.keys(b"rankd:r:") for key in batch) == sorted(KEYS)
    assert store.health().up
    assert store.health().failures == {}


def test_a_server_that_is_lost_and_comes_back(nodes: list[RedisServer], store: FeatureStore) -> None:
    nodes[1].kill()  # the one that the URL names

    def fails() -> bool:
        return isinstance(store.get(KEYS).exception(), StoreFailure)

    eventually(fails, "the loss is noticed")
    eventually(lambda: store.get(KEYS).done(), "nobody waits")
    assert store.health().trouble is Trouble.DOWN
    nodes[1].start()
    eventually(lambda: not fails(), "the store works again")
    assert store.get(KEYS).result() == KEYS
    assert store.health().recoveries >= 1


def test_a_server_that_is_not_of_a_cluster(redis_server: RedisServer) -> None:
    store = open_store(StoreConfig(redis_server.url.replace("redis:", "redis+cluster:"), timeout_ms=PATIENT_MS))
    with pytest.raises(StoreFailure, match="cluster support disabled") as failed:
        store.get([b"a"]).result()
    assert failed.value.trouble is Trouble.BROKEN
    store.close()


def test_a_server_of_a_cluster_asked_as_if_it_were_alone(redis_cluster: list[RedisServer]) -> None:
    store = open_store(StoreConfig(redis_cluster[0].url, timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS))
    for asked in (store.get(KEYS), store.put([(key, key) for key in KEYS])):
        with pytest.raises(StoreFailure, match=r"write redis\+cluster"):
            asked.result()
    store.close()


def test_appends_anywhere_are_heard(redis_cluster: list[RedisServer]) -> None:
    store = open_store(StoreConfig(cluster_url(redis_cluster), timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS))
    heard: list[Any] = []
    store.listen(lambda key, new: heard.append((key, new)))
    eventually(store.listening, "it listens")
    users = [history_key("shop", str(number)) for number in range(20)]
    store.delete(users).result()
    for number, user in enumerate(users):
        store.append(user, records(number + 1), 5).result()
    eventually(lambda: len(heard) >= len(users), "all are heard")
    assert sorted(heard) == sorted((user, records(number + 1)) for number, user in enumerate(users))
    store.close()
