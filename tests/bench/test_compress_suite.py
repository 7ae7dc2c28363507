"""`rankd bench compress` from end to end on a small run, and what it makes of its figures."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest

from rankd.bench.compress_suite import gate_refusals
from rankd.bench.compress_suite.causes import Figures, causes_of, ratios_of
from rankd.bench.compress_suite.compressing import CompressOptions, run_compress
from rankd.bench.schedule_suite import live_load
from rankd.compress.compress_run import compress
from rankd.compress.compression_recipe import CompressionRecipe, Criterion, FineTuning, Gate, Prune, Quantize, Structure
from rankd.errors import ConfigError
from rankd.gate_record import GatedMetric, GateRecord
from tests.compress.trained_run import WIDE, train_small

BOUNDS = {"gauc": 0.3}
RECIPE = CompressionRecipe(
    steps=(Prune((Structure.FFN,), Criterion.MAGNITUDE, flops=0.8, requests=16),),
    finetune=FineTuning(epochs=0),
    quantize=Quantize(requests=16, min_requests=8, max_error=1.0),
    gate=Gate(bounds=BOUNDS, min_users=20),
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small(tmp_path_factory.mktemp("bench-compress"), choice=WIDE)


def test_the_suite_from_end_to_end(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_load, "PROBES", 1)
    monkeypatch.setattr(gate_refusals, "FEW_USERS", 20)
    small = tmp_path / "small"
    compress(original, RECIPE, small)
    told: list[str] = []
    options = CompressOptions(runs=1, requests=3, candidates=8, seconds=0.3)
    report = run_compress(original, small, None, options, lambda done, total, what: told.append(what))
    stages = [row["contestant"] for row in report.results if row["table"] == "one request at a time"]
    assert [name for name in stages if name != "torch, fast path"] == [
        "torch",
        "library",
        "mask-aware",
        "pruned",
        "pruned, states",
        "int8",
        "int8, states",
    ]
    assert set(stages) <= set(report.parity)
    assert (
        max(report.parity[name] for name in ("torch", "library", "mask-aware")) < 1e-3
        or report.workload["served"]["precision"] == "bf16"
    )
    refused = {row["contestant"]: row["why"] for row in report.results if row["table"] == "what the gate refuses"}
    assert refused["too strong a recipe"].startswith("GateRefused")
    assert refused["corrupted calibration"].startswith("DataError")
    assert "days that it has seen" in refused["its own training days"]
    factors = {row["contestant"]: row for row in report.results if str(row["table"]).startswith("factor by cause")}
    together = factors.pop("all together")
    assert math.prod(row["latency"] for row in factors.values()) == pytest.approx(together["latency"])
    warm = {"latency_share_warm_as_shipped", "throughput_gain_warm_as_shipped", "accuracy_share_gauc"}
    assert warm <= set(report.ratios)
    alone, elastic = (row for row in report.results if "offered_rate" in row)
    assert alone["offered_rate"] == elastic["offered_rate"]
    assert (alone["by_variant"], alone["lost"], elastic["lost"]) == (0, 0, 0)
    assert 0 < elastic["answered"] <= elastic["answered"] + elastic["refused"] + elastic["late"]
    assert report.ratios["elastic_gain"] > 0
    assert report.workload["flops"]["compressed"] < report.workload["flops"]["original"]
    assert told[-1] == "done"


def test_a_compression_of_another_run_is_refused(original: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    compress(original, msgspec.structs.replace(RECIPE, quantize=None), small)
    with pytest.raises(ConfigError, match="made of another run"):
        run_compress(small, small, None, CompressOptions(), lambda done, total, what: None)
    with pytest.raises(ConfigError, match="is no compression"):
        run_compress(original, original, None, CompressOptions(), lambda done, total, what: None)


def gate(kept: float) -> GateRecord:
    return GateRecord(
        "2011-08-01", "2011-09-01", 10, 5, 100, 0, {"gauc": GatedMetric(0.8, 0.8 * kept, kept, 0, 1, 0.9)}
    )


def figures(int8_ms: float) -> Figures:
    """Made up: each stage takes half of the one before; int8 as said."""
    names = ("torch", "torch, fast path", "library", "mask-aware", "pruned", "pruned, states")
    calls = {name: [64.0 / 2**place] * 3 for place, name in enumerate(names)}
    calls |= {"int8": [int8_ms] * 3, "int8, states": [1.0] * 3}
    return Figures(
        calls, {name: 1e3 / ms[0] for name, ms in calls.items()}, [], {"pruned": gate(0.99), "int8": gate(0.98)}
    )


def test_int8_that_is_quicker_serves() -> None:
    causes, ratios = causes_of(figures(int8_ms=2.0)), ratios_of(figures(int8_ms=2.0))
    assert causes["quantization"] == {"latency": 2.0, "throughput": 2.0}
    assert causes["user state"]["latency"] == 2.0
    assert ratios["accuracy_share_gauc"] == 0.98
    assert ratios["latency_share_cold"] == 2.0 / 32.0
    assert ratios["latency_share_cold_as_shipped"] == 2.0 / 64.0
    assert ratios["compression_gain"] == 4.0


def test_int8_that_is_slower_does_not_serve() -> None:
    causes, ratios = causes_of(figures(int8_ms=8.0)), ratios_of(figures(int8_ms=8.0))
    assert causes["quantization"] == {"latency": 1.0, "throughput": 1.0}
    assert ratios["accuracy_share_gauc"] == 0.99
    assert ratios["int8_gain"] == 0.5
