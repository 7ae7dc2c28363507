"""Suite `serve`: what a request costs beside the model. One model, three ways to it, in turn, over several rounds.

    in-process     Ranker.rank from one thread, no server
    http-json      POST /v1/rank
    http-binary    POST /v2/models/<name>/infer, tensors as raw bytes

A round is a fresh server; its first request is kept apart. Closed loop: one connection, `overhead` is the client's wall
time less what the answer says that the engine took (encode + score). Open loop: Poisson arrivals over many connections.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from rankd.artifact import Artifact
from rankd.bench.arrivals import POISSON, Arrivals
from rankd.bench.load import Connection, LoadPlan, LoadResult, generate
from rankd.bench.parity import SAME, against_torch, check_same, features_of, scores_in_process
from rankd.bench.peak import peak_gflops
from rankd.bench.report import Neighbours, Report, Row, commit, machine, medians, percentile, percentiles
from rankd.bench.serve_suite.in_process import InProcessPlan, rank_in_process
from rankd.bench.served_model import ServedModel
from rankd.bench.synthetic_model import model_for, users_for
from rankd.bench.wire_forms import Form, decode_scores, decode_timings, encode_request
from rankd.bench.workload import Workload, draw_requests, returning_share
from rankd.errors import EngineFailure
from rankd.ranker import Ranker
from rankd.types import Float32Array, RankRequest

REQUESTS = 2000
PARITY_REQUESTS = 16
WARMUP = 50
CONNECTIONS = 32
LOAD_SHARE = 0.5
HALF = 0.5
IN_PROCESS = "in-process"

Advance = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """`seconds` of each measurement, of which a round has five; `rate` of the open loop in requests a second, or half
    of what the first round's closed loop did; `model` in place of the workload's own; when requests come in the open
    loop."""

    seconds: float = 3.0
    runs: int = 5
    rate: float | None = None
    model: Path | None = None
    arrivals: Arrivals = POISSON


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a version folder, its requests, and the scores that the first of them have to get."""

    path: Path
    about: Mapping[str, Any]
    requests: list[RankRequest]
    expected: list[Float32Array]
    parity: float
    precision: str

    def candidates(self, indices: Sequence[int]) -> int:
        """How many candidates these requests have in all."""
        return sum(len(self.requests[index].candidates) for index in indices)


@dataclass(frozen=True, slots=True)
class Round:
    """The figures of one round by contestant; `failed` counts the errors, which are added and not averaged."""

    figures: dict[str, dict[str, float]]
    failed: dict[str, int]


def run_serve(workload: Workload, options: ServeOptions, advance: Advance) -> Report:
    """Run the suite.

    Raises:
        MissingExtra: the workload's model has to be made, and torch is not installed.
        EngineFailure: the scores of the contestants differ, or a contestant failed.
        Unavailable: the server did not start.
    """
    steps = 1 + options.runs
    advance(0, steps, "model and parity")
    surroundings = machine()
    with tempfile.TemporaryDirectory(prefix="rankd-bench-") as folder:
        subject = _prepare(workload, options.model, Path(folder) / "built")
        surroundings["peak_gflops_a_thread"] = peak_gflops(subject.precision)
        root = _repository(subject, Path(folder) / "served")
        parity = {IN_PROCESS: subject.parity}
        rate, rounds, neighbours = options.rate, [], Neighbours()
        for number in range(options.runs):
            advance(1 + number, steps, f"round {number + 1}")
            with ServedModel(root) as server:
                cold = _first_request(server, subject)
                parity |= {} if number else _check_forms(server, subject)
                closed = _closed_round(server, subject, options.seconds, number)
                closed.figures[Form.JSON.value] |= cold
                rate = rate or LOAD_SHARE * closed.figures[Form.JSON.value]["requests_a_second"]
                arrivals = options.arrivals.times(rate, options.seconds, workload.seed + number)
                opened = _open_round(server, subject, arrivals, options.seconds, rate)
            rounds.append(Round(closed.figures | opened.figures, closed.failed | opened.failed))
        surroundings["others_cpu_share"] = neighbours.share()
        advance(steps, steps, "done")
    return Report(
        suite="serve",
        workload=_about(workload, subject, options),
        machine=surroundings,
        commit=commit(),
        parity=parity,
        results=_results(rounds, workload, surroundings["peak_gflops_a_thread"]),
        ratios=_ratios(rounds),
    )


