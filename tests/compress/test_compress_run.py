"""From a run to a smaller run: what passes is built and served, what does not leaves nothing, what stops goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from rankd import Ranker, RankRequest
from rankd.artifact import Artifact
from rankd.build.pack import BuildOptions, build_artifact
from rankd.compress import smaller_model
from rankd.compress.accuracy_gate import AccuracyGate
from rankd.compress.compress_run import compress, read_compression
from rankd.compress.compression_recipe import (
    CompressionRecipe,
    Factorise,
    FineTuning,
    Gate,
    Prune,
    ReferenceRequest,
    ShareLayers,
    Structure,
    Student,
)
from rankd.engine.backend import EngineConfig, Precision
from rankd.errors import BuildError, ConfigError, DataError, GateRefused
from rankd.gate_record import Compression
from rankd.serve.v1 import describe_version
from rankd.train.description import LogDescription
from rankd.train.recipe import ModelChoice
from rankd.train.run import begin_run, open_run, packaged_or_file
from rankd.train.samples import prepare
from rankd.train.trainer import Trainer
from tests.compress.trained_run import train_small
from tests.train.small_log import RECIPE, small_frame

EASY = Gate(bounds={"ndcg@10": 0.2, "gauc": 0.2}, min_users=20)
PRUNE = Prune(flops=0.7, ffn_multiple=4, width_multiple=2, requests=32)
TUNING = FineTuning(epochs=2, learning_rate=1e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, one epoch."""
    return train_small(tmp_path_factory.mktemp("run"))


def recipe_of(*steps: object, gate: Gate = EASY, finetune: FineTuning = TUNING) -> CompressionRecipe:
    return CompressionRecipe(steps=steps, gate=gate, finetune=finetune)  # type: ignore[arg-type]


def beside(out: Path) -> list[str]:
    """Everything in the folder in which a run would appear."""
    return sorted(path.name for path in out.parent.iterdir())


@pytest.fixture(scope="module")
def pruned(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Compression]:
    """A run that was pruned and passed."""
    out = tmp_path_factory.mktemp("pruned") / "small"
    return out, compress(run, recipe_of(PRUNE), out)


def test_a_compressed_run_is_a_run_with_its_record(pruned: tuple[Path, Compression], run: Path) -> None:
    out, made = pruned
    assert beside(out) == ["small"]
    assert sorted(path.name for path in out.iterdir()) == [
        "best.safetensors", "compression.json", "epochs.jsonl", "run.json",
    ]  # fmt: skip
    assert read_compression(out) == made
    assert read_compression(run) is None
    assert made.gate.passed
    assert made.flops <= 0.7
    _, _, model = open_run(out)
    _, _, original = open_run(run)
    sizes = [sum(p.numel() for p in one.parameters()) for one in (model, original)]
    assert made.parameters == pytest.approx(sizes[0] / sizes[1])
    assert made.parameters < 1


def test_what_is_built_of_it_serves_and_says_what_it_is(pruned: tuple[Path, Compression], tmp_path: Path) -> None:
    out, made = pruned
    about, dataset, model = open_run(out)
    compression = read_compression(out)
    place = build_artifact(tmp_path, model, dataset, about.recipe, BuildOptions("films", "2"), compression=compression)
    artifact = Artifact.open(place)
    assert artifact.manifest.compression == made
    assert artifact.manifest.engines["openvino"].parity["fp32"] < 1e-3
    with Ranker.load(place, EngineConfig(executors=1)) as ranker:
        scores = ranker.rank(RankRequest(ranker.catalogue.ids.users[0], ranker.catalogue.ids.items[:9]))
        assert scores.scores.shape == (9, 2)
        shown = json.loads(msgspec.json.encode(describe_version(ranker)))
    assert shown["compression"]["gate"]["metrics"]["gauc"]["bound"] == 0.2
    assert shown["compression"]["recipe"]["steps"][0]["kind"] == "prune"


