"""Traces that go on in shards: what is noted of calls, what travels, and shards and clients that know nothing of it."""

from __future__ import annotations

import struct
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from rankd import Ranker, RankRequest
from rankd.embeddings.jagged import JaggedIds
from rankd.errors import DeadlineExceeded, ShardFailure
from rankd.observe.tracing import RequestTrace, SpanKind, SpanNote, opened
from rankd.shards.call_traces import pack_trace, shard_trace
from rankd.shards.frames import HEADER_BYTES, Kind, frame, parse_header, read_header, read_payload
from rankd.shards.handshake import Challenge, Hello, Proof, Ready
from rankd.shards.shard_config import ShardServerConfig
from rankd.shards.shard_stats import Ending
from rankd.shards.sharded_pooling import ShardedPooling
from rankd.shards.streams import Stream
from rankd.shards.table_config import TableConfig
from tests.shards.false_shard import liar
from tests.shards.films import ENGINE, REQUESTS
from tests.shards.plain_tables import asking, jagged, make_server, one_shard, quick, serving, two_shards, whole
from tests.shards.raw_client import pool_request, raw
from tests.shards.test_planned_serving import PATIENT, plan, shard  # noqa: F401 - a fixture

ASKED = jagged(["item"], [[[3], [], [4, 4]]])
IDS = st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1)


def looked_up(pooling: ShardedPooling, asked: JaggedIds = ASKED) -> list[SpanNote]:
    """What a traced look-up notes, itself last."""
    trace = RequestTrace("rank", 77, time.perf_counter())
    with opened(trace, "look-up") as span:
        pooling.pool(asked)
    assert span is not None
    span.end()
    return trace.notes


def test_a_traced_pool_written_by_hand() -> None:
    trace = bytes(range(24))
    front = b"RKSH" + bytes([1, 5, 1, 0]) + struct.pack("<QII", 258, 10_000, 27)
    data = front + struct.pack("<Q", xxhash.xxh3_64_intdigest(front + trace + b"abc")) + trace + b"abc"
    assert b"".join(frame(Kind.POOL, 258, [memoryview(b"abc")], 10_000, trace)) == data
    header = parse_header(data[:HEADER_BYTES], 100)
    assert (header.kind, header.length, header.traced) == (Kind.POOL, 27, True)
    assert pack_trace(0x000102030405060708090A0B0C0D0E0F, 0x1011121314151617) == trace


@pytest.mark.parametrize(
    ("kind", "flags", "length"),
    [(5, 4, 30), (5, 1, 23), (6, 1, 30), (6, 3, 30), (8, 1, 30), (8, 2, 30), (5, 0x101, 30)],
)
def test_other_flags_are_refused(kind: int, flags: int, length: int) -> None:
    data = struct.pack("<4sBBHQIIQ", b"RKSH", 1, kind, flags, 1, 0, length, 0)
    with pytest.raises(ShardFailure, match="use the same rankd on both sides"):
        parse_header(data, 100)


@given(*IDS)
def test_ids_that_travel_are_those_that_were_sent(trace_id: int, span_id: int) -> None:
    trace = shard_trace(pack_trace(trace_id, span_id), 1.0, 2.0, 4.0, Ending.ANSWERED)
    assert (trace.trace_id, trace.parent_id) == (trace_id, span_id)
    spans = {span.name: (span.begin, span.end) for span in trace.spans(time.perf_counter())}
    assert (spans["queue"], spans["look-up"], spans["write"][0]) == ((1.0, 2.0), (2.0, 4.0), 4.0)


def test_each_call_is_noted_below_the_look_up() -> None:
    layout = two_shards()
    asked = jagged(["item", "user", "city"], [[[3], [4, 4]], [[1], [2]], [[5], []]])
    with (
        serving(make_server(layout, 0), make_server(layout, 1)) as addresses,
        asking(two_shards(addresses[:1], addresses[1:])) as pooling,
    ):
        notes, counts = looked_up(pooling, asked), pooling.counts()
    calls = [note for note in notes if note.name == "shard call"]
    assert len(calls) == counts["calls"] > 1 == len([note for note in notes if note.name == "serialise"])
    assert {note.parent_id for note in notes[:-1]} == {notes[-1].span_id}
    assert {note.kind for note in calls} == {SpanKind.CLIENT}
    assert {note.attributes["rankd.shard"] for note in calls} == {"a", "b"}
    for note in calls:
        took_ms, shard_ms, network_ms = (note.end - note.begin) * 1e3, *times(note)
        assert 0 <= shard_ms <= took_ms
        assert network_ms == pytest.approx(took_ms - shard_ms, abs=0.01)
        assert note.error == ""


