"""A real Redis is killed, restarted, frozen, made slow, filled up, locked, rewritten and made to evict under a server
that goes on answering: inside the deadline, from fresh, stale or default rows, the degradation named."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import httpx
import numpy as np
import polars as pl
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rankd import Client, Event, Ranker, RankRequest, Scores
from rankd.errors import StoreFailure
from rankd.features.feature_config import Mode
from rankd.features.rows.row_schema import ColumnKind, RowColumn, RowSchema
from rankd.features.stores.open_store import open_store
from rankd.features.stores.store_config import StoreConfig
from rankd.features.stores.store_keys import row_key, row_prefix
from rankd.serve.lifecycle import Server
from rankd.types import RowCounts
from tests.features.stores.redis_server import RedisServer, eventually, running_redis
from tests.serve.filled_store import SCHEMA, features, fill, filled, item_frame, serving

TIMEOUT_MS = 5000.0
CLOSE = 1e-5


class Subject:
    """A server over a Redis, and what its scores should be: with the store's rows, and with the artifact's alone."""

    def __init__(self, server: Server, redis: RedisServer, fresh: Ranker, plain: Ranker, path: Path) -> None:
        self.server, self.redis, self.path = server, redis, path
        self._fresh, self._plain = fresh, plain
        self.items = plain.catalogue.ids.items
        self.user = plain.catalogue.ids.users[3]
        self.client = Client(server.url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def ask(self, first: int, last: int) -> Scores:
        """Rank items first to last, within TIMEOUT_MS."""
        return self.client.rank(self.request(first, last))

    def request(self, first: int, last: int) -> RankRequest:
        return RankRequest(self.user, self.items[first:last], timeout_ms=TIMEOUT_MS)

    def is_fresh(self, answer: Scores, first: int, last: int) -> bool:
        """Whether an answer is that of the store's rows."""
        return bool(np.allclose(answer.scores, self._fresh.rank(self.request(first, last)).scores, atol=CLOSE))

    def is_default(self, answer: Scores, first: int, last: int) -> bool:
        """Whether an answer is that of the artifact's own rows."""
        return bool(np.allclose(answer.scores, self._plain.rank(self.request(first, last)).scores, atol=CLOSE))

    def recovered(self, first: int, last: int) -> bool:
        """Whether the server answers as if nothing had been."""
        answer = self.ask(first, last)
        return answer.degraded == () and self.is_fresh(answer, first, last)

    def metric(self, name: str, **labels: str) -> float:
        """A figure of /metrics."""
        text = httpx.get(f"{self.server.url}/metrics").text
        wanted = {"namespace": "demo", **labels}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and wanted.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def subject(redis: RedisServer, demo_models: Path, demo_ranker: Ranker, tmp_path: Path) -> Iterator[Subject]:
    with (
        filled(redis, demo_ranker, tmp_path) as (path, fresh),
        serving(demo_models, features(redis.url)) as server,
        Subject(server, redis, fresh, demo_ranker, path) as made,
    ):
        yield made


def test_rows_of_the_store_are_what_is_ranked(subject: Subject) -> None:
    """The store's rows give the scores that the same features give by way of a file (`features.parquet`)."""
    answer = subject.ask(0, 100)
    assert answer.degraded == ()
    assert subject.is_fresh(answer, 0, 100)
    assert not subject.is_default(answer, 0, 100)
    counts = answer.rows["items"]
    assert (counts.fresh, counts.stale, counts.default, counts.absent) == (100, 0, 0, 0)
    unknown = subject.client.rank(RankRequest(subject.user, ("nothing of ours", subject.items[0])))
    assert unknown.rows["items"].fresh == 1
    fetched = subject.metric("rankd_feature_fetched_rows_total", table="items")
    subject.ask(0, 100)
    assert subject.metric("rankd_feature_fetched_rows_total", table="items") == fetched  # all from the cache


