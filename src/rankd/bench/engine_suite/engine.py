"""Suite `engine`: the model alone. The same requests to torch, its compiler, its exports and our engine, in turn.

In: a workload and the names of contestants. Out: a Report. Each contestant is a process of its own (those of our
engine share one a precision); in a round each runs a few calls while the others wait. Scores are checked before any
clock runs. Next: `contestants.py` is what runs inside of a process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rankd.artifact import Artifact
from rankd.bench.engine_suite.contestant_messages import (
    APPENDED,
    CONTESTANTS,
    GPU,
    Contestant,
    Family,
    Inputs,
    Work,
    pack_features,
    together,
    unpack_features,
)
from rankd.bench.engine_suite.contestant_process import ContestantProcess
from rankd.bench.flops import Flops, model_flops
from rankd.bench.parity import BOUNDS, max_difference, stored_features, torch_logits
from rankd.bench.peak import gpu_peak_gflops, peak_gflops
from rankd.bench.report import Neighbours, Report, Row, commit, machine, percentile
from rankd.bench.state_suite.storage_error import storage_errors
from rankd.bench.synthetic_model import build_model, schema_of, users_for
from rankd.bench.workload import Workload, draw_requests
from rankd.engine.backend import Precision
from rankd.engine.machine_choice import choice_key, write_choice
from rankd.engine.targets import PRECISIONS, TARGETS, check_target, runs_here, why_not, why_not_model
from rankd.errors import ConfigError, EngineFailure, MissingExtra, nearest
from rankd.features.catalogue import Catalogue
from rankd.features.reading.version_features import features_in_memory
from rankd.types import Float32Array

REQUESTS = 8
TURN_MS = 300.0
"""What a contestant's turn in a round is to take: some calls of tens of milliseconds, or many of less."""

FEWEST, MOST = 3, 100
"""Calls of a turn."""

OWN_ON_GPU = f"{Family.RANKD.value}-{GPU}-"
"""How the names of our processes begin that compute on the GPU."""

Advance = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Threads of a call and users in one, one after the other; rounds; names of contestants, none for all of them, or
    for all who compute where `target` does."""

    threads: tuple[int, ...] = (1, 2)
    runs: int = 7
    contestants: tuple[str, ...] = ()
    target: str = ""
    users: tuple[int, ...] = (1,)

    def settings(self) -> list[tuple[int, int]]:
        """Threads and users of everything that is measured."""
        return [(threads, users) for threads in self.threads for users in self.users]


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


def run_engine(workload: Workload, options: EngineOptions, advance: Advance) -> Report:
    """Run the suite.

    Raises:
        ConfigError: no contestant of such a name, no such target, a target that this machine or model is not for, or
            several users in a call of a workload whose requests are not alike.
        MissingExtra: torch is not installed; the scores are checked against it.
        EngineFailure: our own engine failed, or its scores differ from torch's.
    """
    chosen = choose(options.contestants, options.target)
    if options.target and (reason := unsuitable(options.target, workload)):
        raise ConfigError(f"--target {options.target} cannot compute workload '{workload.name}' here: {reason}")
    if importlib.util.find_spec("torch") is None:
        raise MissingExtra("rankd bench engine", "train")
    processes = len({contestant.process for contestant in chosen})
    steps = 1 + len(options.settings()) * (processes + options.runs)
    surroundings = machine() | _versions()
    neighbours, everything = Neighbours(), []
    advance(0, steps, "model")
    with tempfile.TemporaryDirectory(prefix="rankd-bench-") as folder:
        wanted = {one.target for one in chosen}
        usable = tuple(target for target in TARGETS if target in wanted and not unsuitable(target, workload))
        built = tuple(dict.fromkeys((*usable, "openvino")))
        trial = prepare(workload, Path(folder), built, max(REQUESTS, *options.users))
        for number, (threads, users) in enumerate(options.settings()):
            done, told = 1 + number * (processes + options.runs), f"threads: {threads}, users: {users}"

            def step(count: int, line: str, done: int = done, told: str = told) -> None:
                advance(done + count, steps, f"{line}, {told}")

            everything.append(compete(trial, chosen, threads, options.runs, step, users))
        kept = storage_errors(Artifact.open(trial.artifact), [unpack_features(one) for one in trial.requests])
    surroundings["others_cpu_share"] = neighbours.share()
    advance(steps, steps, "done")
    return _report(options, trial, everything, surroundings, chosen, kept)


def choose(names: Sequence[str], target: str = "") -> list[Contestant]:
    """Contestants in the order of the report; all of them if no names are given. With a target our own is that one, and
    others are those that compute in the same place, on a GPU or on the processor.

    Raises:
        ConfigError: no such contestant or target.
    """
    if target:
        check_target(target)
    for name in names:
        if name not in CONTESTANTS:
            raise ConfigError(
                f"unknown contestant '{name}'; there is: {', '.join(CONTESTANTS)}.{nearest(name, CONTESTANTS)}"
            )

    def beside(one: Contestant) -> bool:
        return one.target == target if one.family is Family.RANKD else (one.target == GPU) is (target == GPU)

    named = [one for name, one in CONTESTANTS.items() if not names or name in names]
    return [one for one in named if not target or beside(one)]


def unsuitable(target: str, workload: Workload) -> str:
    """Why a target cannot run a workload's model on this machine; empty if it can."""
    if not runs_here(target):
        return next(reason for p in PRECISIONS[target] if (reason := why_not(target, p)))
    return why_not_model(target, workload.model.kind.value, workload.model.options(), schema_of(workload))


