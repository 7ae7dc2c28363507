"""Stores to test: each kind in its own place, emptied before each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rankd.features.stores.feature_store import FeatureStore
from rankd.features.stores.lmdb_store import LmdbStore
from rankd.features.stores.memory_store import MemoryStore
from rankd.features.stores.open_store import open_store
from rankd.features.stores.store_config import StoreConfig
from tests.features.stores.redis_server import RedisServer, cluster_url, running_cluster, running_redis

PATIENT_MS = 10_000.0  # a test of what a store answers is not one of how fast it does on a busy machine


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for all tests that do not hurt it."""
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    """A cluster of two primaries."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture(params=["memory", "lmdb", "redis", "redis+cluster"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FeatureStore]:
    """An empty store of each kind."""
    made = make_store(request.param, request, tmp_path)
    yield made
    made.close()


def make_store(kind: str, request: pytest.FixtureRequest, folder: Path) -> FeatureStore:
    """An empty store of a kind."""
    if kind == "memory":
        return MemoryStore()
    if kind == "lmdb":
        return LmdbStore(folder / "lmdb", 1 << 30)
    if kind == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        server.ask("FLUSHALL")
        return open_store(StoreConfig(server.url, timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS))
    nodes: list[RedisServer] = request.getfixturevalue("redis_cluster")
    for node in nodes:
        node.ask("FLUSHALL")
    return open_store(StoreConfig(cluster_url(nodes), timeout_ms=PATIENT_MS, write_timeout_ms=PATIENT_MS))
