"""The suite `schedule` for real and simulated, but short: the contract of its last line, and that nobody is lost."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from rankd.bench.schedule_suite import live_load, live_schedule, mixed_schedule
from rankd.bench.schedule_suite.live_schedule import SHARES
from rankd.bench.schedule_suite.simulated_schedule import fine_buckets
from rankd.bench.workload import DeclaredExecutors, load_workload
from rankd.cli.benchmarks import bench
from rankd.errors import ConfigError
from rankd.schedule.policy import Rules
from rankd.schedule.simulation import Arrival

from .test_serving import TINY

WIDER = TINY.replace("values = [3, 8]", "values = [3, 8, 40]").replace("candidates = [4, 8]", "candidates = [40]")


def test_buckets_of_the_suite() -> None:
    assert fine_buckets(40) == (16, 20, 24, 28, 32, 40)
    assert fine_buckets(10) == (10,)
    buckets = fine_buckets(1000)
    assert buckets[-1] == 1000
    assert {80, 96, 112, 224, 896} < set(buckets)
    assert all(b <= a * 1.26 for a, b in pairwise(buckets))


@pytest.mark.real_run
def test_a_simulated_schedule_ends_with_the_contract(tmp_path: Path) -> None:
    document = run(tmp_path, ["schedule", "--seconds", "1", "--simulate", "--trace", str(recording(tmp_path))])
    assert (document["suite"], document["workload"]["arrivals"]) == ("schedule", "trace.csv")
    ratios, rows = document["ratios"], document["results"]
    assert {row["contestant"] for row in rows} == {"rankd", "fcfs", "fcfs padded"}
    assert 0 < ratios["scheduler_us_p50"] <= ratios["scheduler_us"]
    assert ratios["throughput_gain_padded_simulated"] > 0
    assert ratios["padding_waste"] >= 0


KINDS = """
[[executors]]
name = "quick"
count = 2
call_ms = 0.2
row_ms = 0.1
encode_ms = 2.0

