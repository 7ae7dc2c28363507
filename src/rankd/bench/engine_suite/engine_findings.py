"""What the suite `engine` has found: latencies of each contestant, and the report that they lead to.

In: a Trial, and Results of each number of threads and users. Out: a Report. `engine.py` fills them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rankd.bench.engine_suite.contestant_messages import (
    APPENDED,
    CONTESTANTS,
    GPU,
    Contestant,
    Family,
    Inputs,
    Work,
    together,
)
from rankd.bench.flops import Flops, model_flops
from rankd.bench.report import Report, Row, commit, percentile
from rankd.bench.workload import Workload
from rankd.engine.backend import Precision
from rankd.engine.machine_choice import choice_key, write_choice
from rankd.errors import EngineFailure
from rankd.types import Float32Array

OWN_ON_GPU = f"{Family.RANKD.value}-{GPU}-"
"""How the names of our processes begin that compute on the GPU."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What every contestant gets: the artifact, requests, and the logits (C, K) they have to lead to."""

    workload: Workload
    about: Mapping[str, Any]
    artifact: Path
    scratch: Path
    requests: list[Inputs]
    expected: list[Float32Array]

    def candidates(self, calls: int, users: int) -> int:
        """How many candidates so many calls over the requests in turn score, each for so many users."""
        if users > 1:
            return calls * users * self.requests[0].num_candidates
        return sum(self.requests[number % len(self.requests)].num_candidates for number in range(calls))

    def batches(self, users: int) -> tuple[list[Inputs], list[Float32Array]]:
        """The requests, so many users in each, and their logits (B, C, K)."""
        requests = together(self.requests, users)
        return requests, [np.stack(self.expected[n * users : (n + 1) * users]) for n in range(len(requests))]


@dataclass(slots=True)
class Results:
    """Of one number of threads and one of users, by contestant: milliseconds of every call, and how many of them a turn
    has; parity; the reason of those that are left out. `peaks` are GFLOP/s by where is computed, and precision."""

    threads: int
    users: int = 1
    calls_ms: dict[str, list[float]] = field(default_factory=dict)
    turn: dict[str, int] = field(default_factory=dict)
    parity: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    peaks: dict[tuple[str, Precision], float] = field(default_factory=dict)

    @property
    def suffix(self) -> str:
        """What follows the names of ratios and parities; nothing for one thread and one user."""
        threads, users = self.threads, self.users
        return ("" if threads == 1 else f"_{threads}t") + ("" if users == 1 else f"_{users}u")

    @property
    def setting(self) -> str:
        """As reports name it."""
        return f"{self.threads}t" + ("" if self.users == 1 else f"_{self.users}u")

    def p50(self) -> dict[str, float]:
        """The median of each contestant's calls."""
        return {name: percentile(spent, 0.5) for name, spent in self.calls_ms.items()}

    def leave_out(self, contestant: Contestant, error: EngineFailure) -> None:
        """Go on without it; without our own engine there is nothing to go on for.

        Raises:
            EngineFailure: the contestant is rankd's own.
        """
        if contestant.family is Family.RANKD:
            raise EngineFailure(f"{contestant.name} with {self.threads} threads: {error}") from error
        self.calls_ms.pop(contestant.name, None)
        self.reasons[contestant.name] = str(error).split("\n", 1)[0]


def report_of(
    trial: Trial,
    runs: int,
    everything: Sequence[Results],
    surroundings: Mapping[str, Any],
    chosen: Sequence[Contestant],
    kept: Mapping[str, Mapping[str, float]],
) -> Report:
    """The report. `kept` is what storing states in other types costs."""
    workload = trial.workload
    timed = {CONTESTANTS[name] for one in everything for name in one.calls_ms}
    bf16 = any(one.family is Family.RANKD and one.precision is Precision.BF16 for one in timed)
    precision = Precision.BF16 if bf16 else Precision.FP32
    _keep_choice(workload, everything[0])
    flops = workload.flops()
    needed = {work: work_flops(work, workload, trial.about["tokens_a_block"]) for work in Work}
    rows = [row_of(contestant, one, trial, needed[contestant.work]) for one in everything for contestant in chosen]
    return Report(
        suite="engine",
        workload={
            **msgspec.to_builtins(workload),
            "flops": {name: getattr(flops, name) for name in flops.__struct_fields__},
            "served": dict(trial.about),
            "state_storage": kept,
            "runs": runs,
            "threads": list(dict.fromkeys(one.threads for one in everything)),
            "users_a_call": list(dict.fromkeys(one.users for one in everything)),
            "ratios_of": {one.setting: ours for one in everything if (ours := fastest_own(one.p50(), precision))},
            "best_peer": {
                f"over_best_peer_cold{one.suffix}": peer
                for one in everything
                if (peer := best_peer(one.p50(), fastest_own(one.p50(), precision).startswith(OWN_ON_GPU)))
            },
        },
        machine=surroundings,
        commit=commit(),
        parity={f"{name}{one.suffix}": worst for one in everything for name, worst in one.parity.items()},
        results=rows,
        ratios={
            f"{name}{one.suffix}": ratio
            for one in everything
            for name, ratio in ratios(one.p50(), precision, flops.scaled(one.users), one.peaks).items()
        }
        | {"states_per_gib": kept["bf16"]["states_per_gib"]},
    )


