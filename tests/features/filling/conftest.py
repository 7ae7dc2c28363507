"""An empty store of each kind, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from rankd.features.stores.feature_store import FeatureStore
from tests.features.stores.conftest import make_store
from tests.features.stores.redis_server import RedisServer, running_cluster, running_redis


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """For `make_store`."""
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    """For `make_store`."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture(params=["memory", "lmdb", "redis", "redis+cluster"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FeatureStore]:
    """An empty store of each kind."""
    with closing(make_store(request.param, request, tmp_path)) as made:
        yield made
