"""What the suite `features` found, as rows, ratios and a description. In: rounds of cells. Out: parts of a Report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from rankd.bench.feature_suite.feature_cells import Cell, CellRound
from rankd.bench.feature_suite.feature_rows import ROW_BYTES
from rankd.bench.feature_suite.feature_server import ASYNC, CONTESTANTS, DICT, NONE, SYNC
from rankd.bench.feature_suite.feature_subject import FeatureOptions, Subject
from rankd.bench.report import Row, medians

OURS = (SYNC.name, ASYNC.name)
KEPT = (*OURS, DICT.name)
LOOKUPS_TABLE = "look-ups in process"
IDEAL_REQUESTS = 512


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Requests that each contestant got, the hit rates over the last of them, and whether they moved no more."""

    requests: int
    hit_rates: Mapping[str, float]
    steady: bool


@dataclass(slots=True)
class Measured:
    """Everything that was found: `resident_mib` of the servers, and `round_trips_ms` to the store by delay."""

    placement: str
    parity: dict[str, float]
    warm_up: WarmUp = WarmUp(0, {}, False)
    cells: list[tuple[Cell, list[CellRound]]] = field(default_factory=list)
    resident_mib: dict[str, dict[str, float]] = field(default_factory=dict)
    round_trips_ms: dict[str, dict[str, float]] = field(default_factory=dict)


def results(subject: Subject, measured: Measured) -> list[Row]:
    """A row for each contestant of each cell, and two for the look-ups."""
    rows: list[Row] = []
    for cell, rounds in measured.cells:
        for contestant in CONTESTANTS:
            name = contestant.name
            row: Row = {"contestant": name, "table": cell.title, "candidates": cell.candidates}
            row |= {"delay_ms": cell.delay_s * 1e3} | medians([one.figures[name] for one in rounds])
            rows.append(row | {"errors": sum(one.failed[name] for one in rounds)})
    found = subject.lookups
    rows += [
        {
            "contestant": "row cache",
            "table": LOOKUPS_TABLE,
            "us_per_1000": found.us_per_1000,
            "hit_rate": found.found,
            "bytes_a_row": found.bytes_a_row,
        },
        {
            "contestant": DICT.name,
            "table": LOOKUPS_TABLE,
            "us_per_1000": found.dict_us_per_1000,
            "hit_rate": found.dict_found,
            "bytes_a_row": found.dict_bytes_a_row,
        },
    ]
    return rows


def ratios(subject: Subject, measured: Measured) -> dict[str, float]:
    """Those of the first cell by their plain names; where there are several cells, those of each with its suffix."""
    named: dict[str, float] = {}
    for number, (cell, rounds) in enumerate(measured.cells):
        of_cell = cell_ratios(rounds)
        if number == 0:
            named |= of_cell
        if len(measured.cells) > 1:
            named |= {f"{name}_{cell.suffix}": value for name, value in of_cell.items()}
    everything = [one.figures[name] for _, rounds in measured.cells for one in rounds for name in OURS]
    return named | {
        "lookup_us_per_1000": subject.lookups.us_per_1000,
        "lookup_gain_over_dict": subject.lookups.dict_us_per_1000 / subject.lookups.us_per_1000,
        "cache_bytes_over_budget": max(figures["cache_over_budget"] for figures in everything),
    }


def cell_ratios(rounds: Sequence[CellRound]) -> dict[str, float]:
    """Each within one round, then the median of the rounds; without a contestant's name those of the better of ours."""
    found = {name: medians([_round_ratios(one, name) for one in rounds]) for name in KEPT}
    plain = found[better(rounds)]
    return plain | {f"{ratio}_{name}": value for name in KEPT for ratio, value in found[name].items()}


def better(rounds: Sequence[CellRound]) -> str:
    """The one of ours that does more under the bound."""
    return max(OURS, key=lambda name: statistics.median(one.figures[name]["rate_at_bound"] for one in rounds))


def _round_ratios(one: CellRound, name: str) -> dict[str, float]:
    none, kept = one.figures[NONE.name], one.figures[name]
    return {
        "throughput_gain": kept["rate_at_bound"] / none["rate_at_bound"],
        "latency_gain": none["p50_ms"] / kept["p50_ms"],
        "capacity_gain": kept["capacity"] / none["capacity"],
        "store_bytes_saved": 1.0 - kept["store_bytes_a_request"] / none["store_bytes_a_request"],
        "hit_rate": kept["hit_rate"],
    }


def about(subject: Subject, options: FeatureOptions, measured: Measured) -> dict[str, Any]:
    """The workload as it was measured, and all that a reader has to know of it."""
    workload = subject.workload
    flops = workload.flops()
    return {
        **msgspec.to_builtins(workload),
        "flops": {name: getattr(flops, name) for name in flops.__struct_fields__},
        "served": dict(subject.about),
        "runs": options.runs,
        "seconds": options.seconds,
        "item_zipf_exponent": 1.0,
        "row_bytes": ROW_BYTES,
        "cached_rows": subject.slots,
        "cache_budget_bytes": subject.budget_bytes,
        "ttl_seconds": options.ttl_seconds,
        "delay": "proxy",
        "round_trips_ms": measured.round_trips_ms,
        "placement": measured.placement,
        "warm_up": {
            "requests": measured.warm_up.requests,
            "steady": measured.warm_up.steady,
            "hit_rates": dict(measured.warm_up.hit_rates),
        },
        "resident_mib": measured.resident_mib,
        "ideal": {str(count): _ideal(subject, measured, count) for count in subject.requests},
        "rankd": {cell.suffix: better(rounds) for cell, rounds in measured.cells},
    }


def _ideal(subject: Subject, measured: Measured, candidates: int) -> dict[str, float]:
    """What a cache would do that holds the most popular rows, and all histories: nothing of that size can do better."""
    popular = subject.requests[candidates].share_of_popular(subject.slots, IDEAL_REQUESTS)
    rounds = next(rounds for cell, rounds in measured.cells if cell.candidates == candidates)
    asked = statistics.median(one.figures[NONE.name]["store_bytes_a_request"] for one in rounds)
    return {"hit_rate": popular, "store_bytes_saved": 1.0 - (1.0 - popular) * candidates * ROW_BYTES / asked}
