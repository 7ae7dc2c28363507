"""The suite `shards` for real, but short: the contract of its last line, and that its parts add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from rankd.bench.shard_suite.attribution_picture import PARTS
from rankd.bench.shard_suite.dlrm_workload import load_dlrm
from rankd.cli.benchmarks import bench
from rankd.errors import ConfigError

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
def test_shards_end_with_the_contract(tmp_path: Path) -> None:
    picture = tmp_path / "where.svg"
    arguments = ["shards", "--workload", str(workload(tmp_path)), "--shards", "1", "--shards", "2"]
    arguments += ["--seconds", "0.5", "--runs", "1", "--picture", str(picture), "--json"]
    done = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    document = json.loads(done.stdout.splitlines()[-1])
    assert (document["suite"], document["workload"]["name"]) == ("shards", "tiny")
    rows = {row["contestant"].partition(" (")[0]: row for row in document["results"]}
    assert {"singular", "one-shard"} < set(rows)
    assert {row["shards"] for row in rows.values()} == {0, 1, 2}
    assert set(document["parity"]) == set(rows)
    assert max(document["parity"].values()) <= 0.05
    for name, row in rows.items():
        assert row["failed"] == 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert all(row[part] >= 0 for part in PARTS)
        assert (row["shard_service_ms"] > 0, row["lookup_ms"] > 0) == (name != "singular", name == "singular")
        assert row["calls"] == pytest.approx(row["shards"], abs=0.01)
    assert document["ratios"]["p99_overhead_best"] <= document["ratios"]["p99_overhead_auto"]
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