def test_killed_and_restarted(subject: Subject) -> None:
    subject.ask(0, 20)
    subject.redis.kill()
    eventually(lambda: subject.ask(0, 20).degraded, "the loss is noticed")
    known, new = subject.ask(0, 20), subject.ask(20, 40)
    assert subject.is_fresh(known, 0, 20)  # no new row was needed
    assert known.rows["items"].fresh == 20
    assert "items_default" not in known.degraded
    assert subject.is_default(new, 20, 40)
    assert {"items_default", "store_down"} <= set(new.degraded)
    assert new.rows["items"].default == 20
    with pytest.raises(StoreFailure):
        subject.client.append_events(subject.user, (Event(subject.items[0], "click"),))
    assert subject.metric("rankd_store_up") == 0
    subject.redis.start()
    eventually(lambda: subject.recovered(20, 40), "recovery")
    assert subject.metric("rankd_store_up") == 1
    assert subject.metric("rankd_store_recoveries_total") >= 1
    assert subject.metric("rankd_store_failures_total", trouble="down") >= 1
    stored, _ = subject.client.append_events("a newcomer", (Event(subject.items[0], "click"),))
    assert stored == 1


def test_frozen_and_thawed(subject: Subject) -> None:
    subject.ask(0, 20)
    subject.redis.freeze()
    try:
        for first in (20, 40, 60, 80):
            answer = subject.ask(first, first + 20)  # in time, or this raises DeadlineExceeded
            assert subject.is_default(answer, first, first + 20)
            assert "items_default" in answer.degraded
        eventually(lambda: "store_timeout" in subject.ask(20, 40).degraded, "the trouble is named")
        assert subject.is_fresh(subject.ask(0, 20), 0, 20)
        assert subject.metric("rankd_store_up") == 0
    finally:
        subject.redis.thaw()
    eventually(lambda: subject.recovered(20, 40), "recovery")


def test_stale_rows_are_better_than_none(
    redis: RedisServer, demo_models: Path, demo_ranker: Ranker, tmp_path: Path
) -> None:
    with (
        filled(redis, demo_ranker, tmp_path) as (path, fresh),
        serving(demo_models, features(redis.url, ttl_seconds=0.05)) as server,
        Subject(server, redis, fresh, demo_ranker, path) as subject,
    ):
        assert subject.is_fresh(subject.ask(0, 20), 0, 20)
        redis.kill()
        answer = eventually(
            lambda: (a := subject.ask(0, 20)).rows["items"].stale == 20 and a, "rows of a store that is gone are stale"
        )
        assert subject.is_fresh(answer, 0, 20)
        assert "items_stale" in answer.degraded
        assert "items_default" not in answer.degraded


def test_slow(subject: Subject) -> None:
    """Answers that come after the wait is over are not waited for, and are there for the next request."""
    subject.redis.ask("CLIENT", "PAUSE", 1500, "ALL")
    answer = subject.ask(0, 20)
    assert subject.is_default(answer, 0, 20)
    assert "items_default" in answer.degraded
    eventually(lambda: subject.recovered(0, 20), "recovery")


def test_full(subject: Subject) -> None:
    """A full store takes no events and says so; it is read as ever."""
    subject.redis.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    subject.redis.ask("CONFIG", "SET", "maxmemory", 1)
    with pytest.raises(StoreFailure, match="memory"):
        subject.client.append_events("full", (Event(subject.items[0], "click"),))
    assert subject.metric("rankd_store_failures_total", trouble="full") >= 1
    assert subject.recovered(0, 20)
    subject.redis.ask("CONFIG", "SET", "maxmemory", 0)
    assert subject.client.append_events("full", (Event(subject.items[0], "click"),))[0] == 1


def test_wrong_password_then_the_right_one(demo_models: Path, demo_ranker: Ranker, tmp_path: Path) -> None:
    with running_redis(tmp_path / "redis", password="right") as redis:
        path = tmp_path / "items.parquet"
        item_frame(demo_ranker).write_parquet(path)
        fill(redis.url, path, password="right")
        with (
            Ranker.load(demo_ranker.artifact.path, items=path) as fresh,
            serving(demo_models, features(redis.url, password="a stale secret")) as server,  # it starts all the same
            Subject(server, redis, fresh, demo_ranker, path) as subject,
        ):
            answer = subject.ask(0, 20)
            assert subject.is_default(answer, 0, 20)
            assert "store_denied" in answer.degraded
            with pytest.raises(StoreFailure):
                subject.client.append_events("u", (Event(subject.items[0], "click"),))
            assert "a stale secret" not in httpx.get(f"{server.url}/metrics").text
            redis.ask("CONFIG", "SET", "requirepass", "a stale secret")
            eventually(lambda: subject.recovered(0, 20), "the password is right now")