def row_of(contestant: Contestant, results: Results, trial: Trial, flops: float) -> Row:
    name = contestant.name
    row: Row = {"contestant": name, "threads": results.threads, "users": results.users}
    flops *= results.users
    if name in results.reasons:
        return row | {"reason": results.reasons[name]}
    spent, turn = results.calls_ms[name], results.turn[name]
    p50_ms, gflop = percentile(spent, 0.5), flops / 1e9
    row |= {"p50_ms": p50_ms, "p99_ms": percentile(spent, 0.99), "calls": len(spent)}
    if contestant.work in (Work.COLD, Work.WARM):
        row["throughput"] = trial.candidates(turn, results.users) * (len(spent) // turn) / (sum(spent) / 1e3)
    reached, peak = gflop / (p50_ms / 1e3), results.peaks[place_of(contestant), contestant.precision]
    return row | {"gflop_needed": gflop, "gflops_reached": reached, "peak_gflops": peak, "peak_share": reached / peak}


def place_of(contestant: Contestant) -> str:
    """Where it computes: GPU, or "" for the processor."""
    return GPU if contestant.target == GPU else ""


def work_flops(work: Work, workload: Workload, tokens: float) -> float:
    """Operations that a call of this kind needs, whoever does how many more; `tokens` a block for what is appended."""
    flops = workload.flops()
    match work:
        case Work.COLD:
            return flops.needed
        case Work.WARM:
            return flops.candidates
        case Work.ENCODE:
            return flops.needed - flops.candidates
        case Work.EXTEND:
            before = max(tokens - APPENDED / workload.model.blocks, 0.0)
            return model_flops(workload.model, tokens, 0).needed - model_flops(workload.model, before, 0).needed


def fastest_own(p50: Mapping[str, float], precision: Precision) -> str:
    """Our engine's fastest process in a precision, by its cold calls, or else its warm ones; "" if none took part."""
    ours = [c for c in map(CONTESTANTS.__getitem__, p50) if c.family is Family.RANKD and c.precision is precision]
    for work in Work:
        timed = [one for one in ours if one.work is work]
        if timed:
            return min(timed, key=lambda one: p50[one.name]).process
    return ""


def _keep_choice(workload: Workload, results: Results) -> None:
    """Let `target = "auto"` know how long each of our targets takes."""
    timed = {CONTESTANTS[name]: ms for name, ms in results.p50().items()}
    ours = {one: ms for one, ms in timed.items() if one.family is Family.RANKD and one.work is Work.COLD}
    if len({one.target for one in ours}) > 1:
        write_choice(workload.name, {choice_key(one.target, one.precision): ms for one, ms in ours.items()})


def best_peer(p50: Mapping[str, float], on_gpu: bool = False) -> str | None:
    """The fastest contestant there that is neither ours nor a baseline; None where there was none."""
    peers = [
        name
        for name, one in ((name, CONTESTANTS[name]) for name in p50)
        if one.family is not Family.RANKD and not one.is_baseline and (one.target == GPU) is on_gpu
    ]
    return min(peers, key=p50.__getitem__, default=None)


def ratios(
    p50: Mapping[str, float], precision: Precision, flops: Flops, peaks: Mapping[tuple[str, Precision], float]
) -> dict[str, float]:
    """What others take over what our engine takes in the given precision, as far as they took part; and how much of
    the measured peak (GFLOP/s, `Results.peaks`) our cold call reaches. Ours on a GPU is compared with others there, and
    with torch in the same precision."""
    ours = fastest_own(p50, precision)
    on_gpu = ours.startswith(OWN_ON_GPU)
    peer = best_peer(p50, on_gpu)
    eager, tuned = (f"eager-{GPU}-{precision.value}", "") if on_gpu else ("eager-fp32", "eager-fp32-fast")
    pairs = {
        "speedup_cold": (eager, f"{ours}-cold"),
        "speedup_cold_tuned": (tuned, f"{ours}-cold"),
        "speedup_warm": (eager, f"{ours}-warm"),
        "speedup_warm_tuned": (tuned, f"{ours}-warm"),
        "over_best_peer_cold": (peer or "", f"{ours}-cold"),
        "extend_over_encode": (f"{ours}-extend", f"{ours}-encode"),
    }
    found = {name: p50[a] / p50[b] for name, (a, b) in pairs.items() if a in p50 and b in p50}
    peak = peaks.get((GPU if on_gpu else "", precision))
    if peak and f"{ours}-cold" in p50:
        found["peak_share"] = flops.needed / 1e9 / (p50[f"{ours}-cold"] / 1e3) / peak
    return found
