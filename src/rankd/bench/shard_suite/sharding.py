"""`rankd bench shards`: every way to divide a model's tables, beside all of them in one process.

In: a DLRM workload. Out: a Report. In this order:

    1  scores of every layout are compared with singular's, tables in float32 and in int8
    2  look-ups are held to those of others (`table_suite`), and the costs that plans reckon with are measured
       (`measured_costs.py`)
    3  what singular answers at most, once; half of it is offered to all
    4  rounds: all layouts in turn, another one first in each, the same requests at the same moments
    5  requests of one size, one at a time
    6  the simulator is asked for the same requests (`layout_prediction.py`), hypotheses are judged (`hypotheses.py`);
       of singular it knows the CPU of a request, of the others nothing

All servers and shards run from 2 on, and share this machine's cores with the one that is measured; those that nobody
asks wait. So the processor time of both sides stands beside each latency.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from rankd.artifact import Artifact
from rankd.bench.arrivals import poisson_arrivals
from rankd.bench.parity import SAME, max_difference
from rankd.bench.report import Neighbours, Report, Row, commit, machine, medians, percentile
from rankd.bench.served_model import ServedModel
from rankd.bench.shard_suite.dlrm_workload import DlrmWorkload, build_dlrm, draw_dlrm_requests
from rankd.bench.shard_suite.hypotheses import Findings, all_hypotheses
from rankd.bench.shard_suite.layout_prediction import Costs, auto_layout, both_costs, known_costs, predicted
from rankd.bench.shard_suite.layout_ratios import layout_ratios
from rankd.bench.shard_suite.layouts import Layout, all_layouts, workload_loads
from rankd.bench.shard_suite.measured_costs import (
    CostOptions,
    at_load,
    sums_of,
    table_costs,
    with_dense_part,
)
from rankd.bench.shard_suite.open_loop import Offered, measured, most_requests_a_second, one_by_one_ms
from rankd.bench.shard_suite.placed_server import PlacedServer
from rankd.bench.shard_suite.served_costs import encoded, served_cpu
from rankd.bench.table_suite.table_lookups import TableOptions, run_tables
from rankd.bench.wire_forms import Form, decode_scores
from rankd.embeddings.table_spec import TableStorage
from rankd.errors import EngineFailure
from rankd.plan.cost_model import CostModel
from rankd.plan.declaration import Declaration, tables_of
from rankd.plan.table_statistics import TableLoad
from rankd.types import RankRequest

REQUESTS, CHECKED, WARM = 400, 8, 60
ASKED_AT_MOST = 200
"""Requests that show what singular answers at most."""
CONNECTIONS = 4
HALF = 0.5
BEHIND_P99 = 10
"""Requests that a measurement's p99 stands on where nobody says how long it takes, if MOST_SECONDS allow it."""
MOST_SECONDS = 20 * 60.0
"""Of all measurements together, where nobody says: then p99 over all rounds stands on more than one round's does."""
SIZE_SECONDS = 2.0
ABOUT_SECONDS = 390.0
"""What is done beside measurements of dlrm: two models built, servers started, parity, look-ups, costs."""
Step = Callable[[int, int, str], None]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ShardOptions:
    """Numbers of shards, seconds of a measurement (None: as many as a p99 needs), rounds, how costs are measured, and
    in which tables look-ups are held to those of others, in the workload's storage."""

    shards: tuple[int, ...] = (1, 2, 4)
    seconds: float | None = None
    runs: int = 5
    costs: CostOptions = field(default_factory=CostOptions)
    lookups: TableOptions = field(default_factory=TableOptions)


@dataclass(frozen=True, slots=True)
class _Running:
    """All layouts' servers, and what they are asked."""

    layouts: list[Layout]
    placed: list[PlacedServer]
    requests: list[RankRequest]
    encoded: list[bytes]
    rate: float

    @property
    def samples(self) -> list[int]:
        return [len(request.candidates) for request in self.requests]


