"""The suite `tables`, with tiny tables: the contract of its last line, and that other sums are no contestant."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from rankd.bench.table_suite import table_lookups
from rankd.bench.table_suite.dlrm_tables import IDS, ROWS, dlrm_specs, drawn_requests, drawn_rows
from rankd.cli.benchmarks import bench
from rankd.embeddings.table_spec import TableSpec, TableStorage
from rankd.errors import EngineFailure

TINY = ["--smaller", "1000000", "--samples", "3", "--dim", "8", "--runs", "1"]


def test_tables_and_requests_are_those_of_mlperf() -> None:
    specs = dlrm_specs(TableStorage.INT8, 1000, 16)
    assert (len(specs), sum(IDS), sum(ROWS)) == (26, 214, 204_184_588)
    assert (specs[0].rows, specs[5].rows, specs[5].dim) == (40_000, 1, 16)
    one, other = drawn_requests(specs, 5, 2, seed=0)
    one.check()
    assert one.num_samples == 5
    assert len(one.ids) == 5 * 214
    assert not np.array_equal(one.ids, other.ids)


def test_rows_are_drawn_in_blocks() -> None:
    spec = TableSpec("t", (1 << 16) + 3, 2)
    blocks = list(drawn_rows(spec, seed=0))
    assert [len(block) for block in blocks] == [1 << 16, 3]
    assert all(abs(block).max() <= 1 for block in blocks)


def test_tables_ends_with_the_contract() -> None:
    done = CliRunner().invoke(bench, ["tables", *TINY, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    document = json.loads(done.stdout.splitlines()[-1])
    assert (document["suite"], document["workload"]["name"]) == ("tables", "dlrm")
    kinds = [storage.value for storage in TableStorage]
    wanted = {f"lookup_vs_best_peer_{kind}_{threads}" for kind in kinds for threads in (1, 2)}
    assert set(document["ratios"]) == wanted
    assert all(ratio > 0 for ratio in document["ratios"].values())
    assert {f"torch {kind}" for kind in kinds} <= set(document["parity"])
    rows = [row for row in document["results"] if row["contestant"] != "memory"]
    assert {row["contestant"] for row in rows} >= {"rankd", "torch"}
    assert all(row["throughput"] > 0 and row["share_of_random"] > 0 for row in rows)
    memory = [row for row in document["results"] if row["contestant"] == "memory"]
    assert [row["table"] for row in memory] == ["memory, 1 thread", "memory, 2 threads"]
    assert all(row["random_bytes_per_s"] > 0 and row["copy_bytes_per_s"] > 0 for row in memory)


def test_one_storage_for_people() -> None:
    arguments = ["tables", *TINY, "--storage", "int8", "--threads", "1"]
    done = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    assert "int8, 1 thread" in done.stdout
    assert "lookup_vs_best_peer_int8_1" in done.stdout


def test_other_sums_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table_lookups.BOUNDS, TableStorage.FP16, 0.0)  # torch's sums are fp16, ours are not
    options = table_lookups.TableOptions((TableStorage.FP16,), (1,), samples=3, smaller=10**6, dim=8, runs=1)
    with pytest.raises(EngineFailure, match="the sums of torch in fp16 differ from ours"):
        table_lookups.run_tables(options, lambda done, total, what: None)
