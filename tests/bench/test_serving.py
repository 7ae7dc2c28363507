"""The suite `serve` for real, but short: the contract of its last line. Nothing here looks at how fast it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from rankd.bench.wire_forms import Form, encode_request
from rankd.cli.benchmarks import bench
from rankd.types import RankRequest

TINY = """
name = "tiny"
use = "tests"
model = { blocks = 2, layers = 1, width = 8, heads = 2, hidden = 8, tasks = 2 }
history = { law = "fixed", value = 8 }
candidates = { law = "choice", values = [3, 8] }
users = { count = 30, zipf_exponent = 1.0 }
buckets = { history = [4], candidates = [4, 8] }
items = 60
"""
CLOSED = ("in-process", "http-json", "http-binary")
OPEN = ("http-json-open", "http-binary-open")


@pytest.mark.real_run
def test_serve_ends_with_the_contract(tmp_path: Path) -> None:
    workload = tmp_path / "tiny.toml"
    workload.write_text(TINY)
    arguments = ["serve", "--workload", str(workload), "--seconds", "0.2", "--runs", "1", "--rate", "40", "--json"]
    done = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["suite"] == "serve"
    assert document["workload"]["name"] == "tiny"
    assert document["workload"]["flops"]["useful"] > 0
    assert 0 < document["workload"]["returning_share"] < 1
    assert document["machine"]["cores"] >= 1
    assert "others_cpu_share" in document["machine"]
    assert document["parity"]["http-json"] <= 1e-4
    assert document["parity"]["http-binary"] <= 1e-4
    assert document["parity"]["in-process"] <= 1e-3
    rows = {row["contestant"]: row for row in document["results"]}
    assert tuple(rows) == (*CLOSED, *OPEN)
    for row in rows.values():
        assert row["errors"] == 0
        assert 0 < row["hit_rate"] <= 1  # users return, and their states are kept
        assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["p999_ms"]
        assert row["throughput"] > 0
        assert row["requests"] >= 1
    for name in ("in-process", "http-json"):
        row = rows[name]
        assert 0 < row["ranker_overhead_p50_ms"] < row["overhead_p50_ms"] < row["p50_ms"]
        assert row["cold_ms"] > 0
    for name in OPEN:
        assert rows[name]["rate_planned"] == 40
        assert rows[name]["rate_achieved"] > 0
        assert rows[name]["generator_late_p99_ms"] >= 0
        assert 0 <= rows[name]["generator_cpu_share"] <= 1
    assert 0 < document["ratios"]["overhead_share"] < 1


def test_unknown_workload_is_named() -> None:
    from rankd.errors import ConfigError

    with pytest.raises(ConfigError, match="unknown workload 'smal'"):
        CliRunner().invoke(bench, ["serve", "--workload", "smal"], catch_exceptions=False)


def test_requests_on_the_wire() -> None:
    request = RankRequest("ü", ("a", "bc"), model="m")
    json_form = encode_request(Form.JSON, request)
    head, _, body = json_form.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/rank HTTP/1.1\r\n")
    assert json.loads(body) == {"user_id": "ü", "candidates": ["a", "bc"], "model": "m"}
    head, _, body = encode_request(Form.BINARY, request).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v2/models/m/infer HTTP/1.1\r\n")
    length = int(head.split(b"inference-header-content-length: ")[1])
    assert [one["shape"] for one in json.loads(body[:length])["inputs"]] == [[1], [2]]
    assert body[length:] == b"\x02\x00\x00\x00\xc3\xbc" + b"\x01\x00\x00\x00a" + b"\x02\x00\x00\x00bc"
