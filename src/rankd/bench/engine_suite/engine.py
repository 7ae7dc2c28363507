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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rankd.artifact import Artifact
from rankd.bench.engine_suite.contestant_messages import (
    CONTESTANTS,
    GPU,
    Contestant,
    Family,
    pack_features,
    unpack_features,
)
from rankd.bench.engine_suite.contestant_process import ContestantProcess
from rankd.bench.engine_suite.engine_findings import Results, Trial, place_of, report_of
from rankd.bench.parity import BOUNDS, max_difference, stored_features, torch_logits
from rankd.bench.peak import gpu_peak_gflops, peak_gflops
from rankd.bench.report import Neighbours, Report, machine
from rankd.bench.state_suite.storage_error import storage_errors
from rankd.bench.synthetic_model import build_model, schema_of, users_for
from rankd.bench.workload import Workload, draw_requests
from rankd.engine.targets import PRECISIONS, TARGETS, check_target, runs_here, why_not, why_not_model
from rankd.errors import ConfigError, EngineFailure, MissingExtra, nearest
from rankd.features.catalogue import Catalogue
from rankd.features.reading.version_features import features_in_memory

REQUESTS = 8
TURN_MS = 300.0
"""What a contestant's turn in a round is to take: some calls of tens of milliseconds, or many of less."""

FEWEST, MOST = 3, 100
"""Calls of a turn."""

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
    return report_of(trial, options.runs, everything, surroundings, chosen, kept)


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


def _versions() -> dict[str, str]:
    """Of the packages that contestants are made with."""
    found = {}
    for package in ("torch", "onnxruntime"):
        if importlib.util.find_spec(package) is not None:
            found[package] = importlib.metadata.version(package)
    return found