def _prepare(workload: Workload, model: Path | None, built: Path) -> Subject:
    """The model, the requests, and parity in process; everything is closed again before a clock runs."""
    source, path = model_for(workload, built) if model is None else ("given", model)
    with Ranker.load(path) as ranker:
        users = users_for(ranker.catalogue, workload)
        name = ranker.manifest.name
        requests = draw_requests(workload, users, ranker.catalogue.ids.items, REQUESTS, name)
        some = requests[:PARITY_REQUESTS]
        expected = scores_in_process(ranker, some)
        parity = against_torch(ranker, some, expected)
        tokens = [float(features_of(ranker, request).history["history_length"].mean()) for request in some]
        precision = ranker.backend.precision.value
        about = {
            "name": name,
            "version": ranker.manifest.version,
            "source": source,
            "precision": precision,
            "users": len(users),
            "tokens_a_block": statistics.mean(tokens),
        }
        return Subject(ranker.artifact.path, about, requests, expected, parity, precision)


def _repository(subject: Subject, root: Path) -> Path:
    """A model repository that holds the measured version alone."""
    manifest = Artifact.open(subject.path).manifest
    (root / manifest.name).mkdir(parents=True)
    (root / manifest.name / manifest.version).symlink_to(subject.path.resolve(), target_is_directory=True)
    return root


def _first_request(server: ServedModel, subject: Subject) -> dict[str, float]:
    """The cold start: the first request that a ready server gets."""
    request = encode_request(Form.JSON, subject.requests[0])
    with closing(Connection(server.host, server.port)) as connection:
        started = time.perf_counter()
        answer = connection.exchange(request)
        cold_ms = (time.perf_counter() - started) * 1e3
    decode_scores(Form.JSON, answer)
    return {"cold_ms": cold_ms}


def _check_forms(server: ServedModel, subject: Subject) -> dict[str, float]:
    """The largest difference of each form's scores to those in process."""
    some = subject.requests[: len(subject.expected)]
    answers = {form: [server.exchange(encode_request(form, request)) for request in some] for form in Form}
    return {
        form.value: check_same(
            form.value, subject.expected, [decode_scores(form, answer) for answer in given], SAME[subject.precision]
        )
        for form, given in answers.items()
    }


def _closed_round(server: ServedModel, subject: Subject, seconds: float, number: int) -> Round:
    """All contestants one after the other; who comes first differs from round to round."""
    contestants: list[Form | None] = [None, *Form]
    turn = number % len(contestants)
    figures, failed = {}, {}
    for form in contestants[turn:] + contestants[:turn]:
        if form is None:
            figures[IN_PROCESS], failed[IN_PROCESS] = _in_process(subject, seconds), 0
        else:
            figures[form.value], failed[form.value] = _closed_loop(server, subject, form, seconds)
    return Round(figures, failed)


def _in_process(subject: Subject, seconds: float) -> dict[str, float]:
    done = rank_in_process(InProcessPlan(str(subject.path), subject.requests, seconds, WARMUP))
    indices = [number % len(subject.requests) for number in range(len(done.latencies_ms))]
    row = _closed_figures(done.latencies_ms, subject.candidates(indices))
    own = {"cold_ms": done.cold_ms, "hit_rate": done.hit_rate}
    return row | _overheads(done.latencies_ms, done.timings_ms) | own


def _closed_loop(server: ServedModel, subject: Subject, form: Form, seconds: float) -> tuple[dict[str, float], int]:
    name = str(subject.about["name"])
    requests = [encode_request(form, request) for request in subject.requests]
    keep = form is Form.JSON
    count, spent_ms = server.engine_statistics(name)
    before = server.state_origins(name)
    plan = LoadPlan(server.host, server.port, requests, seconds=seconds, warmup=WARMUP, keep=keep)
    result = generate(plan)
    new_count, new_spent_ms = server.engine_statistics(name)
    good, latencies = _successes(form.value, result)
    row = _closed_figures(latencies, subject.candidates([result.index[i] for i in good]))
    if keep:
        row |= _overheads(latencies, [decode_timings(result.bodies[i]) for i in good])
    row["overhead_mean_ms"] = statistics.mean(latencies) - (new_spent_ms - spent_ms) / (new_count - count)
    row["hit_rate"] = _hit_rate(before, server.state_origins(name))
    return row, len(result.statuses) - len(good)


def _open_round(server: ServedModel, subject: Subject, arrivals: list[float], seconds: float, rate: float) -> Round:
    """Both forms under the same arrivals."""
    figures, failed = {}, {}
    for form in Form:
        requests = [encode_request(form, request) for request in subject.requests]
        plan = LoadPlan(server.host, server.port, requests, arrivals_s=arrivals, connections=CONNECTIONS, warmup=WARMUP)
        before = server.state_origins(str(subject.about["name"]))
        result = generate(plan)
        hit_rate = _hit_rate(before, server.state_origins(str(subject.about["name"])))
        name = f"{form.value}-open"
        good, latencies = _successes(name, result)
        figures[name] = percentiles(latencies) | {
            "requests": float(len(good)),
            "throughput": subject.candidates([result.index[i] for i in good]) / result.wall_s,
            "rate_planned": rate,
            "rate_offered": len(arrivals) / seconds,
            "rate_achieved": len(good) / max(result.wall_s, seconds),
            "waited_for_connection": float(result.waited),
            "generator_late_p50_ms": percentile(result.late_s, 0.5) * 1e3,
            "generator_late_p99_ms": percentile(result.late_s, 0.99) * 1e3,
            "generator_cpu_share": result.cpu_s / result.wall_s,
            "hit_rate": hit_rate,
        }
        failed[name] = len(result.statuses) - len(good)
    return Round(figures, failed)


