"""Statistics, and the one line that every suite ends with."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rankd.bench.report import Neighbours, Report, commit, machine, medians, percentile, percentiles, print_report


def report() -> Report:
    row = {"contestant": "a", "loop": "closed", "p50_ms": 0.123456789, "throughput": 1e6, "errors": 0}
    return Report(
        suite="serve",
        workload={"name": "w", "use": "tests", "flops": {"useful": 1e9}, "served": {"name": "m"}, "runs": 1},
        machine={"cpu": "c", "cores": 2},
        commit="abc",
        parity={"a": 0.0},
        results=[row],
        ratios={"x": 2.0},
    )


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([3.0], 0.5, 3.0),
        ([3.0], 0.999, 3.0),
        ([4.0, 1.0, 3.0, 2.0], 0.5, 2.0),
        ([4.0, 1.0, 3.0, 2.0], 0.51, 3.0),
        ([float(n) for n in range(1, 101)], 0.99, 99.0),
        ([float(n) for n in range(1, 101)], 0.999, 100.0),
        ([float(n) for n in range(1, 1001)], 0.999, 999.0),
        ([1.0, 2.0], 0.0, 1.0),
    ],
)
def test_percentile_is_the_nearest_rank(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == expected


def test_percentiles_are_named() -> None:
    assert percentiles([1.0]) == {"p50_ms": 1.0, "p99_ms": 1.0, "p999_ms": 1.0}
    assert list(percentiles([1.0], "overhead")) == ["overhead_p50_ms", "overhead_p99_ms", "overhead_p999_ms"]


def test_medians_are_of_each_figure() -> None:
    assert medians([{"a": 1.0, "b": 9.0}, {"a": 3.0, "b": 7.0}, {"a": 2.0, "b": 8.0}]) == {"a": 2.0, "b": 8.0}


def test_line_is_the_contract() -> None:
    line = report().line()
    assert "\n" not in line
    document = json.loads(line)
    assert list(document) == ["suite", "workload", "machine", "commit", "parity", "results", "ratios"]
    assert document["results"][0] == {
        "contestant": "a",
        "loop": "closed",
        "p50_ms": 0.123457,
        "throughput": 1e6,
        "errors": 0,
    }


def test_tables_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(report())
    shown = capsys.readouterr().out
    for part in ("workload w", "1 useful", "p50_ms", "0.1235", "1,000,000", "ratios: x 2"):
        assert part in shown


def test_a_busy_machine_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    busy = replace(report(), machine={"cpu": "c", "cores": 2, "others_cpu_share": 0.4})
    print_report(busy)
    assert "other programs used 40% of the processors" in capsys.readouterr().out


def test_neighbours_take_a_share_of_the_processors() -> None:
    share = Neighbours().share()
    assert share is None or 0.0 <= share <= 1.0


def test_machine_and_commit_are_named() -> None:
    about = machine()
    assert about["cpu"]
    assert about["cores"] >= 1
    assert about["openvino"][0].isdigit()
    assert commit()
