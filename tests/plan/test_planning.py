"""`rankd plan`: what people type and see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner

from rankd.cli.planning import STRATEGIES, plan, shard_numbers
from rankd.errors import ConfigError
from rankd.plan.plan_file import read_plan
from rankd.plan.table_plan import Strategy

DECLARED = """
name = "shop"
tables = [{name = "user", rows = 1000, dim = 8}, {name = "item", rows = 500, dim = 16}]
nets = [{name = "who", tables = ["user"]}, {name = "what", tables = ["item"]}]
"""


def run(*arguments: str) -> str:
    done = CliRunner().invoke(plan, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def last_line(output: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(output.splitlines()[-1])
    return document


@pytest.fixture
def tables(tmp_path: Path) -> str:
    path = tmp_path / "tables.toml"
    path.write_text(DECLARED)
    return str(path)


def test_the_strategies_are_all_named() -> None:
    assert [strategy.value for strategy in Strategy] == list(STRATEGIES)


def test_a_layout_is_planned_printed_and_written(tmp_path: Path) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    output = run(
        "dlrm-v2/20", "--memory", "2GiB", "--shards", "3..4", "--out", str(out), "--picture", str(picture)
    )  # fmt: skip
    found = read_plan(out)
    assert found.model == "dlrm-v2/20"
    assert found.prediction is not None
    assert f"p99 {found.prediction.p99_ms:,.2f} ms" in output
    assert "refused: singular needs 4.9 GiB in the main process, and 2.0 GiB are allowed" in output
    assert f"{found.plan.strategy.value} on {len(found.plan.shards)} shards: a p99 as low as any" in output
    drawn = picture.read_text()
    assert all(label in drawn for label in ("<svg", "</svg>"))


def test_the_last_line_is_json(tables: str) -> None:
    output = run("layout", tables, "--replicate", "0", "--shards", "1..2", "--json")
    document = last_line(output)
    assert output.count("\n") == 1
    assert document["model"] == "shop"
    told = {(row["strategy"], row["shards"]): row["prediction"]["p99_ms"] for row in document["results"]}
    assert len(told) == 2 + 3 * 2
    assert told[document["strategy"], document["shards"]] == min(told.values()) == document["prediction"]["p99_ms"]


def test_options_change_what_is_planned(tables: str, tmp_path: Path) -> None:
    costs = tmp_path / "costs.json"
    costs.write_text('{"dense_sample_us": 1, "rate": 5}')
    slow = last_line(run(tables, "--strategy", "singular", "--json"))["prediction"]
    quick = last_line(run(tables, "--strategy", "singular", "--costs", str(costs), "--json"))["prediction"]
    rated = last_line(run(tables, "--strategy", "singular", "--costs", str(costs), "--rate", "7", "--json"))
    assert quick["mean_ms"] < slow["mean_ms"] / 10
    assert (slow["rate"], quick["rate"], rated["prediction"]["rate"]) == (100, 5, 7)
    sharded = (tables, "--strategy", "load-balanced", "--shards", "2", "--replicate", "0", "--rate", "20", "--json")
    apart, together = (last_line(run(*sharded, *more))["prediction"] for more in ((), ("--machine-cores", "2")))
    assert (apart["cores"], together["cores"]) == (3 * 8, 2)
    assert 0 == apart["machine_busy"] < together["machine_busy"] < 1
    cached = last_line(run("--hot-rows", "1KiB", "--replicate", "0", "--strategy", "one-shard", "--json", tables))
    assert 0 < cached["prediction"]["main"]["size_bytes"] <= 1024


def test_statistics_are_counted_and_used(tables: str, tmp_path: Path) -> None:
    sample, stats = tmp_path / "sample.parquet", tmp_path / "stats.json"
    pl.DataFrame({"user": [[1, 2, 3], [4]], "item": [7, 8], "label": [0, 1]}).write_parquet(sample)
    assert "2 tables in 2 samples" in run("stats", str(sample), "--tables", tables, "--out", str(stats))
    document = last_line(run("stats", str(sample), "--tables", tables, "--out", str(stats), "--json"))
    assert document == json.loads(stats.read_text())
    assert [one["lookups"] for one in document["tables"]] == [2, 1]
    arguments = (tables, "--strategy", "singular", "--json")
    without = last_line(run(*arguments))["prediction"]["main"]["lookups"]
    counted = last_line(run(*arguments, "--stats", str(stats)))["prediction"]["main"]["lookups"]
    assert (without, counted) == (2 * 270, 3 * 270)


def test_statistics_of_other_tables_are_refused(tables: str, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    stats.write_text('{"samples": 1, "tables": [{"table": "usr"}]}')
    with pytest.raises(ConfigError, match=r"there is no table 'usr'\. Did you mean 'user'"):
        run(tables, "--stats", str(stats))


def test_clusters_are_simulated(tables: str) -> None:
    output = run("simulate", tables, "--servers", "4", "--servers", "1", "--replicate", "0", "--rate", "10")
    assert "net-aware" in output
    assert "best by p99:" in output
    bounded = last_line(run("simulate", tables, "--servers", "4", "--replicate", "0", "--p99-ms", "60", "--json"))
    assert len(bounded["best"]) == 1
    assert bounded["best"][0]["p99_ms"] <= 60
    cheapest = min(row["server_hours"] for row in bounded["results"] if row["server_hours"] is not None)
    assert bounded["best"][0]["server_hours"] == cheapest
    rows = last_line(
        run("simulate", tables, "--servers", "4", "--servers", "1", "--memory", "40KiB", "--replicate", "0", "--json")
    )
    assert [(row["strategy"], row["servers"]) for row in rows["results"]] == [
        ("capacity-balanced", 4), ("load-balanced", 4), ("net-aware", 4)
    ]  # fmt: skip
    assert [text.split()[0] for text in rows["refused"]] == ["singular", "one-shard"]


def test_a_layout_that_does_not_fit_is_refused(tables: str) -> None:
    with pytest.raises(ConfigError, match=r"nothing fits: .* 62.5 KiB on 2 shards, and 20.0 KiB each .* 4 shards"):
        run(tables, "--memory", "20KiB", "--shards", "2", "--replicate", "0")


def test_what_cannot_be_drawn_is_refused_before_anything_is_planned(tmp_path: Path) -> None:
    for place in (tmp_path / "picture.txt", tmp_path / "nowhere" / "picture.png"):
        with pytest.raises(ConfigError, match="--picture"):
            run("no-such-model", "--picture", str(place))


@pytest.mark.parametrize(("text", "numbers"), [("4", [4]), ("1..3", [1, 2, 3]), ("7..7", [7])])
def test_numbers_of_shards_are_read(text: str, numbers: list[int]) -> None:
    assert list(shard_numbers(text)) == numbers


@pytest.mark.parametrize("text", ["", "0", "x", "3..1", "0..2", "1..", "1..9999", "1..2..3"])
def test_other_numbers_of_shards_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--shards"):
        shard_numbers(text)


def test_help_is_that_of_the_group() -> None:
    output = run("--help")
    assert all(f"  {command} " in output for command in ("layout", "stats", "simulate", "costs"))
