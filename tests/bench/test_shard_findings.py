"""What `rankd bench shards` makes of its measurements: parts of a request that add up, and verdicts."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.bench.shard_suite.hypotheses import Findings, all_hypotheses
from rankd.bench.shard_suite.layout_prediction import both_costs, simulated_ms
from rankd.bench.shard_suite.layout_ratios import left_out
from rankd.bench.shard_suite.layouts import LIMITS, SHARDED, Layout, layout_name
from rankd.bench.shard_suite.open_loop import PARTS, KnownCosts, Offered, attribution
from rankd.bench.shard_suite.placed_server import ShardWork
from rankd.embeddings.table_spec import TableSpec
from rankd.plan.cost_model import CostModel
from rankd.plan.request_work import request_work
from rankd.plan.strategies import make_plan
from rankd.plan.table_plan import Strategy
from rankd.plan.table_statistics import TableLoad, TableStatistics

LOADS = [TableLoad(TableSpec(f"t{n}", 100 + 10 * n, 8), "all", TableStatistics(f"t{n}", 9.0 - n)) for n in range(8)]
OFFERED = [Offered([], [100, 200], [0.0, 1.0, 2.0, 3.0])]
times = st.floats(0, 100)


@given(times, times, times, times, times, times, times, times, st.booleans())
def test_the_parts_of_a_request_add_up(
    outside: float, queue: float, features: float, dense: float, waited: float, shard_queue: float, service: float,
    known: float, sharded: bool,
) -> None:  # fmt: skip
    """Two requests of two calls each. Shards cannot take longer than they are waited for, nor rows than the service."""
    shard_queue, service = (min(one, waited / 2) for one in (shard_queue, service))
    stages = {"queue": queue, "features": features + waited, "encode": 0.0, "score": dense, "order": 1.0}
    spent = {name: 2 * value for name, value in stages.items()}
    spent |= {"total": sum(spent.values()), "lookup": 2 * waited / 1e3}
    after = ShardWork(calls=4, queue_ms=4 * shard_queue, service_ms=4 * service) if sharded else ShardWork()
    seen_ms = outside + spent["total"] / 2
    parts = attribution(spent, ShardWork(), after, seen_ms, 2, KnownCosts(known, known))
    assert tuple(parts) == PARTS
    assert min(parts.values()) >= -1e-9
    assert sum(parts.values()) == pytest.approx(seen_ms)
    assert parts["dense_ms"] == pytest.approx(dense)
    if not sharded:
        assert parts["lookup_ms"] == pytest.approx(waited)
        assert parts["network_ms"] == parts["serialise_ms"] == parts["shard_service_ms"] == 0
    else:
        assert parts["lookup_ms"] == pytest.approx(min(known, service))
        assert parts["shard_queue_ms"] == pytest.approx(shard_queue)


def findings(p99_ms: dict[str, float], overheads: dict[int, float]) -> Findings:
    """Layouts with that p99, and so much CPU."""
    layouts = [Layout("singular", make_plan(Strategy.SINGULAR, LOADS, 1, LIMITS), None)]
    layouts += [
        Layout(layout_name(strategy, number), make_plan(strategy, LOADS, number, LIMITS), None)
        for strategy in SHARDED
        for number in ((1,) if strategy is Strategy.ONE_SHARD else (2, 4))
    ]
    for layout in layouts:
        figure = p99_ms.get(layout.name, 10.0)
        layout.rounds = [{"p99_ms": figure, "server_cpu_ms": 5.0, "shards_cpu_ms": float(len(layout.plan.shards))}]
    return Findings(layouts, overheads, LOADS, both_costs(CostModel(), 1.0, [100]), OFFERED)


def verdicts(found: Findings) -> dict[str, tuple[float, str]]:
    rows = all_hypotheses(found, (1, 2, 4))
    return {row["contestant"]: (row["ratio"], row["verdict"]) for row in rows}


def verdict(found: Findings, begins: str) -> tuple[float, str]:
    """Of the one that begins so; four digits of its ratio."""
    ((ratio, said),) = [value for title, value in verdicts(found).items() if title.startswith(begins)]
    return round(ratio, 4), said


def test_verdicts_follow_the_figures() -> None:
    found = findings({"one-shard": 20.0, "load-balanced on 4": 8.0}, {100: 1.2, 700: 1.0})
    assert verdict(found, "one shard is the worst") == (0.5, "confirmed")
    assert verdict(found, "larger batches favour") == (0.8333, "confirmed")
    assert verdict(found, "by bytes and by look-ups come out close (within 5%): p99 of look-ups over bytes on 4") == (
        0.8, "refuted"
    )  # fmt: skip
    assert verdict(found, "net-aware makes the fewest calls")[1] == "confirmed"
    other = findings({"one-shard": 9.0, "load-balanced on 2": 8.0}, {100: 1.0, 700: 1.1})
    assert verdict(other, "one shard is the worst") == (1.1111, "refuted")
    assert verdict(other, "larger batches favour") == (1.1, "refuted")


def test_more_shards_are_compared_with_fewer() -> None:
    found = findings({"load-balanced on 4": 8.0, "load-balanced on 2": 16.0}, {})
    named = {title: value for title, value in verdicts(found).items() if "4 shards over 1" in title}
    assert any("simulated" in title for title in named)
    two = all_hypotheses(found, (2, 4))
    said = {row["contestant"]: (round(row["ratio"], 4), row["verdict"]) for row in two}
    assert said["more shards, less latency: p99 of 4 shards over 2"] == (0.5, "confirmed")
    assert said["more shards, more compute (above 1): CPU of 4 shards over 2"] == (1.2857, "confirmed")


def test_requests_alone_take_what_their_steps_take() -> None:
    """A second apart nobody waits: p50 and p99 are those of the two sizes."""
    costs = msgspec.structs.replace(CostModel(), main_cores=1)
    plan = make_plan(Strategy.LOAD_BALANCED, LOADS, 2, LIMITS)
    work = request_work(plan, LOADS, costs)
    found = simulated_ms(plan, LOADS, costs, OFFERED)
    for name, samples in (("p50_ms", 100), ("p99_ms", 200)):
        served = max(call.serve_us.at(samples) for call in work.calls) + work.wire_us.at(samples)
        expected = work.send_us.at(samples) + served + work.join_us.at(samples) + work.dense_us.at(samples)
        assert found[name] == pytest.approx(expected / 1e3)


def test_the_best_of_a_round_is_that_of_the_others() -> None:
    """Nobody is better than another; who was lucky once is not the best for it."""
    lucky_once = {"one": [0.5, 1.0, 1.0], "two": [1.0, 0.5, 1.0], "three": [1.0, 1.0, 0.5]}
    ratios = left_out(lucky_once, "one")
    assert ratios == {"p99_overhead_best_left_out": 1.0, "auto_over_best_left_out": 1.0}
    really = lucky_once | {"quick": [0.625, 0.625, 0.625]}
    assert left_out(really, "one") == {"p99_overhead_best_left_out": 0.625, "auto_over_best_left_out": 1.6}
    assert left_out(really, "quick")["auto_over_best_left_out"] == 1.0
    assert left_out({"one": [0.9]}, "one") == {}