@pytest.mark.parametrize(
    "steps",
    [
        (ShareLayers(layers=1), Factorise(rank=0.25, multiple=2)),
        (Student({"ffn_ratio": 2}), Prune(structures=(Structure.LAYERS,), flops=0.9, requests=8)),
    ],
)
def test_every_kind_of_step_makes_a_model_that_is_built(steps: tuple[object, ...], run: Path, tmp_path: Path) -> None:
    compress(run, recipe_of(*steps, finetune=FineTuning(epochs=0)), tmp_path / "small")
    about, dataset, model = open_run(tmp_path / "small")
    assert build_artifact(tmp_path, model, dataset, about.recipe, BuildOptions("films", "1")).exists()


def test_a_sasrec_is_compressed_too(tmp_path: Path) -> None:
    data = tmp_path / "log.parquet"
    small_frame().write_parquet(data)
    training = msgspec.structs.replace(RECIPE.training, epochs=1)
    recipe = msgspec.structs.replace(RECIPE, model=ModelChoice("sasrec", {"width": 8}), training=training)
    _, log = begin_run(tmp_path / "run", data, packaged_or_file(LogDescription, "logs", "demo"), recipe)
    Trainer(prepare(log, recipe.shapes), recipe, tmp_path / "run").start()
    structures = (Structure.HEADS, Structure.FFN, Structure.LAYERS)
    step = Prune(structures=structures, flops=0.6, ffn_multiple=4, requests=16)
    gate = Gate(bounds={"gauc": 0.2}, min_users=20)
    made = compress(tmp_path / "run", recipe_of(step, gate=gate, finetune=FineTuning(epochs=0)), tmp_path / "small")
    assert made.flops <= 0.6
    about, dataset, model = open_run(tmp_path / "small")
    assert build_artifact(tmp_path, model, dataset, about.recipe, BuildOptions("films", "1")).exists()


def test_a_budget_in_milliseconds_is_of_the_measured_engine(run: Path, tmp_path: Path) -> None:
    """The engine is torch, so that the test is quick; the numbers are this machine's, so only their order is known."""
    request = ReferenceRequest(target="reference")
    step = Prune(predicted_ms=1e9, ffn_multiple=4, width_multiple=2, requests=8)
    plan = CompressionRecipe(steps=(step,), request=request, gate=EASY, finetune=FineTuning(epochs=0))
    made = compress(run, plan, tmp_path / "small")
    assert sorted(made.ms) == ["compressed", "original", "predicted"]
    assert min(made.ms.values()) > 0
    assert made.flops == 1.0  # a budget above the original's cost leaves everything
    impossible = msgspec.structs.replace(plan, steps=(msgspec.structs.replace(step, predicted_ms=1e-9),))
    with pytest.raises(BuildError, match="cannot be met"):
        compress(run, impossible, tmp_path / "none")


