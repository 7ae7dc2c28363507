"""What goes wrong with shards, and what a request gets then: an answer by its deadline, and never a wrong one."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from rankd.errors import DeadlineExceeded, ShardFailure, Unavailable
from rankd.shards.hedging import Hedging
from rankd.shards.pending import Pending
from rankd.shards.shard_config import ShardClientConfig, ShardServerConfig, TableDefault
from rankd.shards.shard_layout import ShardLayout
from rankd.shards.sharded_pooling import ShardedPooling
from tests.free_ports import free_port
from tests.shards.plain_tables import (
    Asking,
    Hold,
    asking,
    jagged,
    make_server,
    one_shard,
    quick,
    random_ids,
    serving,
    two_shards,
    until,
    whole,
)
from tests.shards.shard_process import ShardProcess

ASKED = jagged(["item"], [[[3], [], [4, 4]]])
LATE_S = 1.0
"""More than this after a deadline is not a machine's hiccup."""


@contextmanager
def processes(layout: ShardLayout, *shards: int) -> Iterator[list[ShardProcess]]:
    """Shards of a layout in processes of their own."""
    running = [ShardProcess(layout, shard) for shard in shards]
    try:
        yield running
    finally:
        for process in running:
            process.end()


class Load(Asking):
    """Threads that ask all the time; each answer is checked, and that it came by its deadline."""

    def __init__(self, pooling: ShardedPooling, layout: ShardLayout, timeout_s: float) -> None:
        super().__init__(threads=4)
        self._pooling, self._timeout_s = pooling, timeout_s
        self._asked = [random_ids(layout, 3, seed) for seed in range(20)]
        self._expected = [whole(layout).pool(asked) for asked in self._asked]
        self.sent = 0
        self.failed: list[Exception] = []

    def settle(self, more: int = 40) -> None:
        """Until so many more requests were answered."""
        end = self.right + more
        until(lambda: self.right >= end)

    def _run(self, number: int) -> None:
        while not self._stop.is_set():
            number = (number + 1) % len(self._asked)
            with self._lock:
                self.sent += 1
            begun = time.perf_counter()
            try:
                pooled = self._pooling.begin([self._asked[number]], begun + self._timeout_s).result()[0]
            except (DeadlineExceeded, Unavailable) as error:
                with self._lock:
                    self.failed.append(error)
                time.sleep(0.002)
                continue
            finally:
                if time.perf_counter() > begun + self._timeout_s + LATE_S:
                    self.wrong.append("late")
            if not np.allclose(pooled.values, self._expected[number], rtol=1e-5, atol=1e-5):
                self.wrong.append("another's sums")
            with self._lock:
                self.right += 1


def test_a_killed_shard_costs_requests_only_while_it_is_away() -> None:
    with processes(two_shards(), 0, 1) as (first, second):
        layout = two_shards([first.address], [second.address])
        with asking(layout, quick()) as pooling, Load(pooling, layout, 2.0) as load:
            load.settle()
            second.signal(signal.SIGKILL)
            second.wait()
            until(lambda: len(load.failed) >= 5)
            assert all(isinstance(error, Unavailable) for error in load.failed)  # at once, not at the deadline
            again = ShardProcess(layout, 1, second.port)
            try:
                until(lambda: pooling.replicas_up()["b"] == 1)
                load.settle()
            finally:
                again.end()
        assert load.wrong == []
        assert load.sent == load.right + len(load.failed)


def test_a_killed_replica_costs_nothing() -> None:
    with processes(one_shard(), 0, 0) as (first, second):
        layout = one_shard(first.address, second.address)
        with asking(layout, quick()) as pooling, Load(pooling, layout, 2.0) as load:
            load.settle()
            first.signal(signal.SIGKILL)
            load.settle(200)
        assert (load.failed, load.wrong) == ([], [])
        assert load.sent == load.right
        assert pooling.counts()["retried"] <= 8