def times(note: SpanNote) -> tuple[float, float]:
    shard_ms, network_ms = note.attributes["rankd.shard_ms"], note.attributes["rankd.network_ms"]
    assert isinstance(shard_ms, float)
    assert isinstance(network_ms, float)
    return shard_ms, network_ms


def test_a_replica_that_fails_and_the_next_one_are_both_noted() -> None:
    layout = one_shard()

    def ends(stream: Stream) -> None:
        old_handshake(stream)
        read_payload(stream, read_header(stream, 1 << 20, soon(), 5.0), 5.0)

    with liar(ends) as bad, serving(make_server(layout)) as (good,):
        config = quick(first_wait_seconds=30.0, longest_wait_seconds=30.0, heartbeat_seconds=30.0, hedge_share=0.0)
        with asking(one_shard(bad, good), config) as pooling:
            notes = [looked_up(pooling) for _ in range(2)]
    failed, retried = next(calls for one in notes if len(calls := [n for n in one if n.name == "shard call"]) == 2)
    assert (failed.error, retried.error) == ("ShardFailure", "")
    assert (failed.attributes["rankd.tried_before"], retried.attributes["rankd.tried_before"]) == (0, 1)


def test_a_call_that_nobody_waits_for_any_more_is_noted() -> None:
    def silent(stream: Stream) -> None:
        old_handshake(stream)
        stream.fill(memoryview(bytearray(1 << 20)), soon())

    with liar(silent) as address, asking(one_shard(address), quick(timeout_ms=50.0)) as pooling:
        trace = RequestTrace("rank", 77, time.perf_counter())
        with pytest.raises(DeadlineExceeded, match="not there in time"), opened(trace, "look-up"):
            pooling.pool(ASKED)
    assert [note.error for note in trace.notes if note.name == "shard call"] == ["Forgotten"]


def test_without_a_trace_nothing_travels() -> None:
    flags: list[bool] = []

    def listens(stream: Stream) -> None:
        old_handshake(stream, traces=True)
        while True:
            header = read_header(stream, 1 << 20, soon(), 5.0)
            payload = bytes(read_payload(stream, header, 5.0))
            if header.kind is Kind.POOL:
                flags.append(header.traced)
                assert payload[:24] == pack_trace(77, int.from_bytes(payload[16:24])) or not header.traced
                stream.send(frame(Kind.POOLED, header.number, [memoryview(bytes(48))]), soon())

    with liar(listens) as address, asking(one_shard(address)) as pooling:
        pooling.pool(ASKED)
        looked_up(pooling)
    assert flags == [False, True]


def soon() -> float:
    return time.perf_counter() + 5.0


def old_handshake(stream: Stream, traces: bool = False) -> None:
    """As a shard does it that knows nothing of traces: it takes no words that it does not know, and no flags. With
    `traces`: as one that takes them."""

    def next_of(kind: Kind) -> bytes:
        header = read_header(stream, 4096, soon(), 5.0)
        assert header.kind is kind
        return bytes(read_payload(stream, header, 5.0))

    def say(kind: Kind, words: dict[str, object]) -> None:
        stream.send(frame(kind, 0, [memoryview(msgspec.msgpack.encode(words))]), soon())

    layout = one_shard()
    assert set(msgspec.msgpack.decode(next_of(Kind.HELLO))) == {"plan", "nonce"}
    say(Kind.CHALLENGE, {"nonce": bytes(32), "secret": False})
    assert set(msgspec.msgpack.decode(next_of(Kind.PROOF))) == {"proof"}
    nets = msgspec.to_builtins(layout.served_by(layout.shards[0]))
    words = {"plan": layout.plan, "proof": b"", "nets": nets, "max_request_bytes": 1 << 20}
    say(Kind.READY, {**words, "traces": True} if traces else words)


