"""Int8 from a run to a served version: the gate judges the quantized graphs, and what it refuses is not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest

from rankd import Ranker, RankRequest
from rankd.artifact import Artifact
from rankd.build.int8_graphs import Int8Plan
from rankd.build.pack import BuildOptions, build_artifact
from rankd.compress.accuracy_gate import AccuracyGate
from rankd.compress.calibration import Calibration, calibration_of
from rankd.compress.compress_run import compress, read_compression, read_int8
from rankd.compress.compression_recipe import CompressionRecipe, FineTuning, Gate, Prune, Quantize, Structure
from rankd.compress.quantization import quantize_and_judge
from rankd.compress.surgery import Subject
from rankd.engine.backend import EngineConfig, Precision
from rankd.errors import ArtifactError, BuildError, ConfigError, DataError, GateRefused
from rankd.gate_record import Compression, Int8Record
from rankd.serve.v1 import describe_version
from rankd.train.run import open_run
from rankd.types import Array, Features
from tests.compress.trained_run import WIDE, train_small

EASY = Gate(bounds={"gauc": 0.2}, min_users=20, sampled=20)
INT8 = Quantize(requests=24, min_requests=16, max_error=0.5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run whose layers are large enough for int8."""
    return train_small(tmp_path_factory.mktemp("run"), choice=WIDE)


@pytest.fixture(scope="module")
def quantized(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Compression]:
    """A run that was pruned and quantized, and passed."""
    out = tmp_path_factory.mktemp("quantized") / "small"
    step = Prune(structures=(Structure.FFN,), flops=0.8, requests=16)
    return out, compress(run, CompressionRecipe((step,), finetune=FineTuning(0), quantize=INT8, gate=EASY), out)


def record_of(made: Compression) -> Int8Record:
    assert isinstance(made.int8, Int8Record)
    return made.int8


def built(folder: Path, root: Path, precision: Precision, version: str = "1") -> Path:
    about, dataset, model = open_run(folder)
    made = read_compression(folder)
    options = BuildOptions("films", version, precision, int8=read_int8(folder, made))
    return build_artifact(root, model, dataset, about.recipe, options, compression=made)


def test_the_record_says_what_was_done_and_how_it_was_judged(quantized: tuple[Path, Compression]) -> None:
    out, made = quantized
    assert sorted(path.name for path in out.iterdir()) == [
        "best.safetensors", "compression.json", "int8.json", "run.json",
    ]  # fmt: skip
    assert read_compression(out) == made
    record = record_of(made)
    assert record.gate.passed
    assert record.num_requests == 24
    assert 0 < record.error <= 0.5
    assert record.layers > 10
    assert record.ms.keys() >= {"int8"}
    assert made.gate != record.gate  # the torch model and the quantized graphs are judged each by itself
    assert made.recipe["quantize"]["requests"] == 24


def test_what_is_built_in_int8_serves_and_says_so(quantized: tuple[Path, Compression], tmp_path: Path) -> None:
    out, made = quantized
    place = built(out, tmp_path, Precision.INT8)
    engine = Artifact.open(place).manifest.engines["openvino"]
    assert engine.precision == "int8"
    assert list(engine.parity) == ["int8"]
    assert 1e-4 < engine.parity["int8"] <= 1.0  # not the float graphs
    with Ranker.load(place, EngineConfig(executors=1)) as ranker:
        assert ranker.backend.precision is Precision.INT8
        request = RankRequest(ranker.catalogue.ids.users[0], ranker.catalogue.ids.items[:9])
        first, second = ranker.rank(request), ranker.rank(request)
        assert second.state == "cached"
        np.testing.assert_array_equal(first.scores, second.scores)
        shown = json.loads(msgspec.json.encode(describe_version(ranker)))
    assert shown["precision"] == "int8"
    assert shown["compression"]["int8"]["gate"]["metrics"]["gauc"]["bound"] == 0.2
    assert shown["compression"]["int8"]["calibration"] == record_of(made).calibration
    with pytest.raises(ArtifactError, match="checked for the precisions int8 on openvino, not for fp32"):
        Ranker.load(place, EngineConfig(executors=1, precision=Precision.FP32))


def test_the_same_run_in_floats_says_nothing_of_int8(quantized: tuple[Path, Compression], tmp_path: Path) -> None:
    place = built(quantized[0], tmp_path, Precision.FP32)
    manifest = Artifact.open(place).manifest
    assert "int8" not in manifest.engines["openvino"].parity
    assert isinstance(manifest.compression, Compression)
    assert manifest.compression.int8 is msgspec.UNSET