def test_a_replica_that_hangs_costs_hedges_and_no_request_and_comes_back() -> None:
    with processes(one_shard(), 0, 0) as (first, second):
        layout = one_shard(first.address, second.address)
        with asking(layout, quick()) as pooling, Load(pooling, layout, 2.0) as load:
            load.settle(100)
            first.freeze()
            load.settle(200)
            until(lambda: pooling.replicas_up() == {"a": 1})
            assert pooling.counts()["hedged"] >= 1
            first.signal(signal.SIGCONT)
            until(lambda: pooling.replicas_up() == {"a": 2})
            load.settle()
        assert (load.failed, load.wrong) == ([], [])


def test_a_shard_that_hangs_alone_is_given_up_and_asked_again_when_it_answers() -> None:
    with processes(one_shard(), 0) as (only,):
        layout = one_shard(only.address)
        with asking(layout, quick(timeout_ms=50.0)) as pooling:
            only.freeze()
            with pytest.raises(DeadlineExceeded, match="shards a were not there in time"):
                pooling.pool(ASKED)
            until(lambda: pooling.replicas_up() == {"a": 0})
            with pytest.raises(Unavailable, match="'a' cannot be asked"):
                pooling.pool(ASKED)
            only.signal(signal.SIGCONT)
            until(lambda: pooling.replicas_up() == {"a": 1})
            np.testing.assert_allclose(pooling.begin([ASKED], time.perf_counter() + 5).result()[0].values[1], 0.0)


def test_after_misses_in_a_row_a_replica_is_passed_over() -> None:
    hold = Hold()
    config = quick(timeout_ms=30.0, misses_in_a_row=3, heartbeat_seconds=30.0, first_wait_seconds=30.0)
    with serving(make_server(one_shard(), before=hold)) as (address,), asking(one_shard(address), config) as pooling:
        for _ in range(3):
            with pytest.raises(DeadlineExceeded):
                pooling.pool(ASKED)
        with pytest.raises(Unavailable, match="missed 3 deadlines in a row"):
            pooling.pool(ASKED)
        hold.let_go()


def test_a_slow_replica_is_hedged_and_its_late_answer_dropped() -> None:
    slow = Hold()
    layout = one_shard()
    with serving(make_server(layout, before=slow), make_server(layout)) as (first, second):
        layout = one_shard(first, second)
        with asking(layout, quick(timeout_ms=2000.0)) as pooling:
            expected = whole(layout).pool(ASKED)
            for _ in range(40):  # until some went to the slow one
                np.testing.assert_allclose(pooling.pool(ASKED), expected, rtol=1e-5)
            assert 1 <= pooling.counts()["hedged"] <= 2 * 40 * 0.1 + 2
            slow.let_go()
            other = jagged(["item"], [[[5], [6], [7]]])
            for _ in range(40):
                np.testing.assert_allclose(pooling.pool(other), whole(layout).pool(other), rtol=1e-5)
            assert pooling.replicas_up() == {"a": 2}