def run_shards(workload: DlrmWorkload, options: ShardOptions, advance: Step, say: Say) -> Report:
    """Run the suite; `say` is told how long it will take.

    Raises:
        MissingExtra: torch is not installed.
        EngineFailure: scores of a layout differ from singular's, or it answers nothing.
    """
    surroundings, neighbours, parity = machine(), Neighbours(), dict[str, float]()
    requests = draw_dlrm_requests(workload, REQUESTS)
    wire = encoded(requests)
    with TemporaryDirectory(prefix="rankd-bench-") as folder, ExitStack() as running:
        other = TableStorage.INT8 if workload.storage is not TableStorage.INT8 else TableStorage.FP32
        parity |= _other_parity(msgspec.structs.replace(workload, storage=other), options, wire, Path(folder), advance)
        advance(0, 1, "model")
        version = build_dlrm(workload, Path(folder) / "models")
        declaration = tables_of(version)
        loads = workload_loads(workload, declaration)
        layouts = all_layouts(declaration, loads, options.shards, Path(folder))
        lookups = run_tables(replace(options.lookups, storages=(workload.storage,)), advance)
        costs, _ = table_costs(replace(options.costs, sums=sums_of(version)), advance)
        placed = [running.enter_context(_placed(version, layout)) for layout in layouts]
        parity |= _parity(layouts, placed, wire, _bound(version))
        for one in placed:
            most_requests_a_second(one.server, wire, WARM, CONNECTIONS)
        rate = HALF * most_requests_a_second(placed[0].server, wire, ASKED_AT_MOST, CONNECTIONS)
        asked = _Running(layouts, placed, requests, wire, rate)
        costs = _with_model(costs, asked, loads, workload)
        rounds = _rounds(asked, loads, both_costs(costs, rate, asked.samples), workload.seed, options, advance, say)
        by_samples = _overhead_by_samples(asked, options.runs)
    surroundings["others_cpu_share"] = neighbours.share()  # processes of ours count once they have ended
    samples = statistics.mean(asked.samples)
    costs = at_load(costs, loads, _median(layouts[0], "server_cpu_ms") * 1e3, samples)
    both = both_costs(costs, rate, asked.samples)
    findings = Findings(layouts, by_samples, loads, both, rounds)
    results = [_row(layout, rate) | predicted(layout, loads, both, rounds) for layout in layouts]
    auto = auto_layout(layouts, loads, options.shards, both.here)
    ratios = layout_ratios(layouts, results, auto)
    ratios |= {f"latency_overhead {samples} candidates": ratio for samples, ratio in by_samples.items()}
    ratios |= {"lookup_vs_best_peer": min(lookups.ratios.values()), **lookups.ratios}
    parity |= lookups.parity
    results += [*all_hypotheses(findings, options.shards), *lookups.results]
    about = _about(workload, declaration, options, rate, costs)
    return Report("shards", about, surroundings, commit(), parity, results, ratios)


def _placed(version: Path, layout: Layout) -> PlacedServer:
    return PlacedServer(version.parent.parent, version, layout.path)


def _bound(version: Path) -> float:
    """The largest difference of a score that is none."""
    (record,) = Artifact.open(version).manifest.engines.values()
    return SAME[record.precision]


def _other_parity(
    workload: DlrmWorkload, options: ShardOptions, wire: list[bytes], folder: Path, advance: Step
) -> dict[str, float]:
    """Parity of all layouts with the tables in another storage, a layout at a time."""
    advance(0, 1, f"scores with tables in {workload.storage.value}")
    root = folder / workload.storage.value
    with TemporaryDirectory(prefix="other-", dir=folder) as made:
        version = build_dlrm(workload, Path(made))
        declaration = tables_of(version)
        root.mkdir()
        layouts = all_layouts(declaration, workload_loads(workload, declaration), options.shards, root)
        bound, found, expected = _bound(version), dict[str, float](), list[Any]()
        for layout in layouts:
            with _placed(version, layout) as placed:
                given = _scores(placed.server, wire[:CHECKED])
            expected = expected or given
            name = f"{layout.name}, {workload.storage.value}"
            found[name] = _same(name, expected, given, bound)
    return found


def _parity(
    layouts: Sequence[Layout], placed: Sequence[PlacedServer], wire: list[bytes], bound: float
) -> dict[str, float]:
    given = [_scores(one.server, wire[:CHECKED]) for one in placed]
    return {
        layout.name: _same(layout.name, given[0], scores, bound) for layout, scores in zip(layouts, given, strict=True)
    }


def _scores(server: ServedModel, wire: Sequence[bytes]) -> list[Any]:
    return [decode_scores(Form.BINARY, server.exchange(one)) for one in wire]