def prepare(workload: Workload, folder: Path, targets: tuple[str, ...], count: int = REQUESTS) -> Trial:
    """The model, built for the targets, `count` requests, and what torch makes of them."""
    source, path = "random weights", build_model(workload, folder / "built", targets)
    artifact = Artifact.open(path)
    catalogue = Catalogue.load(artifact.path / "tables", artifact.schema)
    features, users = features_in_memory(artifact.schema, catalogue), users_for(catalogue, workload)
    drawn = draw_requests(workload, users, catalogue.ids.items, count)
    requests = [stored_features(features, request) for request in drawn]
    tokens = [float(one.history["history_length"].mean()) for one in requests]
    about = {
        "name": artifact.manifest.name,
        "version": artifact.manifest.version,
        "source": source,
        "tokens_a_block": statistics.mean(tokens),
        "candidates": statistics.mean(one.num_candidates for one in requests),
    }
    expected = torch_logits(artifact, requests)
    return Trial(workload, about, artifact.path, folder, [pack_features(one) for one in requests], expected)


def compete(
    trial: Trial,
    chosen: Sequence[Contestant],
    threads: int,
    runs: int,
    step: Callable[[int, str], None],
    users: int = 1,
) -> Results:
    """All contestants with so many threads and users in a call: start, check, then the rounds.

    Raises:
        ConfigError: several users, and the requests are not alike.
        EngineFailure: our own engine failed, or its scores differ from torch's.
    """
    results = Results(threads, users)
    chosen = [one for one in chosen if users == 1 or one.work is not Work.EXTEND]  # a user's, whoever else is there
    members: dict[str, list[Contestant]] = {}
    for contestant in chosen:
        members.setdefault(contestant.process, []).append(contestant)
    with ExitStack() as stack:
        ready: list[tuple[Contestant, ContestantProcess]] = []
        for number, (name, group) in enumerate(members.items()):
            step(number, name)
            ready += _admit(trial, group, results, stack)
        for place, precision in dict.fromkeys((place_of(contestant), contestant.precision) for contestant, _ in ready):
            peak = gpu_peak_gflops(precision.value) if place == GPU else peak_gflops(precision.value, threads)
            results.peaks[place, precision] = peak
        for number in range(runs):
            step(len(members) + number, f"round {number + 1}")
            _round(ready, number, results)
    return results


def _admit(
    trial: Trial, group: Sequence[Contestant], results: Results, stack: ExitStack
) -> list[tuple[Contestant, ContestantProcess]]:
    """Start the process of these contestants; those that give the right scores, each with it."""
    target = group[0].target or "openvino"
    reason = why_not(target, group[0].precision) or unsuitable(target, trial.workload)
    if reason:
        results.reasons |= {contestant.name: reason for contestant in group}
        return []
    ready = []
    requests, expected = trial.batches(results.users)
    with ExitStack() as own:
        try:
            process = own.enter_context(ContestantProcess(group[0], results.threads, trial.scratch))
            process.load(trial.artifact, requests)
            for contestant in group:
                difference = max_difference(expected, process.scores(contestant))
                bound = BOUNDS[contestant.precision.value]
                if not difference <= bound:
                    raise EngineFailure(f"its scores differ from torch by {difference:.3g}; allowed is {bound:g}")
                results.parity[contestant.name] = difference
                ready.append((contestant, process))
        except EngineFailure as error:
            for contestant in group:
                results.leave_out(contestant, error)
            return []
        stack.push(own.pop_all())
    return ready


def _round(ready: Sequence[tuple[Contestant, ContestantProcess]], number: int, results: Results) -> None:
    """A turn for each contestant; who comes first differs from round to round."""
    turn = number % max(len(ready), 1)
    for contestant, process in (*ready[turn:], *ready[:turn]):
        name = contestant.name
        if name in results.reasons:
            continue
        try:
            if name not in results.turn:
                typical = statistics.median(process.time(contestant, FEWEST))
                results.turn[name] = min(max(round(TURN_MS / max(typical, 1e-3)), FEWEST), MOST)
            results.calls_ms.setdefault(name, []).extend(process.time(contestant, results.turn[name]))
        except EngineFailure as error:
            results.leave_out(contestant, error)


def _report(
    options: EngineOptions,
    trial: Trial,
    everything: Sequence[Results],
    surroundings: Mapping[str, Any],
    chosen: Sequence[Contestant],
    kept: Mapping[str, Mapping[str, float]],
) -> Report:
    workload = trial.workload
    timed = {CONTESTANTS[name] for one in everything for name in one.calls_ms}
    bf16 = any(one.family is Family.RANKD and one.precision is Precision.BF16 for one in timed)
    precision = Precision.BF16 if bf16 else Precision.FP32
    _keep_choice(workload, everything[0])
    flops = workload.flops()
    needed = {work: work_flops(work, workload, trial.about["tokens_a_block"]) for work in Work}
    rows = [_row(contestant, one, trial, needed[contestant.work]) for one in everything for contestant in chosen]
    return Report(
        suite="engine",
        workload={
            **msgspec.to_builtins(workload),
            "flops": {name: getattr(flops, name) for name in flops.__struct_fields__},
            "served": dict(trial.about),
            "state_storage": kept,
            "runs": options.runs,
            "threads": list(options.threads),
            "users_a_call": list(options.users),
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


def _row(contestant: Contestant, results: Results, trial: Trial, flops: float) -> Row:
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


def _versions() -> dict[str, str]:
    """Of the packages that contestants are made with."""
    found = {}
    for package in ("torch", "onnxruntime"):
        if importlib.util.find_spec(package) is not None:
            found[package] = importlib.metadata.version(package)
    return found