def _successes(contestant: str, result: LoadResult) -> tuple[list[int], list[float]]:
    """Places of the requests that were answered well, and their latencies in ms from the scheduled time."""
    good = [place for place, status in enumerate(result.statuses) if status == 200]
    if not good:
        raise EngineFailure(f"{contestant}: none of {len(result.statuses)} requests was answered with 200")
    return good, [(result.done_s[place] - result.scheduled_s[place]) * 1e3 for place in good]


def _hit_rate(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """The share of requests between two looks whose state was not computed from nothing."""
    total = sum(after.values()) - sum(before.values())
    return 1.0 - (after.get("encoded", 0.0) - before.get("encoded", 0.0)) / total if total else 0.0


def _closed_figures(latencies: Sequence[float], candidates: int) -> dict[str, float]:
    spent_s = sum(latencies) / 1e3
    return percentiles(latencies) | {
        "requests": float(len(latencies)),
        "requests_a_second": len(latencies) / spent_s,
        "throughput": candidates / spent_s,
    }


def _overheads(latencies: Sequence[float], timings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Everything but the engine, as the caller sees it and as the ranker does; and the stages at the median."""
    engine = [one["encode"] + one["score"] for one in timings]
    seen = [latency - spent for latency, spent in zip(latencies, engine, strict=True)]
    inside = [one["total"] - spent for one, spent in zip(timings, engine, strict=True)]
    outside = [latency - one["total"] for latency, one in zip(latencies, timings, strict=True)]
    stages = {f"{stage}_p50_ms": percentile([one[stage] for one in timings], 0.5) for stage in timings[0]}
    return {
        **percentiles(seen, "overhead"),
        "overhead_mean_ms": statistics.mean(seen),
        "ranker_overhead_p50_ms": percentile(inside, 0.5),
        "outside_ranker_p50_ms": percentile(outside, 0.5),
        "engine_p50_ms": percentile(engine, 0.5),
        **stages,
    }


def _results(rounds: Sequence[Round], workload: Workload, peak_gflops: float) -> list[Row]:
    rows: list[Row] = []
    flops = workload.flops()
    for contestant in sorted(rounds[0].figures, key=_place):
        row: Row = {"contestant": contestant, "loop": "open" if contestant.endswith("-open") else "closed"}
        row |= medians([one.figures[contestant] for one in rounds])
        row |= {"errors": sum(one.failed[contestant] for one in rounds)}
        if "engine_p50_ms" in row:
            computed = flops.candidates if row["hit_rate"] > HALF else flops.needed  # by the request at the median
            row["engine_share_of_peak"] = computed / (row["engine_p50_ms"] / 1e3) / (peak_gflops * 1e9)
        rows.append(row)
    return rows


def _place(contestant: str) -> tuple[bool, int]:
    names = [IN_PROCESS, *(form.value for form in Form)]
    return contestant.endswith("-open"), names.index(contestant.removesuffix("-open"))


def _ratios(rounds: Sequence[Round]) -> dict[str, float]:
    """Each within one round, then the median of the rounds."""

    def of_round(one: Round) -> dict[str, float]:
        json, binary, direct = (one.figures[name] for name in (Form.JSON.value, Form.BINARY.value, IN_PROCESS))
        return {
            "overhead_share": json["overhead_p50_ms"] / json["p50_ms"],
            "ranker_overhead_share": json["ranker_overhead_p50_ms"] / json["p50_ms"],
            "http_json_over_in_process": json["p50_ms"] / direct["p50_ms"],
            "http_binary_over_http_json": binary["p50_ms"] / json["p50_ms"],
        }

    return medians([of_round(one) for one in rounds])


def _about(workload: Workload, subject: Subject, options: ServeOptions) -> dict[str, Any]:
    flops = workload.flops()
    return {
        **msgspec.to_builtins(workload),
        "flops": {name: getattr(flops, name) for name in flops.__struct_fields__},
        "served": dict(subject.about),
        "returning_share": returning_share(subject.requests),
        "runs": options.runs,
        "seconds": options.seconds,
        "arrivals": options.arrivals.name,
    }