def test_a_hedge_that_is_late_itself_is_no_second_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The alarm finds a call late, and its answer comes before the hedge is sent: another shard is still waited for."""
    first, second, layout = Hold(), Hold(), two_shards()
    servers = [make_server(layout, shard, before=hold) for shard, hold in ((0, first), (0, first), (1, second))]
    with serving(*servers) as addresses:
        layout = two_shards(addresses[:2], addresses[2:])
        asked = jagged(("item",), [[[3, 4], [7], [10]]])
        with asking(layout, quick(timeout_ms=10_000.0)) as pooling:
            begun, late = list[Pending](), threading.Event()

            def allowed(_: Hedging) -> bool:
                until(lambda: bool(begun))
                first.let_go()
                until(lambda: begun[0]._calls[0].answer is not None)
                late.set()
                return True

            monkeypatch.setattr(Hedging, "allowed", allowed)
            monkeypatch.setattr(Hedging, "delay_s", 0.02)
            begun.append(pooling.begin([asked]))
            assert late.wait(10.0)
            time.sleep(0.1)
            assert not begun[0].there()
            second.let_go()
            (pooled,) = begun[0].result()
    np.testing.assert_allclose(pooled.values, whole(layout).pool(asked), rtol=1e-6)


def test_an_overloaded_replica_is_passed_over_for_the_next_one() -> None:
    hold = Hold()
    full = ShardServerConfig(workers=1, max_waiting=1)
    layout = one_shard()
    crowded = make_server(layout, config=full, before=hold)
    with serving(crowded, make_server(layout)) as (first, second):
        busy, layout = one_shard(first), one_shard(first, second)
        with asking(busy, quick(timeout_ms=10_000.0)) as crowd, asking(layout, quick(hedge_share=0.0)) as pooling:
            waiting = [crowd.begin([ASKED])]
            assert hold.entered.acquire(timeout=10)
            waiting.append(crowd.begin([ASKED]))
            until(lambda: crowded.stats().waiting == 1)  # else one of those below takes the place, and waits
            for _ in range(10):
                pooling.pool(ASKED)
            assert pooling.counts()["retried"] >= 1
            hold.let_go()
            for pending in waiting:
                pending.result()


def test_tables_that_cannot_be_had_have_their_defaults_and_are_named() -> None:
    defaults = (TableDefault("item", (1.0, 2.0, 3.0, 4.0)), TableDefault("city"))
    asked = jagged(["user", "item", "city"], [[[1], [2], [3]], [[2, 3], [], [5]], [[1], [1], [1]]])
    layout = two_shards()
    with serving(make_server(layout, 0)) as (first,):
        layout = two_shards([first])
        pooling = ShardedPooling(layout, ShardClientConfig(timeout_ms=5000, defaults=defaults))
        pooling.start()
        try:
            until(lambda: pooling.replicas_up() == {"a": 1, "b": 0})
            pooled = pooling.begin([asked]).result()[0]
            expected = whole(layout).pool(asked)
            assert pooled.degraded == ("item", "city")
            np.testing.assert_allclose(pooled.values[:, :3], expected[:, :3], rtol=1e-5)
            assert pooled.values[:, 3:7].tolist() == [[1, 2, 3, 4], [0, 0, 0, 0], [1, 2, 3, 4]]
            assert not pooled.values[:, 7:].any()
            assert pooling.counts()["degraded_tables"] == 2
            whole_only = jagged(["item"], [[[2, 4], [6]]])  # even rows are on the shard that is there
            assert pooling.begin([whole_only]).result()[0].degraded == ()
        finally:
            pooling.close()


def test_a_table_without_a_default_fails_the_request_by_name() -> None:
    pooling = ShardedPooling(one_shard(), ShardClientConfig(timeout_ms=5000))
    pooling.start()
    try:
        with pytest.raises(Unavailable, match=r"1 tables \(item\).*shard 'a' cannot be asked.*defaults"):
            pooling.pool(ASKED)
        with pytest.raises(ShardFailure, match="cannot be asked"):
            pooling.wait_up(0.01)
    finally:
        pooling.close()


def test_a_shard_that_is_restarted_with_another_plan_is_not_asked() -> None:
    layout = one_shard()
    other = ShardLayout("plan-2", layout.nets, layout.shards)
    port = free_port()
    server = make_server(layout, config=ShardServerConfig(port=port))
    with serving(server) as (address,), asking(one_shard(address), quick()) as pooling:
        pooling.pool(ASKED)
        server.close()
        with serving(make_server(other, config=ShardServerConfig(port=port))):
            until(lambda: "plan" in _trouble(pooling))
            assert "has plan 'plan-2', and the client asks for plan 'plan-1'" in _trouble(pooling)
        with serving(make_server(layout, config=ShardServerConfig(port=port))):
            until(lambda: pooling.replicas_up() == {"a": 1})
            pooling.pool(ASKED)


def _trouble(pooling: ShardedPooling) -> str:
    try:
        pooling.pool(ASKED)
    except Unavailable as error:
        return str(error)
    return ""


def test_sigterm_under_load_loses_no_request() -> None:
    with processes(one_shard(), 0, 0) as (first, second):
        layout = one_shard(first.address, second.address)
        with asking(layout, quick()) as pooling, Load(pooling, layout, 2.0) as load:
            load.settle(100)
            first.signal(signal.SIGTERM)
            assert first.wait() == 0
            load.settle(100)
        assert (load.failed, load.wrong) == ([], [])
        assert pooling.counts()["retried"] == 0  # what was sent before the goodbye was answered


def test_a_drain_answers_what_waits_and_ends_without_a_client_that_stays() -> None:
    hold = Hold()
    server = make_server(one_shard(), config=ShardServerConfig(workers=1, drain_seconds=0.5), before=hold)
    with serving(server) as (address,), asking(one_shard(address), quick(timeout_ms=5000.0)) as pooling:
        pending = [pooling.begin([ASKED]) for _ in range(5)]
        assert hold.entered.acquire(timeout=10)
        draining = threading.Thread(target=server.drain)
        draining.start()
        until(lambda: pooling.replicas_up() == {"a": 0})
        hold.let_go()
        for one in pending:
            one.result()
        draining.join(10.0)
        assert server.stats().requests["answered"] == 5


def test_closing_the_client_tells_whoever_waits() -> None:
    hold = Hold()
    with serving(make_server(one_shard(), before=hold)) as (address,):
        with asking(one_shard(address), quick(timeout_ms=10_000.0)) as pooling:
            pending = pooling.begin([ASKED])
            assert hold.entered.acquire(timeout=10)
        with pytest.raises(Unavailable):
            pending.result()
        hold.let_go()


def test_after_a_deadline_the_connection_is_in_step() -> None:
    hold = Hold()
    config = quick(misses_in_a_row=100)
    server = make_server(one_shard(), before=hold)
    with serving(server) as (address,), asking(one_shard(address), config) as pooling:
        for _ in range(5):
            with pytest.raises(DeadlineExceeded):
                pooling.begin([ASKED], time.perf_counter() + 0.01).result()
        hold.let_go()
        for seed in range(5):
            other = random_ids(one_shard(), 3, seed)
            np.testing.assert_allclose(pooling.pool(other), whole(one_shard()).pool(other), rtol=1e-5, atol=1e-6)
        assert server.stats().connections == 1
        assert server.stats().requests["late"] >= 3  # of those that were not being worked on


def test_the_caller_may_do_other_work_meanwhile_and_wait_for_less() -> None:
    hold = Hold()
    with serving(make_server(one_shard(), before=hold)) as (address,), asking(one_shard(address), quick()) as pooling:
        pending, given_up = pooling.begin([ASKED]), pooling.begin([ASKED])
        assert hold.entered.acquire(timeout=10)
        with pytest.raises(DeadlineExceeded):
            given_up.result(time.perf_counter() + 0.01)
        hold.let_go()
        assert pending.result()[0].values.shape == (3, 4)
        early = pooling.begin([ASKED], time.perf_counter() + 0.2)
        time.sleep(0.3)  # the answer has come while the caller was busy past the deadline
        assert early.result()[0].values.shape == (3, 4)


def test_late_answers_do_not_make_up_for_misses() -> None:
    server = make_server(one_shard(), before=lambda: time.sleep(0.1))
    config = quick(misses_in_a_row=2, first_wait_seconds=30.0)
    with serving(server) as (address,), asking(one_shard(address), config) as pooling:
        for answered in (1, 2):
            assert pooling.replicas_up() == {"a": 1}
            with pytest.raises(DeadlineExceeded):
                pooling.begin([ASKED], time.perf_counter() + 0.05).result()
            until(lambda answered=answered: server.stats().requests["answered"] == answered)  # type: ignore[misc]
            time.sleep(0.05)  # for the answer to arrive
        assert pooling.replicas_up() == {"a": 0}
