"""The suite `features` for real, but short: the contract of its last line. Nothing here looks at how fast it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from rankd.bench.feature_suite.feature_cells import CellRound, hit_rate
from rankd.bench.feature_suite.feature_report import better, cell_ratios
from rankd.bench.feature_suite.feature_server import (
    ASYNC,
    CONTESTANTS,
    DICT,
    NONE,
    SYNC,
    ServerFigures,
    Setting,
    figures_from,
)
from rankd.bench.feature_suite.redis_process import RedisProcess
from rankd.cli.benchmarks import bench
from rankd.config import read_config
from rankd.errors import ConfigError
from rankd.features.feature_config import Mode
from rankd.serve.settings import ServeConfig

from .test_serving import TINY

NAMES = tuple(contestant.name for contestant in CONTESTANTS)
GAINS = ("throughput_gain", "latency_gain", "capacity_gain", "store_bytes_saved", "hit_rate")


@pytest.fixture
def redis_binary() -> None:
    """Without redis-server the test is skipped, on CI it fails."""
    if shutil.which("redis-server") is None:
        if os.environ.get("CI"):
            pytest.fail("CI has to have redis-server")
        pytest.skip("no redis-server on this machine")


@pytest.mark.real_run
@pytest.mark.usefixtures("redis_binary")
def test_features_ends_with_the_contract(tmp_path: Path) -> None:
    workload = tmp_path / "tiny.toml"
    workload.write_text(TINY)
    sizes = ["--items", "5000", "--candidates", "64", "--delay-ms", "0.2", "--seconds", "0.1", "--runs", "1"]
    done = CliRunner().invoke(
        bench, ["features", "--workload", str(workload), *sizes, "--json"], catch_exceptions=False
    )
    assert done.exit_code == 0
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["suite"] == "features"
    about = document["workload"]
    assert about["delay"] == "proxy"
    assert about["items"] == 5000
    assert about["cached_rows"] == 500
    assert about["row_bytes"] == 256
    assert about["buckets"]["candidates"] == [64]
    assert 0.3 < about["ideal"]["64"]["hit_rate"] < 1
    assert about["rankd"]["64_0.2ms"] in (SYNC.name, ASYNC.name)
    assert about["round_trips_ms"]["64_0.2ms"]["delayed"] > about["round_trips_ms"]["64_0.2ms"]["direct"]
    assert document["parity"]["in-process"] <= 0.05  # bfloat16 where the machine has it
    assert all(document["parity"][name] <= 0.05 for name in NAMES)
    rows = {row["contestant"]: row for row in document["results"] if "delay_ms" in row}
    assert tuple(rows) == NAMES
    for row in rows.values():
        assert row["errors"] == 0
        assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["p999_ms"]
        assert row["rate_at_bound"] > 0
        assert row["throughput"] > 0
    assert rows[NONE.name]["hit_rate"] == 0
    assert rows[NONE.name]["rows_fresh"] == 1
    for name in (DICT.name, SYNC.name, ASYNC.name):
        assert 0 < rows[name]["hit_rate"] < 1
    assert rows[ASYNC.name]["rows_fresh"] < 1 or rows[ASYNC.name]["rows_default"] == 0
    assert {row["contestant"] for row in document["results"]} == {*NAMES, "row cache"}
    ratios = document["ratios"]
    for gain in GAINS:
        assert {gain, f"{gain}_sync", f"{gain}_async", f"{gain}_dict"} <= set(ratios)
    assert 0 < ratios["store_bytes_saved"] < 1
    assert ratios["lookup_us_per_1000"] > 0
    assert ratios["lookup_gain_over_dict"] > 1
    assert 0 < ratios["cache_bytes_over_budget"] <= 1.05


def test_the_better_of_ours_gives_the_plain_ratios() -> None:
    def figures(rate: float, p50: float, read: float, hits: float) -> dict[str, float]:
        return {
            "rate_at_bound": rate,
            "capacity": rate,
            "p50_ms": p50,
            "store_bytes_a_request": read,
            "hit_rate": hits,
        }

    rounds = [
        CellRound(
            {
                NONE.name: figures(10.0, 8.0, 1000.0, 0.0),
                DICT.name: figures(12.0, 8.0, 300.0, 0.7),
                SYNC.name: figures(rate, 5.0, 250.0, 0.75),
                ASYNC.name: figures(20.0, 4.0, 200.0, 0.75),
            }
        )
        for rate in (15.0, 90.0, 18.0)
    ]
    assert better(rounds) == ASYNC.name
    ratios = cell_ratios(rounds)
    assert ratios["throughput_gain"] == ratios["throughput_gain_async"] == 2.0
    assert ratios["throughput_gain_sync"] == 1.8  # the median of its rounds
    assert ratios["latency_gain"] == 2.0
    assert ratios["store_bytes_saved"] == pytest.approx(0.8)
    assert ratios["store_bytes_saved_dict"] == pytest.approx(0.7)


def test_contestants_are_configured_by_variables() -> None:
    setting = Setting(Path("/models"), "redis://127.0.0.1:1/0", Path("/none.parquet"), 26.8, 600.0)
    for contestant in CONTESTANTS:
        config = read_config(ServeConfig, None, setting.variables(contestant))
        features = config.features
        assert features.items.mode is features.users.mode is features.histories.mode is contestant.mode
        assert features.items.budget_mib == (26.8 if contestant.keeps else 0)
        assert (features.histories.budget_mib > 0) is contestant.keeps
        assert features.items.ttl_seconds == 600.0
        assert features.wait_ms >= 10_000
        assert config.histories == "/none.parquet"
    assert [contestant.mode for contestant in CONTESTANTS] == [Mode.SYNC, Mode.SYNC, Mode.SYNC, Mode.ASYNC]


def test_figures_come_from_the_metrics() -> None:
    text = """
