"""The suite `schedule` for real and simulated, but short: the contract of its last line, and that nobody is lost."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from rankd.bench.schedule_suite.live_schedule import CONTESTANTS
from rankd.bench.schedule_suite.simulated_schedule import fine_buckets
from rankd.cli.benchmarks import bench

from .test_serving import TINY

WIDER = TINY.replace("values = [3, 8]", "values = [3, 8, 40]").replace("candidates = [4, 8]", "candidates = [40]")


def test_four_buckets_an_octave() -> None:
    assert fine_buckets(40) == (16, 20, 24, 28, 32, 40)
    assert fine_buckets(10) == (10,)
    buckets = fine_buckets(1000)
    assert buckets[-1] == 1000
    assert all(b <= a * 1.26 for a, b in pairwise(buckets))


@pytest.mark.real_run
@pytest.mark.parametrize("how", ["--simulate", "--overload-seconds=1"])
def test_schedule_ends_with_the_contract(tmp_path: Path, how: str) -> None:
    workload = tmp_path / "tiny.toml"
    workload.write_text(WIDER)
    arguments = ["schedule", "--workload", str(workload), "--seconds", "1", how, "--json"]
    done = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    document = json.loads(done.stdout.splitlines()[-1])
    assert (document["suite"], document["workload"]["name"]) == ("schedule", "tiny")
    ratios, rows = document["ratios"], document["results"]
    assert ratios["padding_waste"] >= 0
    if how == "--simulate":
        assert {row["contestant"] for row in rows} == {"rankd", "fcfs", "fcfs padded"}
        assert 0 < ratios["scheduler_us_p50"] <= ratios["scheduler_us"]
        assert ratios["throughput_gain_padded_simulated"] > 0
        return
    assert {one.name for one in CONTESTANTS} == {row["contestant"] for row in rows}
    assert set(document["parity"]) == {"in-process", *(one.name for one in CONTESTANTS)}
    assert ratios["throughput_gain"] > 0
    (overload,) = (row for row in rows if row["table"] == "twice the highest rate")
    assert overload["lost"] == 0
    assert overload["answered"] + overload["refused"] + overload["late"] > 0
    assert all(row["failed"] == 0 for row in rows if row is not overload)
