"""The suite `shards` for real, but short: the contract of its last line, and that its parts add up."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from rankd.bench.shard_suite import sharding
from rankd.bench.shard_suite.dlrm_workload import load_dlrm
from rankd.bench.shard_suite.measured_costs import CostOptions
from rankd.bench.shard_suite.open_loop import PARTS
from rankd.bench.shard_suite.sharding import ShardOptions
from rankd.bench.table_suite.table_lookups import TableOptions
from rankd.cli.benchmarks import bench
from rankd.errors import ConfigError
from rankd.plan.costs_file import read_costs

TABLES = """
name = "tiny"
tables = [
    { name = "a", rows = 200, dim = 8 },
    { name = "b", rows = 30, dim = 8 },
    { name = "c", rows = 3, dim = 8 },
]
statistics = [{ table = "a", lookups = 5 }, { table = "b", lookups = 2 }]
"""
WORKLOAD = """
name = "tiny"
use = "tests"
tables = "{tables}"
numbers = 3
bottom = [8]
top = [8]
cross_layers = 1
cross_rank = 4
items = 50
buckets = [4, 8]
candidates = {{ law = "choice", values = [3, 8] }}
"""


def workload(folder: Path) -> Path:
    tables, path = folder / "tables.toml", folder / "tiny.toml"
    tables.write_text(TABLES)
    path.write_text(WORKLOAD.format(tables=tables))
    return path


@pytest.mark.real_run
def test_shards_end_with_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "SIZE_SECONDS", 0.2)
    lookups = TableOptions(samples=4, smaller=100_000, dim=8, runs=1)
    short = partial(ShardOptions, costs=CostOptions(0.1, 2**16), lookups=lookups)
    monkeypatch.setattr(sharding, "ShardOptions", short)
    picture, costs = tmp_path / "where.svg", tmp_path / "costs.toml"
    arguments = ["shards", "--workload", str(workload(tmp_path)), "--shards", "1", "--shards", "2", "--seconds", "0.5"]
    arguments += ["--runs", "1", "--costs", str(costs), "--picture", str(picture), "--json"]
    done = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "half of what singular answers at most" in done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert (document["suite"], document["workload"]["name"]) == ("shards", "tiny")
    rows = {row["contestant"].partition(" (")[0]: row for row in document["results"] if "shards" in row}
    assert {"singular", "one-shard"} < set(rows)
    assert {row["shards"] for row in rows.values()} == {0, 1, 2}
    peers = {f"{row['contestant']} fp32" for row in document["results"] if "storage" in row} - {"rankd fp32"}
    assert set(document["parity"]) == {f"{name}{storage}" for name in rows for storage in ("", ", int8")} | peers
    assert max(document["parity"].values()) <= 0.05
    for name, row in rows.items():
        assert row["failed"] == 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert all(row[part] >= 0 for part in PARTS)
        assert (row["serialise_ms"] + row["network_ms"] > 0) == (name != "singular")
        assert row["lookup_ms"] > 0
        assert row["calls"] == pytest.approx(row["shards"], abs=0.01)
        assert row["predicted_calls"] == row["shards"]
        assert 0 < row["predicted_p50_ms"] <= row["predicted_p99_ms"]
        assert row["p99_error"] == pytest.approx(row["predicted_p99_ms"] / row["p99_ms"] - 1, abs=1e-4)
    ratios = document["ratios"]
    assert ratios["p99_overhead_best"] <= ratios["p99_overhead_auto"]
    assert ratios["auto_over_best"] == pytest.approx(ratios["p99_overhead_auto"] / ratios["p99_overhead_best"], 1e-4)
    assert ratios["p99_overhead_best_simulated"] > 0
    looked_up = [ratios[f"lookup_vs_best_peer_fp32_{threads}"] for threads in (1, 2)]
    assert 0 < ratios["lookup_vs_best_peer"] == min(looked_up)
    judged = [row for row in document["results"] if row["table"] == "hypotheses"]
    assert {row["verdict"] for row in judged} <= {"confirmed", "refuted"}
    assert len(judged) >= 7
    assert read_costs(costs).call_us > 0
    assert "one-shard" in picture.read_text()


def test_the_packaged_workload_is_mlperfs() -> None:
    found = load_dlrm("dlrm")
    assert (found.tables, found.numbers, found.bottom) == ("dlrm-v2/20", 13, (512, 256))
    assert (found.top, found.cross_layers, found.cross_rank) == ((1024, 1024, 512, 256), 3, 512)


def test_other_workloads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is dlrm, or a \.toml file"):
        load_dlrm("mixed")
    path = tmp_path / "large.toml"
    path.write_text(workload(tmp_path).read_text().replace("[3, 8]", "[3, 9]"))
    with pytest.raises(ConfigError, match="up to 9 candidates are drawn"):
        load_dlrm(str(path))
