"""The suite `schedule` for real and simulated, but short: the contract of its last line, and that nobody is lost."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rankd.bench.schedule_suite.live_schedule import SHARES
from rankd.bench.schedule_suite.simulated_schedule import fine_buckets
from rankd.cli.benchmarks import bench

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


@pytest.mark.real_run
def test_a_live_schedule_ends_with_the_contract(tmp_path: Path) -> None:
    """Beside a general server that is there in every development environment, and one that does not start."""
    picture = tmp_path / "curves.svg"
    names = {"rankd", "rankd, deadlines", "one queue, padded", "mosec"}
    arguments = ["schedule", "--seconds", "0.2", "--overload-seconds", "1", "--picture", str(picture)]
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


def run(folder: Path, arguments: list[str]) -> Any:
    """The last line of a suite over a tiny workload."""
    workload = folder / "tiny.toml"
    workload.write_text(WIDER)
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
