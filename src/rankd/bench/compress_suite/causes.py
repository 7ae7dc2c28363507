"""What was measured of all stages, and what follows: how much each cause gives, and the ratios of the suite.

In: latencies and rates by stage, the gate's records. Out: rows and ratios of the Report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from rankd.bench.compress_suite.stages import FAST, INT8, LIBRARY, MASKED, PRUNED, STATES, TORCH
from rankd.bench.report import Row, percentile, percentiles
from rankd.gate_record import Compression, GateRecord


@dataclass(frozen=True, slots=True)
class Figures:
    """By stage: milliseconds of all single requests, and the highest rate; every rate that was tried; and how the gate
    judged the stages that are compressed."""

    calls_ms: Mapping[str, Sequence[float]]
    rates: Mapping[str, float]
    tried: Sequence[Row]
    gates: Mapping[str, GateRecord]

    def p50(self, stage: str) -> float:
        """The median latency of a single request."""
        return percentile(self.calls_ms[stage], 0.5)

    @property
    def baselines(self) -> dict[str, str]:
        """The uncompressed model in torch, by what follows the names of ratios over it."""
        return {suffix: name for suffix, name in (("", FAST), ("_as_shipped", TORCH)) if name in self.calls_ms}

    @property
    def cold(self) -> str:
        """The compressed stage that serves: int8 if it was made and is quicker here."""
        return min((name for name in (PRUNED, INT8) if name in self.calls_ms), key=self.p50)


def gates_of(made: Compression) -> dict[str, GateRecord]:
    """The gate's record of each compressed stage."""
    return {PRUNED: made.gate} | ({INT8: made.int8.gate} if made.int8 else {})


def rows_of(figures: Figures) -> list[Row]:
    """All of it as rows of a report."""
    rows: list[Row] = [
        {"contestant": name, "table": "one request at a time", **percentiles(calls), "requests": len(calls)}
        for name, calls in figures.calls_ms.items()
    ]
    rows += [{"contestant": name, "table": "highest rates", "rate": rate} for name, rate in figures.rates.items()]
    causes = causes_of(figures)
    whole = {kind: math.prod(factors[kind] for factors in causes.values()) for kind in ("latency", "throughput")}
    over = next(iter(figures.baselines.values()))
    rows += [
        {"contestant": cause, "table": f"factor by cause, over '{over}'", **factors}
        for cause, factors in (causes | {"all together": whole}).items()
    ]
    for stage, gate in figures.gates.items():
        about = f"accuracy of '{stage}', {gate.since} to {gate.until}, {gate.num_users} users"
        rows += [
            {"contestant": name, "table": about, **msgspec.structs.asdict(one)} for name, one in gate.metrics.items()
        ]
    return rows + [row | {"table": "every rate that was tried"} for row in figures.tried]


def causes_of(figures: Figures) -> dict[str, dict[str, float]]:
    """Factors of p50 and of the highest rate between a stage and the one before it; the last is of requests with states
    kept. Where int8 is slower than floats it does not serve, and its factor is 1."""
    cold = figures.cold
    chain = {
        "library alone": (next(iter(figures.baselines.values())), LIBRARY),
        "mask-aware": (LIBRARY, MASKED),
        "pruning": (MASKED, PRUNED),
        "quantization": (PRUNED, cold),
        "user state": (cold, cold + STATES),
    }
    return {
        cause: {
            "latency": figures.p50(before) / figures.p50(after),
            "throughput": figures.rates[after] / figures.rates[before],
        }
        for cause, (before, after) in chain.items()
    }


def ratios_of(figures: Figures) -> dict[str, float]:
    """Shares of the baseline's p50 and gains of rate over it, cold and warm, with MKL's fast path and as shipped; what
    compression gives on the same engine; what of the accuracy is kept."""
    cold = figures.cold
    ratios = {"compression_gain": figures.p50(MASKED) / figures.p50(cold)}
    for suffix, base in figures.baselines.items():
        for which, stage in (("cold", cold), ("warm", cold + STATES)):
            ratios[f"latency_share_{which}{suffix}"] = figures.p50(stage) / figures.p50(base)
            ratios[f"throughput_gain_{which}{suffix}"] = figures.rates[stage] / figures.rates[base]
    if INT8 in figures.calls_ms:
        ratios["int8_gain"] = figures.p50(PRUNED) / figures.p50(INT8)
    return ratios | {f"accuracy_share_{name}": one.kept for name, one in figures.gates[cold].metrics.items()}
