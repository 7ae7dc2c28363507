"""The contestant without a server: `Ranker.rank` from one thread, in a process of its own.

python -m rankd.bench.serve_suite.in_process < InProcessPlan (msgpack) > InProcessResult (msgpack)
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from itertools import cycle, islice

import msgspec

from rankd.errors import EngineFailure
from rankd.types import RankRequest


class InProcessPlan(msgspec.Struct, frozen=True):
    """A version folder and the requests to rank in turn for so many seconds, after `warmup` uncounted ones."""

    model: str
    requests: list[RankRequest]
    seconds: float
    warmup: int


class InProcessResult(msgspec.Struct, frozen=True):
    """Latencies and stage timings of each request; `load_s` from the call of `Ranker.load` to ready, `cold_ms` of the
    first request, `hit_rate` the share of states that were not computed from nothing."""

    load_s: float
    cold_ms: float
    latencies_ms: list[float]
    timings_ms: list[dict[str, float]]
    hit_rate: float


def rank_in_process(plan: InProcessPlan) -> InProcessResult:
    """Run a plan in a fresh process.

    Raises:
        EngineFailure: it did not end well.
    """
    done = subprocess.run(
        [sys.executable, "-m", "rankd.bench.serve_suite.in_process"],
        input=msgspec.msgpack.encode(plan),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise EngineFailure(f"ranking in process failed: {done.stderr.decode(errors='replace')[-2000:]}")
    return msgspec.msgpack.decode(done.stdout, type=InProcessResult)


def run(plan: InProcessPlan) -> InProcessResult:
    """Load, warm up, measure."""
    from rankd.ranker import Ranker

    started = time.perf_counter()
    with Ranker.load(plan.model) as ranker:
        load_s = time.perf_counter() - started
        started = time.perf_counter()
        ranker.rank(plan.requests[0])
        cold_ms = (time.perf_counter() - started) * 1e3
        for request in islice(cycle(plan.requests), plan.warmup):
            ranker.rank(request)
        gc.collect()
        latencies, timings, encoded = [], [], 0
        end = time.perf_counter() + plan.seconds
        for request in cycle(plan.requests):
            started = time.perf_counter()
            if started >= end:
                break
            scores = ranker.rank(request)
            latencies.append((time.perf_counter() - started) * 1e3)
            timings.append(dict(scores.timings_ms))
            encoded += scores.state == "encoded"
    return InProcessResult(load_s, cold_ms, latencies, timings, 1.0 - encoded / len(latencies))


def main() -> None:
    """Standard input to standard output."""
    plan = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=InProcessPlan)
    sys.stdout.buffer.write(msgspec.msgpack.encode(run(plan)))


if __name__ == "__main__":
    main()