def test_quantizing_alone_leaves_the_weights(run: Path, tmp_path: Path) -> None:
    made = compress(run, CompressionRecipe(quantize=INT8, gate=EASY), tmp_path / "small")
    assert (made.flops, made.parameters) == (1.0, 1.0)
    assert made.gate.metrics["gauc"].kept == 1.0
    _, _, model = open_run(tmp_path / "small")
    _, _, original = open_run(run)
    for name, tensor in original.state_dict().items():
        assert (model.state_dict()[name] == tensor).all(), name


def test_a_run_without_scales_is_not_built_in_int8(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"int8 needs the scales of activations.*\[quantize\]"):
        built(run, tmp_path, Precision.INT8)
    assert not (tmp_path / "films").exists()


@pytest.mark.parametrize("target", ["native", "onnxruntime", "reference"])
def test_other_targets_refuse_int8_by_name(quantized: tuple[Path, Compression], tmp_path: Path, target: str) -> None:
    about, dataset, model = open_run(quantized[0])
    plan = read_int8(quantized[0], quantized[1])
    options = BuildOptions("films", "1", Precision.INT8, (target,), int8=plan)
    with pytest.raises(BuildError, match=f"cannot build for {target} in int8: .* alone"):
        build_artifact(tmp_path, model, dataset, about.recipe, options)


def test_scales_that_the_gate_has_not_judged_are_not_built(quantized: tuple[Path, Compression], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(quantized[0], folder)
    plan = msgspec.json.decode((folder / "int8.json").read_bytes(), type=Int8Plan)
    wider = {graph: {key: 2 * limit for key, limit in some.items()} for graph, some in plan.limits.items()}
    (folder / "int8.json").write_bytes(msgspec.json.encode(Int8Plan(wider)))
    with pytest.raises(ConfigError, match="not what the gate has judged"):
        built(folder, tmp_path, Precision.INT8)
    (folder / "int8.json").write_bytes(b"{")
    with pytest.raises(ConfigError, match="cannot be read"):
        built(folder, tmp_path, Precision.INT8)
    assert not (tmp_path / "films" / "1").exists()


def dead(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """As features are when what they come from is broken: every value the same."""
    return {name: np.full_like(array, 1 if "length" in name else 0) for name, array in arrays.items()}


def test_a_calibration_set_of_constants_is_refused_by_the_gate_with_the_figures(run: Path) -> None:
    about, dataset, model = open_run(run)
    good = calibration_of(dataset, INT8, dataset.validate_until, 20)
    broken = [
        Features(dead(one.history), {**dead(one.candidates), "candidate_item": one.candidates["candidate_item"]}, 5)
        for one in good.requests
    ]
    gate = Gate(bounds={"gauc": 0.95}, min_users=20, sampled=20)
    recipe = CompressionRecipe(quantize=msgspec.structs.replace(INT8, max_error=1e9), gate=gate)
    subject = Subject(about.recipe.model, dataset.schema, model)
    judges = AccuracyGate(model, dataset, gate)
    verdicts = [
        quantize_and_judge(judges, subject, recipe, Calibration(requests, "a test")).record
        for requests in (good.requests, broken)
    ]
    assert [verdict.gate.passed for verdict in verdicts] == [True, False]
    good_one, lost = (verdict.gate.metrics["gauc"] for verdict in verdicts)
    assert lost.low < 0.95 <= good_one.low
    assert lost.high - lost.low > 2 * (good_one.high - good_one.low)  # other scores, not only other figures
    assert verdicts[1].ms == {}  # nothing is measured of what is refused


def test_a_refused_version_stays_away_and_the_last_good_one_serves(
    run: Path, quantized: tuple[Path, Compression], tmp_path: Path
) -> None:
    place = built(quantized[0], tmp_path / "models", Precision.INT8)
    with Ranker.load(place, EngineConfig(executors=1)) as ranker:
        request = RankRequest(ranker.catalogue.ids.users[0], ranker.catalogue.ids.items[:9])
        before = ranker.rank(request).scores
        strict = Gate(bounds={"gauc": 0.99999, "ne": 0.99999}, min_users=20, sampled=20)
        with pytest.raises(GateRefused, match=r"refused in int8: .* keeps .* allowed is .*int8 changes a logit by"):
            compress(run, CompressionRecipe(quantize=INT8, gate=strict), tmp_path / "small")
        np.testing.assert_array_equal(ranker.rank(request).scores, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]
    assert Artifact.open(tmp_path / "models" / "films").path == place


def test_a_bad_calibration_file_is_refused_before_any_work(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"user": "somebody"}\n')
    recipe = CompressionRecipe(quantize=INT8, gate=EASY)
    with pytest.raises(DataError, match="line 1"):
        compress(run, recipe, tmp_path / "small", calibrate=file)
    pruning = CompressionRecipe((Prune(flops=0.8),), gate=EASY)
    with pytest.raises(ConfigError, match=r"the recipe has no \[quantize\]"):
        compress(run, pruning, tmp_path / "small", calibrate=file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["requests.jsonl"]