[[executors]]
name = "wide"
count = 1
call_ms = 2.0
row_ms = 0.01
encode_ms = 1.0
most_users = 4
"""


def test_two_kinds_of_executors_beside_the_best_threshold(tmp_path: Path) -> None:
    document = run(tmp_path, ["schedule", "--seconds", "0.5", "--simulate", "--bound-ms", "20"], WIDER + KINDS)
    ratios, rows = document["ratios"], document["results"]
    names = {"rankd, mixed", "best threshold", "rankd, quick", "rankd, wide"}
    assert {row["contestant"] for row in rows} == names
    assert ratios["mixed_vs_best_threshold"] > 0.9  # of 3 s of arrivals
    assert ratios["mixed_vs_best_alone"] > 1.0
    highest = {row["contestant"]: row["rate"] for row in rows if row["table"] == "highest rates"}
    assert set(highest) == names
    gain = highest["rankd, mixed"] / highest["best threshold"]
    assert ratios["mixed_vs_best_threshold"] == pytest.approx(gain, rel=1e-4)
    assert all(ratios[f"mixed_p99_vs_best_threshold_{share:.0%}"] > 0 for share in mixed_schedule.SHARES)
    assert set(document["workload"]["executors"]) == {"quick", "wide"}


def declared(name: str, count: int, call_ms: float, row_ms: float) -> Rules:
    executors = DeclaredExecutors(name, count, call_ms, row_ms, 0.0)
    return mixed_schedule.declared_rules(load_workload("two-kinds"), executors)


def test_a_threshold_is_two_queues() -> None:
    kinds = [declared("quick", 1, 1.0, 0.1), declared("wide", 1, 10.0, 0.01)]
    arrivals = [Arrival(at, rows, prepare_ms=(0.0, 0.0)) for at, rows in ((0.0, 16), (0.0, 1024), (0.001, 16))]
    load = mixed_schedule.ThresholdSweep(kinds, lambda rate: arrivals).load(arrivals)
    short, long = (kinds[kind].costs.score(rows) for kind, rows in ((0, 16), (1, 1024)))
    rows_ms = kinds[0].costs.rows(16), kinds[1].costs.rows(1024)
    found = load.latencies(mixed_schedule.Threshold(0, 16))
    assert found == pytest.approx([short + rows_ms[0], long + rows_ms[1], 2 * (short + rows_ms[0]) - 1.0])
    assert load.best() in (mixed_schedule.Threshold(0, 16), mixed_schedule.Threshold(0, 1024))
    everything = load.latencies(mixed_schedule.Threshold(1, 1024))
    assert everything[2] > everything[1] > everything[0] > 10.0
    sizes = (0, 16, 1024)
    assert {(one.small, one.rows) for one in load.thresholds()} == {(kind, size) for kind in (0, 1) for size in sizes}


def test_the_sweep_finds_the_threshold_that_does_the_most() -> None:
    """Half of the requests with 16 candidates, half with 1,024: each kind does one half by far the best."""
    kinds = [declared("quick", 1, 0.1, 0.1), declared("wide", 1, 5.0, 0.0)]
    gaps = np.random.default_rng(0).exponential(1.0, 2000)

    def at(rate: float) -> list[Arrival]:
        times = np.cumsum(gaps) / rate
        return [Arrival(t, (16, 1024)[n % 2], prepare_ms=(0.0, 0.0)) for n, t in enumerate(times.tolist())]

    rate, threshold = mixed_schedule.ThresholdSweep(kinds, at).highest_rate(50.0, 1000.0)
    assert threshold == mixed_schedule.Threshold(0, 16)
    long_ms = kinds[1].costs.score(1024) + kinds[1].costs.rows(1024)
    assert 0.7 * 2e3 / long_ms < rate < 2e3 / long_ms


def test_a_mix_needs_two_kinds_and_made_up_time(tmp_path: Path) -> None:
    workload = tmp_path / "tiny.toml"
    workload.write_text(WIDER + KINDS + KINDS.split("[[")[1].join(("[[", "")))
    for arguments, says in (
        (["--simulate", "--workload", str(workload)], "3 are given"),
        (["--workload", "small", "--mix", "openvino:1,onnxruntime:1"], "give --simulate too"),
    ):
        done = CliRunner().invoke(bench, ["schedule", *arguments])
        assert isinstance(done.exception, ConfigError)
        assert says in str(done.exception)


@pytest.mark.real_run
def test_two_targets_of_this_machine_are_measured(tmp_path: Path) -> None:
    document = run(tmp_path, ["schedule", "--seconds", "0.3", "--simulate", "--mix", "openvino:1,onnxruntime:1"])
    assert set(document["workload"]["executors"]) == {"openvino", "onnxruntime"}
    assert document["ratios"]["mixed_vs_best_threshold"] > 0


@pytest.mark.real_run
def test_a_live_schedule_ends_with_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a general server that is there in every development environment, and one that does not start."""
    for module, name, few in (
        (live_load, "WARMING", 100), (live_load, "FEWEST", 50), (live_load, "PROBES", 2), (live_schedule, "FEWEST", 50),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, few)
    picture = tmp_path / "curves.svg"
    names = {"rankd", "rankd, deadlines", "one queue, padded", "mosec"}
    arguments = ["schedule", "--seconds", "0.1", "--overload-seconds", "1", "--picture", str(picture)]
    arguments += ["--without", "one queue"]
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\n[ $1 = -c ] || { echo it is broken >&2; exit 3; }\n")
    broken.chmod(0o755)
    document = run(tmp_path, [*arguments, "--peer", "mosec", "--peer", f"litserve={broken}"])
    ratios, rows = document["ratios"], document["results"]
    tables = {row["table"] for row in rows}
    (left_out,) = (row for row in rows if row["table"] == "left out")
    assert (left_out["contestant"], "it is broken" in left_out["why"]) == ("litserve", True)
    assert {row["contestant"] for row in rows} == names | {"load generator", "litserve"}
    assert set(document["parity"]) == {"in-process", *names}
    assert max(document["parity"].values()) <= 0.05  # bfloat16, and each cuts lists elsewhere
    assert {f"capacity, batches of {batch}" for batch in ("1", "4, 10 ms")} <= tables
    for name in (
        "throughput_gain",
        "throughput_gain_with_deadlines",
        "throughput_gain_peers",
        "throughput_gain_padded",
        "latency_gain_tiny_peers",
    ):
        assert ratios[name] > 0
    (overload,) = (row for row in rows if row["table"] == "twice the highest rate")
    assert (overload["lost"], overload["twice"]) == (0, 0)
    assert overload["answered"] + overload["refused"] + overload["late"] > 0
    at = [row for row in rows if "share" in row]
    assert {(row["contestant"], row["share"]) for row in at} == {(name, s) for name in names for s in SHARES}
    (generator,) = (row for row in rows if row["contestant"] == "load generator")
    assert generator["failed"] == 0
    assert 0 < generator["p50_ms"] <= generator["p99_ms"]
    assert all(name in picture.read_text() for name in names)


@pytest.mark.real_run
@pytest.mark.parametrize("scenario", ["server", "offline"])
def test_mlperf_keeps_its_logs(tmp_path: Path, scenario: str) -> None:
    logs = tmp_path / "logs"
    document = run(tmp_path, ["mlperf", "--scenario", scenario, "--logs", str(logs), "--rate", "50", "--seconds", "1"])
    (row,) = document["results"]
    assert row["verdict"] in {"VALID", "INVALID"}
    assert (row["failed"], row["requests"] > 0) == (0, True)
    assert 0 < row["p50_ms"] <= row["p99_ms"]
    assert f"Scenario : {scenario.title()}" in (logs / "mlperf_log_summary.txt").read_text()
    assert (logs / "mlperf_log_detail.txt").stat().st_size > 0


def run(folder: Path, arguments: list[str], text: str = WIDER) -> Any:
    """The last line of a suite over a tiny workload."""
    workload = folder / "tiny.toml"
    workload.write_text(text)
    suite, *options = arguments
    done = CliRunner().invoke(bench, [suite, "--workload", str(workload), *options, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    document = json.loads(done.stdout.splitlines()[-1])
    assert (document["suite"], document["workload"]["name"]) == (suite, "tiny")
    return document


def recording(folder: Path) -> Path:
    """Pairs of requests, ten a second."""
    path = folder / "trace.csv"
    path.write_text("time\n" + "".join(f"{number / 10}\n{number / 10 + 0.001}\n" for number in range(50)))
    return path