def test_a_recipe_that_is_too_strong_is_refused_with_the_figures(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    strong = Prune(criterion=PRUNE.criterion, flops=0.2, ffn_multiple=4, width_multiple=1, requests=8)
    gate = Gate(bounds={"ndcg@10": 0.999, "gauc": 0.999, "ne": 0.999}, min_users=20)
    with pytest.raises(GateRefused, match=r"keeps \d\.\d{4} of the original \(95%: .* allowed is 0.999"):
        compress(run, recipe_of(strong, gate=gate, finetune=FineTuning(epochs=0)), out)
    assert list(tmp_path.iterdir()) == []


def test_days_of_training_are_refused_before_any_work(run: Path, tmp_path: Path) -> None:
    gate = msgspec.structs.replace(EASY, since="2026-08-01")
    with pytest.raises(DataError, match="not judged on days that it has seen"):
        compress(run, recipe_of(PRUNE, gate=gate), tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_has_changed_is_refused(run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "log.parquet"
    small_frame().head(4000).write_parquet(damaged)
    with pytest.raises(DataError, match="checksum differs"):
        compress(run, recipe_of(PRUNE), tmp_path / "small", damaged)
    damaged.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="checksum differs"):
        compress(run, recipe_of(PRUNE), tmp_path / "small", damaged)


def test_a_budget_that_cannot_be_met_leaves_the_original_as_it_was(run: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(BuildError, match="cannot be met"):
        compress(run, recipe_of(Prune(flops=0.001)), tmp_path / "small")
    assert list(tmp_path.iterdir()) == []
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("stopped_in", ["_epoch", "judge"])
def test_an_interrupted_compression_goes_on_to_the_same_weights(
    run: Path, pruned: tuple[Path, Compression], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_in: str
) -> None:
    out = tmp_path / "small"

    class Interrupted(Exception):
        pass

    def stop(real: Callable[..., object]) -> Callable[..., object]:
        def stopping(*arguments: object) -> object:
            if stopped_in == "judge" or arguments[1] == 1:  # the second epoch
                raise Interrupted
            return real(*arguments)

        return stopping

    with monkeypatch.context() as patch:
        place = Trainer if stopped_in == "_epoch" else AccuracyGate
        patch.setattr(place, stopped_in, stop(getattr(place, stopped_in)))
        with pytest.raises(Interrupted):
            compress(run, recipe_of(PRUNE), out)
    assert beside(out) == [".small.compressing"]
    with pytest.raises(ConfigError, match="unfinished compression with another recipe"):
        compress(run, recipe_of(msgspec.structs.replace(PRUNE, flops=0.5)), out)
    with monkeypatch.context() as patch:  # the steps are not taken again
        patch.setattr(smaller_model, "prune", stop)
        made = compress(run, recipe_of(PRUNE), out)
    assert beside(out) == ["small"]
    assert made == pruned[1]
    whole, again = (load_file(folder / "best.safetensors") for folder in (pruned[0], out))
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0)


def test_a_folder_that_exists_is_not_touched(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists; name another folder"):
        compress(run, recipe_of(PRUNE), tmp_path)


def test_a_compression_is_not_compressed_again(pruned: tuple[Path, Compression], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a compression itself"):
        compress(pruned[0], recipe_of(PRUNE), tmp_path / "smaller")


def test_damaged_weights_are_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    weights = (run / "best.safetensors").read_bytes()
    (tmp_path / "run" / "best.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ConfigError, match="does not hold this model's weights"):
        compress(tmp_path / "run", recipe_of(PRUNE), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_weights_that_the_gate_has_not_judged_are_not_built(pruned: tuple[Path, Compression], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pruned[0], folder)
    weights = load_file(folder / "best.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, folder / "best.safetensors")
    with pytest.raises(ConfigError, match="not what the gate has judged"):
        read_compression(folder)
    shutil.copyfile(pruned[0] / "best.safetensors", folder / "best.safetensors")
    record = json.loads((folder / "compression.json").read_text())
    record["gate"]["metrics"]["gauc"]["low"] = 0.1
    (folder / "compression.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="did not pass is not built"):
        read_compression(folder)
    (folder / "compression.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_compression(folder)


def test_the_native_target_takes_uniform_pruning_and_refuses_other_by_name(run: Path, tmp_path: Path) -> None:
    compress(run, recipe_of(PRUNE, finetune=FineTuning(epochs=0)), tmp_path / "small")
    about, dataset, model = open_run(tmp_path / "small")
    options = BuildOptions("films", "1", Precision.BF16, ("native",))
    with pytest.raises(BuildError, match="cannot build for native"):
        build_artifact(tmp_path, model, dataset, about.recipe, options)
    assert not list(tmp_path.glob("films/*"))


def test_the_command_line(run: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[[steps]]\nkind = "prune"\nflops = 0.8\nrequests = 8\nffn_multiple = 4\nwidth_multiple = 2\n'
        "[finetune]\nepochs = 0\n[gate]\nmin_users = 20\nbounds = { gauc = 0.2 }\n"
    )

    def rankd(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rankd", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    arguments = ("compress", str(run), "--recipe", str(recipe), "--out", str(tmp_path / "small"))
    result = rankd(*arguments)
    assert result.returncode == 0, result.stderr
    assert "of the original's, parameters" in result.stdout
    again = rankd(*arguments)
    assert again.returncode == 2
    assert "exists; name another folder" in again.stderr
    built = rankd("build", str(tmp_path / "small"), "--out", str(tmp_path / "models"), "--json")
    assert built.returncode == 0, built.stderr
    place = Path(json.loads(built.stdout)["artifact"])
    assert Artifact.open(place).manifest.compression == read_compression(tmp_path / "small")