# TYPE rankd_feature_rows counter
rankd_feature_rows_total{namespace="m",table="items",source="fresh"} 90
rankd_feature_rows_total{namespace="m",table="items",source="default"} 10
rankd_feature_rows_total{namespace="m",table="users",source="fresh"} 5
# TYPE rankd_feature_fetched_rows counter
rankd_feature_fetched_rows_total{namespace="m",table="items"} 20
# TYPE rankd_feature_shared_rows counter
rankd_feature_shared_rows_total{namespace="m",table="items"} 5
# TYPE rankd_feature_cache_bytes gauge
rankd_feature_cache_bytes{namespace="m",table="items"} 300
rankd_feature_cache_bytes{namespace="m",table="users"} 0
# TYPE rankd_feature_cache_budget_bytes gauge
rankd_feature_cache_budget_bytes{namespace="m",table="items"} 400
rankd_feature_cache_budget_bytes{namespace="m",table="users"} 0
# TYPE rankd_history_bytes gauge
rankd_history_bytes{namespace="m"} 90
# TYPE rankd_history_budget_bytes gauge
rankd_history_budget_bytes{namespace="m"} 100
# TYPE rankd_store_read_bytes counter
rankd_store_read_bytes_total{namespace="m"} 1234
# TYPE rankd_degraded counter
rankd_degraded_total{model="m",version="1",what="items_default"} 2
rankd_degraded_total{model="m",version="1",what="store_down"} 1
# TYPE rankd_states counter
rankd_states_total{model="m",version="1",origin="kept"} 7
"""
    figures = figures_from(text)
    assert figures.rows["fresh"] == 90
    assert figures.rows["stale"] == 0
    assert figures.read_bytes == 1234
    assert figures.degraded == 3
    assert figures.states == {"kept": 7}
    assert figures.cache_bytes == 390
    assert figures.fullest == 0.9
    assert hit_rate(ServerFigures(dict.fromkeys(figures.rows, 0.0)), figures) == 0.75


def test_without_redis_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no redis-server on the PATH; install it"):
        RedisProcess(tmp_path)