def test_rows_of_another_schema_are_not_read(subject: Subject) -> None:
    other = RowSchema("items", "item_id", (RowColumn("minutes", ColumnKind.NUMERIC),), version=2)
    store = open_store(StoreConfig(url=subject.redis.url))
    prefix = row_prefix("demo", "items", 1)
    wrong_mark, wrong_size = b"\1" * SCHEMA.row_bytes, b"\1" * 9
    values = [wrong_mark if number % 2 else wrong_size for number in range(20)]
    store.put([(row_key(prefix, item), value) for item, value in zip(subject.items, values, strict=False)]).result()
    answer = subject.ask(0, 20)
    assert subject.is_default(answer, 0, 20)
    assert answer.rows["items"].wrong_schema == 20
    assert "items_default" in answer.degraded
    assert subject.recovered(20, 40)
    store.close()
    pl.read_parquet(subject.path).select("item_id", "minutes").write_parquet(subject.path)
    fill(subject.redis.url, subject.path, other)  # a new schema, loaded as it should be: the server follows

    def follows() -> bool:
        answer = subject.ask(0, 20)
        return answer.degraded == () and answer.rows.get("items", RowCounts()).fresh == 20

    eventually(follows, "the new schema is read")
    assert subject.metric("rankd_feature_generation", table="items") == 2


def test_evicting(subject: Subject) -> None:
    """Rows that were thrown away are answered by default and named; events are not taken, as they might be too."""
    subject.redis.ask("CONFIG", "SET", "maxmemory", "100mb")
    subject.redis.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    eventually(lambda: subject.metric("rankd_store_trouble", trouble="evicting") == 1, "the policy is noticed")
    for item in subject.items[:20]:
        subject.redis.ask("DEL", row_key(row_prefix("demo", "items", 1), item))
    answer = subject.ask(0, 20)
    assert subject.is_default(answer, 0, 20)
    assert answer.rows["items"].absent == 20
    assert "store_evicting" in answer.degraded
    with pytest.raises(StoreFailure, match="noeviction"):
        subject.client.append_events("u", (Event(subject.items[0], "click"),))
    subject.redis.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    eventually(lambda: subject.metric("rankd_store_trouble", trouble="evicting") == 0, "the policy is noticed")
    assert subject.client.append_events("u", (Event(subject.items[0], "click"),))[0] == 1


@pytest.mark.parametrize("mode", list(Mode))
def test_no_request_fails_while_the_store_comes_and_goes(
    mode: Mode, redis: RedisServer, demo_models: Path, demo_ranker: Ranker, tmp_path: Path
) -> None:
    """Four clients ask without a pause while Redis is killed, restarted, frozen and thawed."""
    with (
        filled(redis, demo_ranker, tmp_path) as (path, fresh),
        serving(demo_models, features(redis.url, mode, ttl_seconds=0.2)) as server,
        Subject(server, redis, fresh, demo_ranker, path) as subject,
    ):
        eventually(lambda: subject.recovered(0, 20), "rows have come")
        over, failures, answered = threading.Event(), [], [0] * 4

        def live(number: int) -> None:
            random = np.random.default_rng(number)
            with Client(server.url) as client:
                while not over.is_set():
                    first = int(random.integers(0, 500))
                    try:
                        answer = client.rank(subject.request(first, first + 30))
                        counts = answer.rows["items"]
                        assert counts.fresh + counts.stale + counts.default + counts.absent == 30
                        answered[number] += 1
                    except Exception as error:  # noqa: BLE001 - whatever it is, the test names it
                        failures.append(error)
                        return

        threads = [threading.Thread(target=live, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(2):
                redis.freeze()
                time.sleep(0.7)
                redis.thaw()
                time.sleep(0.3)
                redis.kill()
                time.sleep(0.5)
                redis.start()
                time.sleep(0.5)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert failures == []
        assert min(answered) > 10
        eventually(lambda: subject.recovered(20, 40), "recovery")