def test_an_older_shard_is_asked_as_ever() -> None:
    layout = one_shard()
    expected = whole(layout).pool(ASKED)

    def old(stream: Stream) -> None:
        old_handshake(stream)
        header = read_header(stream, 1 << 20, soon(), 5.0)
        read_payload(stream, header, 5.0)
        assert not header.traced
        stream.send(frame(Kind.POOLED, header.number, [memoryview(expected.tobytes())]), soon())
        stream.fill(memoryview(bytearray(1 << 20)), soon())

    with liar(old) as address, asking(one_shard(address)) as pooling:
        (call,) = [note for note in looked_up(pooling) if note.name == "shard call"]
    assert call.error == ""
    assert "rankd.shard_ms" not in call.attributes


@pytest.mark.parametrize(
    ("number", "words"), [(0, set()), (1, {"traces"}), (4, {"narrow_sums"}), (5, {"traces", "narrow_sums"})]
)
def test_a_client_hears_only_of_what_it_knows(number: int, words: set[str]) -> None:
    layout = one_shard()
    with serving(make_server(layout)) as (address,), raw(address) as client:
        client.send(Kind.HELLO, number, msgspec.msgpack.encode(Hello(layout.plan, bytes(32))))
        assert set(msgspec.msgpack.decode(client.next()[2])) == set(Challenge.__struct_fields__)
        client.send(Kind.PROOF, 0, msgspec.msgpack.encode(Proof(b"")))
        ready = msgspec.msgpack.decode(client.next()[2])
    assert set(ready) == (set(Ready.__struct_fields__) - {"traces", "narrow_sums", "contents"}) | words


def test_a_trace_that_does_not_fit_any_more_stays_here() -> None:
    """A request as large as a shard takes is not refused because it is traced."""
    layout = one_shard()
    many = jagged(["item"], [[[5] * 1000]])
    limit = len(pool_request(layout, many)) + 23
    with (
        serving(make_server(layout, config=ShardServerConfig(max_request_bytes=limit))) as (address,),
        asking(one_shard(address)) as pooling,
    ):
        sent = [n.attributes["rankd.request_bytes"] for n in looked_up(pooling, many) if n.name == "shard call"]
        assert sent == [limit - 23]
        np.testing.assert_allclose(pooling.pool(many), whole(layout).pool(many), rtol=1e-5)


def test_spans_of_shard_processes_are_below_the_calls(
    version: Path,
    plan: Path,  # noqa: F811 - a fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from rankd.observe.tracing import open_traces
    from tests.observe.collector import collecting

    with collecting() as collector:
        monkeypatch.setenv("RANKD_TRACING__ENABLED", "true")
        monkeypatch.setenv("RANKD_TRACING__ENDPOINT", collector.url)
        with ExitStack() as running:
            both = [running.enter_context(shard(plan, version / "embeddings", number)) for number in (0, 1)]
            addresses = tuple(address for address, _ in both)
            tables = TableConfig(plan=str(plan), shards=addresses, client=PATIENT)
            ranker = running.enter_context(Ranker.load(version, ENGINE, tables=tables))
            traces = open_traces(collector.config(), "rankd")
            assert traces is not None
            trace = traces.begin("rank", {})
            assert trace is not None
            ranker.submit(REQUESTS[0], trace).result()
            traces.end(trace)
            traces.close()
            ranker.rank(RankRequest("nobody", REQUESTS[0].candidates))  # it is not traced
            for _, process in both:
                process.terminate()
                assert process.wait(20) == 0
        spans = collector.of(trace.shown_id)
        assert {span.trace_id for span in collector.spans} == {trace.shown_id}
    calls = {span.span_id: span for span in spans.values() if span.name == "shard call"}
    served = {span.parent_id: span for span in spans.values() if span.name == "shard"}
    assert set(served) == set(calls) != set()
    assert {span.service for span in served.values()} == {"rankd-shard"}
    look_ups = {span.span_id: span for span in spans.values() if span.name == "look-up" and span.service == "rankd"}
    assert {span.parent_id for span in calls.values()} <= set(look_ups)
    assert {spans[span.parent_id].name for span in look_ups.values()} <= {"rank", "features"}
    for call_id, one in served.items():
        inner = {span.name: span for span in spans.values() if span.parent_id == one.span_id}
        assert set(inner) == {"queue", "look-up", "write"}
        assert one.begin == inner["queue"].begin
        assert inner["look-up"].end <= one.end
        assert calls[call_id].begin < one.end  # one machine, one clock
