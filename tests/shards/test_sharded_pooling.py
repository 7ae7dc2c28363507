"""Sharded equals unsharded, whatever the tables, parts, nets, replicas and ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankd.embeddings.jagged import JaggedIds
from rankd.errors import ConfigError, InvalidRequest, PayloadTooLarge
from rankd.shards.shard_config import ShardClientConfig, ShardServerConfig, TableDefault
from rankd.shards.shard_layout import Shard, ShardLayout
from rankd.shards.sharded_pooling import ShardedPooling
from tests.shards.plain_tables import (
    asking,
    jagged,
    layouts,
    make_server,
    one_shard,
    questions,
    random_ids,
    serving,
    two_shards,
    whole,
)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_sharded_equals_unsharded(data: st.DataObject) -> None:
    drawn = data.draw(layouts())
    with ExitStack() as stack:
        shards = []
        for number, shard in enumerate(drawn.shards):
            servers = [make_server(drawn, number) for _ in shard.addresses]
            shards.append(Shard(shard.name, tuple(stack.enter_context(serving(*servers))), shard.parts))
        layout = ShardLayout(drawn.plan, drawn.nets, tuple(shards))
        sharded, plain = stack.enter_context(asking(layout)), whole(layout)
        for _ in range(4):
            asked = data.draw(questions(layout))
            values = sharded.pool(asked)
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, plain.pool(asked), rtol=1e-5, atol=1e-5)


@contextmanager
def both(layout: ShardLayout, config: ShardClientConfig | None = None) -> Iterator[ShardedPooling]:
    """A client of `two_shards`, which are started for it."""
    with (
        serving(make_server(layout, 0), make_server(layout, 1)) as (first, second),
        asking(two_shards([first], [second]), config) as pooling,
    ):
        yield pooling


def test_the_sum_of_parts_is_the_same_to_the_bit_each_time() -> None:
    layout = two_shards()
    with (
        serving(make_server(layout, 0), make_server(layout, 1)) as (first, second),
        asking(two_shards([first], [second])) as pooling,
    ):
        asked = random_ids(layout, 20, seed=3)
        once = pooling.pool(asked)
        for _ in range(10):
            np.testing.assert_array_equal(pooling.pool(asked), once)


def test_many_requests_travel_on_one_connection_at_once() -> None:
    layout = two_shards()
    with (
        serving(make_server(layout, 0), make_server(layout, 1)) as (first, second),
        asking(two_shards([first], [second])) as pooling,
    ):
        plain = whole(layout)
        asked = [random_ids(layout, 3, seed) for seed in range(50)]
        pending = [pooling.begin([one]) for one in asked]
        for one, sums in reversed(list(zip(asked, pending, strict=True))):
            np.testing.assert_allclose(sums.result()[0].values, plain.pool(one), rtol=1e-5, atol=1e-5)
        assert all(stats.connections == 1 for stats in pooling.stats(5.0).values())


def test_one_call_is_made_for_each_shard_and_net_that_has_any_of_the_rows() -> None:
    layout = two_shards()
    with (
        serving(make_server(layout, 0), make_server(layout, 1)) as (first, second),
        asking(two_shards([first], [second])) as pooling,
    ):
        pooling.pool(jagged(["item"], [[[2, 4], [6]]]))  # even rows are on a
        assert pooling.counts()["calls"] == 1
        pooling.pool(jagged(["item", "user", "city"], [[[2, 3]], [[1]], [[1]]]))
        assert pooling.counts()["calls"] == 1 + 4
        pooling.pool(jagged(["item", "user"], [[[]], [[]]]))
        assert pooling.counts()["calls"] == 5


def test_what_all_samples_have_in_common_is_looked_up_once() -> None:
    layout = one_shard()
    with serving(make_server(layout)) as (address,), asking(one_shard(address)) as pooling:
        values = pooling.pool(jagged(["item"], [[[7, 8]] * 100]))
        np.testing.assert_allclose(
            values, np.tile(whole(layout).pool(jagged(["item"], [[[7, 8]]])), (100, 1)), rtol=1e-5
        )
        (stats,) = pooling.stats(5.0).values()
        assert (stats.lookups, stats.rows) == (2, 1)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (jagged(["itme"], [[[1]]]), "Did you mean 'item'"),
        (jagged(["item"], [[[101]]]), "row 101 was asked"),
        (jagged(["item"], [[[3, -1]]]), "row -1 was asked"),
        (JaggedIds(("item",), np.array([0, 2]), np.array([1])), "these do not"),
    ],
)
def test_a_request_that_cannot_be_is_refused_here(asked: JaggedIds, words: str) -> None:
    pooling = ShardedPooling(one_shard(), ShardClientConfig())
    with pytest.raises(InvalidRequest, match=words):
        pooling.begin([asked])


def test_more_than_a_shard_takes_is_refused_and_the_connection_stays() -> None:
    layout = one_shard()
    small = ShardServerConfig(max_request_bytes=1024, max_answer_bytes=2048)
    with serving(make_server(layout, config=small)) as (address,), asking(one_shard(address)) as pooling:
        with pytest.raises(PayloadTooLarge, match="takes 1024"):
            pooling.pool(jagged(["item"], [[list(range(100)) * 6, [1]]]))
        with pytest.raises(PayloadTooLarge, match="sent are 2048"):
            pooling.pool(jagged(["item"], [[[number % 100] for number in range(200)]]))
        assert pooling.pool(jagged(["item"], [[[1]]])).shape == (1, 4)
        assert next(iter(pooling.stats(5.0).values())).connections == 1
    config = ShardClientConfig(timeout_ms=5000, max_answer_bytes=1024)
    with (
        serving(make_server(layout)) as (address,),
        asking(one_shard(address), config) as pooling,
        pytest.raises(PayloadTooLarge, match="taken are 1024"),
    ):
        pooling.pool(jagged(["item"], [[[number % 100] for number in range(200)]]))


@pytest.mark.parametrize(
    ("default", "words"),
    [(TableDefault("itme"), "Did you mean 'item'"), (TableDefault("item", (1.0, 2.0)), "its rows have 4")],
)
def test_defaults_fit_their_tables(default: TableDefault, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ShardedPooling(one_shard(), ShardClientConfig(defaults=(default,)))
