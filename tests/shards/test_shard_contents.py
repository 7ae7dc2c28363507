"""Which rows shards say that they have: known once they were there, unknown where they say nothing or disagree."""

from __future__ import annotations

import msgspec
import pytest

from rankd.shards.frames import Kind
from rankd.shards.handshake import CONTENTS, Hello, Proof
from rankd.shards.shard_config import ShardServerConfig
from rankd.shards.sharded_pooling import ShardedPooling
from tests.free_ports import free_port
from tests.shards.plain_tables import asking, make_server, one_shard, quick, serving, two_shards, until
from tests.shards.raw_client import raw


def test_what_shards_say_is_known_also_while_they_are_away() -> None:
    layout, port = one_shard(), free_port()
    server = make_server(layout, 0, ShardServerConfig(port=port), contents={"item": "old", "another": "its own"})
    with serving(server) as (address,), asking(one_shard(address), quick()) as pooling:
        assert pooling.contents() == {"item": "old"}
        server.close()
        until(lambda: pooling.replicas_up() == {"a": 0})
        assert pooling.contents() == {"item": "old"}
        with serving(make_server(layout, 0, ShardServerConfig(port=port), contents={"item": "new"})):
            until(lambda: pooling.replicas_up() == {"a": 1})
            assert pooling.contents() == {"item": "new"}


@pytest.mark.parametrize("other", [{"item": "new"}, {}])
def test_replicas_that_disagree_say_nothing(other: dict[str, str]) -> None:
    layout = one_shard()
    servers = [make_server(layout, contents=contents) for contents in ({"item": "old"}, other)]
    with serving(*servers) as addresses, asking(one_shard(*addresses), quick()) as pooling:
        assert pooling.contents() == {"item": ""}
        servers[1].close()
        until(lambda: pooling.replicas_up() == {"a": 1})
        assert pooling.contents() == {"item": "old"}


def test_parts_of_a_table_are_of_the_same_rows_or_of_unknown_ones() -> None:
    layout = two_shards()
    for second, item in (("same", "same"), ("other", "")):
        servers = [
            make_server(layout, 0, contents={"item": "same", "user": "u"}),
            make_server(layout, 1, contents={"item": second, "city": "c"}),
        ]
        with serving(*servers) as (a, b), asking(two_shards([a], [b])) as pooling:
            assert pooling.contents() == {"item": item, "user": "u", "city": "c"}


def test_of_a_shard_that_never_was_there_nothing_is_known() -> None:
    pooling = ShardedPooling(one_shard(f"127.0.0.1:{free_port()}"), quick())
    assert pooling.contents() == {"item": ""}


@pytest.mark.parametrize(("number", "said"), [(0, None), (CONTENTS, {"item": "old"})])
def test_only_who_reads_contents_is_told(number: int, said: dict[str, str] | None) -> None:
    layout = one_shard()
    with serving(make_server(layout, contents={"item": "old"})) as (address,), raw(address) as client:
        client.send(Kind.HELLO, number, msgspec.msgpack.encode(Hello(layout.plan, bytes(32))))
        client.next()
        client.send(Kind.PROOF, 0, msgspec.msgpack.encode(Proof(b"")))
        assert msgspec.msgpack.decode(client.next()[2]).get("contents") == said