def _same(name: str, expected: Sequence[Any], given: Sequence[Any], bound: float) -> float:
    """The largest difference; sums of the parts of a table round otherwise than those of the whole."""
    worst = max_difference(expected, given)
    most = max(float(abs(scores).max()) for scores in expected)
    if not worst <= bound * max(most, 1.0):
        raise EngineFailure(f"the scores of layout '{name}' differ from singular's by {worst:.3g} of {most:.3g}")
    return worst


def _with_model(costs: CostModel, asked: _Running, loads: Sequence[TableLoad], workload: DlrmWorkload) -> CostModel:
    """Costs with this model's dense part, from singular's CPU for requests of each size."""
    cpu_us = served_cpu(asked.placed[0].server, asked.requests, 2 * SIZE_SECONDS)
    return with_dense_part(costs, cpu_us, loads, workload.buckets[0])


def _by_samples(asked: _Running) -> dict[int, list[bytes]]:
    """The requests of the smallest, a middle and the largest size."""
    sizes = sorted(set(asked.samples))
    return {
        size: [one for one, samples in zip(asked.encoded, asked.samples, strict=True) if samples == size]
        for size in (sizes[0], sizes[len(sizes) // 2], sizes[-1])
    }


def _rounds(
    asked: _Running,
    loads: Sequence[TableLoad],
    costs: Costs,
    seed: int,
    options: ShardOptions,
    advance: Step,
    say: Say,
) -> list[Offered]:
    """Measure all layouts in turn, and say what was offered in each round."""
    layouts = asked.layouts
    total = options.runs * len(layouts)
    seconds = options.seconds or min(100 * BEHIND_P99 / asked.rate, MOST_SECONDS / total)
    say(
        f"{asked.rate:.1f} requests a second, half of what singular answers at most; {total} measurements of "
        f"{seconds:.0f} s: about {(total * (seconds + 1) + ABOUT_SECONDS) / 60:.0f} minutes in all; "
        f"{asked.rate * seconds / 100:.0f} requests behind the p99 of one"
    )
    known = [known_costs(layout.plan, loads, costs.here) for layout in layouts]
    rounds = []
    for number in range(options.runs):
        arrivals = poisson_arrivals(asked.rate, seconds, seed + number)
        rounds.append(Offered(asked.encoded, asked.samples, arrivals))
        for place in range(len(layouts)):
            turn = (place + number) % len(layouts)
            advance(number * len(layouts) + place, total, f"{layouts[turn].name}, round {number + 1}")
            figures, latencies_ms = measured(asked.placed[turn], rounds[-1], known[turn])
            layouts[turn].rounds.append(figures)
            layouts[turn].latencies_ms += latencies_ms
    advance(total, total, "done")
    return rounds


def _overhead_by_samples(asked: _Running, runs: int) -> dict[int, float]:
    """Latency of one request at a time in the sharded layout with the lowest p99, over singular's in its round."""
    best = min(range(1, len(asked.layouts)), key=lambda place: _median(asked.layouts[place], "p99_ms"))
    found: dict[int, list[float]] = {}
    for _ in range(runs):
        for samples, wire in _by_samples(asked).items():
            singular, sharded = (one_by_one_ms(asked.placed[place].server, wire, SIZE_SECONDS) for place in (0, best))
            found.setdefault(samples, []).append(sharded / singular)
    return {samples: statistics.median(ratios) for samples, ratios in found.items()}


def _median(layout: Layout, name: str) -> float:
    return statistics.median(one[name] for one in layout.rounds)


def _row(layout: Layout, rate: float) -> Row:
    same = f" (and {', '.join(layout.same)})" if layout.same else ""
    table = f"{rate:.1f} requests a second, half of what singular answers at most"
    about: Row = {"contestant": layout.name + same, "table": table, "shards": len(layout.plan.shards)}
    return about | medians(layout.rounds) | {"p99_of_all_ms": percentile(layout.latencies_ms, 0.99)}


def _about(
    workload: DlrmWorkload, declaration: Declaration, options: ShardOptions, rate: float, costs: CostModel
) -> dict[str, Any]:
    size = sum(table.size_bytes for table in declaration.tables)
    return {
        "name": workload.name,
        "use": workload.use,
        "runs": options.runs,
        "rate": rate,
        "served": {"tables": len(declaration.tables), "bytes": size, "storage": workload.storage.value},
        "flops": {},
        "costs": msgspec.to_builtins(costs),
    }
