"""Events that were acknowledged: seen by the user's next request from any server, and never lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from rankd import Client, Event, Ranker, RankRequest
from rankd.features.feature_config import FeatureConfig, Mode
from rankd.features.stores.store_config import StoreConfig
from rankd.serve.lifecycle import Server
from tests.features.stores.redis_server import RedisServer, eventually, running_redis
from tests.serve.filled_store import features, serving


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path / "redis") as server:
        yield server


def stored(server: Server, user: str) -> int:
    """How many events of a user a server ranks with."""
    return len(server.repository.get().features.stored_history(user) or ())


def post(server: Server, user: str, item: str) -> httpx.Response:
    body = {"user_id": user, "events": [{"item_id": item, "event": "click"}]}
    return httpx.post(f"{server.url}/v1/events", json=body, timeout=20)


@pytest.mark.parametrize("kind", ["redis", "lmdb"])
def test_the_next_request_to_another_server_sees_an_event(
    kind: str, redis: RedisServer, demo_models: Path, demo_ranker: Ranker, tmp_path: Path
) -> None:
    """Whoever ranks next, here the other server each time, ranks with the event, as one with all of them at once."""
    config = features(redis.url) if kind == "redis" else FeatureConfig(StoreConfig(url=f"lmdb:{tmp_path / 'store'}"))
    items = demo_ranker.catalogue.ids.items
    with serving(demo_models, config) as one, serving(demo_models, config) as two:
        pair = [(Client(one.url), Client(two.url)), (Client(two.url), Client(one.url))]
        request = RankRequest("somebody new", items[:20])
        before = None
        for number in range(20):
            writer, reader = pair[number % 2]
            writer.append_events("somebody new", (Event(items[number % 7], "click"),))
            answer = reader.rank(request)
            assert answer.rows["histories"].fresh == 1
            assert before is None or (answer.scores != before).any()
            before = answer.scores
        own = writer.rank(request).scores
        assert before is not None
        assert abs(own - before).max() < 1e-4
        assert [stored(server, "somebody new") for server in (one, two)] == [20, 20]
        for clients in pair:
            for client in clients:
                client.close()


def test_an_asynchronous_server_is_told_of_events(redis: RedisServer, demo_models: Path) -> None:
    """Without asking for the history again; and it asks once more after it may have missed something."""
    with (
        serving(demo_models, features(redis.url, Mode.ASYNC)) as one,
        serving(demo_models, features(redis.url, Mode.ASYNC)) as two,
        Client(two.url) as reader,
    ):
        items = two.repository.get().catalogue.ids.items
        table = two.repository.get().features.shared.histories
        post(one, "u", items[0])
        assert eventually(lambda: stored(two, "u") == 1, "the first one is read")

        def told() -> bool:
            asked = table.figures().asked
            reader.rank(RankRequest("u", items[:5]))
            return table.figures().asked == asked

        eventually(told, "the store tells, and is not asked any more")
        asked = table.figures().asked
        for number in range(5):
            post(one, "u", items[number])
        eventually(lambda: stored(two, "u") == 6, "it was told of all of them")
        assert table.figures().asked == asked
        redis.restart()
        eventually(lambda: post(one, "u", items[0]).status_code == 200, "the store is back")
        eventually(lambda: stored(two, "u") == 7, "what was missed meanwhile is read")


def test_events_survive_a_restart_of_the_server(demo_models: Path, tmp_path: Path) -> None:
    config = FeatureConfig(StoreConfig(url=f"lmdb:{tmp_path / 'store'}"))
    with serving(demo_models, config) as server:
        items = server.repository.get().catalogue.ids.items
        answer = post(server, "u", items[0]).json()
        assert answer["acknowledged_by"] == "store"
    with serving(demo_models, config) as server:
        assert stored(server, "u") == 1


def test_an_outbox_takes_events_while_the_store_is_away(redis: RedisServer, demo_models: Path, tmp_path: Path) -> None:
    config = features(redis.url, outbox=str(tmp_path / "outbox"))
    with serving(demo_models, config) as server, Client(server.url) as client:
        items = server.repository.get().catalogue.ids.items
        assert post(server, "u", items[0]).json()["acknowledged_by"] == "store"
        redis.kill()
        answer = eventually(lambda: (a := post(server, "u", items[1])).status_code == 200 and a, "it is taken").json()
        assert answer["acknowledged_by"] == "outbox"
        assert answer["stored"] == {"1": 2}  # the next request sees it
        assert post(server, "somebody new", items[2]).json()["stored"] == {"1": 1}
        assert "history_stale" in client.rank(RankRequest("u", items[:5])).degraded
    with serving(demo_models, config) as server:  # started while the store is away
        assert post(server, "u", items[3]).json()["acknowledged_by"] == "outbox"
        redis.start()
        table = server.repository.get().features.shared.histories
        eventually(lambda: table.figures().undelivered == 0, "all is delivered")
        assert stored(server, "u") == 3
    with serving(demo_models, features(redis.url)) as other:
        assert stored(other, "u") == 3
        assert stored(other, "somebody new") == 1


def test_what_a_store_forgot_is_given_again(demo_models: Path, tmp_path: Path) -> None:
    """A Redis that keeps nothing on disk confirms an event, crashes, and comes back empty."""
    with (
        running_redis(tmp_path / "redis", "--appendonly", "no") as redis,
        serving(demo_models, features(redis.url, outbox=str(tmp_path / "outbox"))) as server,
    ):
        items = server.repository.get().catalogue.ids.items
        for item in items[:3]:
            assert post(server, "u", item).json()["acknowledged_by"] == "store"
        redis.kill()
        eventually(lambda: post(server, "u", items[3]).json().get("acknowledged_by") == "outbox", "it is away")
        redis.start()
        with serving(demo_models, features(redis.url)) as other:
            eventually(lambda: stored(other, "u") >= 4, "the store has all of them again")
            assert stored(other, "u") == stored(server, "u")


def test_one_server_to_an_outbox(redis: RedisServer, demo_models: Path, tmp_path: Path) -> None:
    from rankd.errors import ConfigError

    config = features(redis.url, outbox=str(tmp_path / "outbox"))
    with serving(demo_models, config), pytest.raises(ConfigError, match="another server"), serving(demo_models, config):
        pass
