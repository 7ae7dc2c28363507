"""Tuning to int8 from a run to a built version: SASRec too, in a search too, and an interrupted one goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file

from rankd.artifact import Artifact
from rankd.build.pack import BuildOptions, build_artifact
from rankd.compress import compress_run, int8_tuning
from rankd.compress.compress_run import compress, read_compression, read_int8
from rankd.compress.compression_recipe import (
    CompressionRecipe,
    FineTuning,
    Gate,
    Prune,
    Quantize,
    QuantizedTuning,
    ReferenceRequest,
    Structure,
)
from rankd.compress.search import Search
from rankd.compress.search_plan import SearchPlan, StepSpace, Timing
from rankd.engine.backend import Precision
from rankd.gate_record import Compression, Int8Record
from rankd.train.description import Split
from rankd.train.recipe import ModelChoice
from rankd.train.run import open_run
from rankd.train.trainer import Trainer
from tests.compress.trained_run import WIDE, train_small

TUNING = QuantizedTuning(epochs=2, learning_rate=1e-3)
PLAN = Quantize(requests=24, min_requests=16, max_error=10.0)
EASY = Gate(bounds={"gauc": 0.2}, min_users=20, sampled=20)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small(tmp_path_factory.mktemp("run"), choice=WIDE)


def recipe_of(plan: Quantize, gate: Gate = EASY, *steps: Prune) -> CompressionRecipe:
    return CompressionRecipe(steps, finetune=FineTuning(epochs=1, labels=0.0), quantize=plan, gate=gate)


def tuned(plan: Quantize = PLAN, how: QuantizedTuning = TUNING) -> Quantize:
    return msgspec.structs.replace(plan, finetune=how)


@pytest.fixture(scope="module")
def made(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Compression]:
    """A run that was tuned to int8."""
    out = tmp_path_factory.mktemp("tuned") / "small"
    return out, compress(run, recipe_of(tuned()), out)


def record_of(made: Compression) -> Int8Record:
    assert isinstance(made.int8, Int8Record)
    return made.int8


def test_a_tuned_run_is_a_run_with_its_record_and_is_built(made: tuple[Path, Compression], tmp_path: Path) -> None:
    out, record = made
    assert sorted(path.name for path in out.iterdir()) == [
        "best.safetensors", "compression.json", "epochs.jsonl", "int8.json", "run.json",
    ]  # fmt: skip
    assert read_compression(out) == record
    assert record.recipe["quantize"]["finetune"] == {"epochs": 2, "learning_rate": 1e-3}
    assert len((out / "epochs.jsonl").read_text().splitlines()) == 2
    about, dataset, model = open_run(out)
    options = BuildOptions("films", "1", Precision.INT8, int8=read_int8(out, record))
    place = build_artifact(tmp_path, model, dataset, about.recipe, options, compression=record)
    engine = Artifact.open(place).manifest.engines["openvino"]
    assert engine.precision == "int8"


class Interrupted(Exception):
    """Ctrl-C, where a test wants it."""


def test_interrupted_tuning_goes_on_to_the_same_weights(
    run: Path, made: tuple[Path, Compression], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second epoch, then after the last one: nothing that was done is done again."""
    real = Trainer._epoch

    def second_epoch(trainer: Trainer, number: int, progress: Any) -> Any:
        if number == 1:
            raise Interrupted
        return real(trainer, number, progress)

    def rest_of_it(trainer: Trainer, number: int, progress: Any) -> Any:
        assert number == 1
        return real(trainer, number, progress)

    def stopping(*arguments: object) -> Any:
        raise Interrupted

    def attempt() -> Compression:
        return compress(run, recipe_of(tuned()), tmp_path / "small")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", second_epoch)
        with pytest.raises(Interrupted):
            attempt()
    monkeypatch.setattr(int8_tuning, "search_int8", stopping)  # scales are not found again
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_epoch", rest_of_it)
        patch.setattr(compress_run, "quantize_and_judge", stopping)
        with pytest.raises(Interrupted):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == [".small.compressing"]
    monkeypatch.setattr(Trainer, "_epoch", stopping)
    again = attempt()
    assert again.weights_sha256 == made[1].weights_sha256
    assert record_of(again).plan_sha256 == record_of(made[1]).plan_sha256
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_tuning_follows_steps_and_their_own_tuning(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, real = list[str](), Trainer.start

    def start(trainer: Trainer, progress: Any) -> Any:
        trained.append(f"{trainer.folder.name}: {type(trainer.model).__name__}")
        return real(trainer, progress)

    monkeypatch.setattr(Trainer, "start", start)
    step = Prune(structures=(Structure.FFN,), flops=0.8, requests=16)
    small = compress(run, recipe_of(tuned(how=QuantizedTuning()), EASY, step), tmp_path / "small")
    assert trained == ["floats: Climber", "int8: FakeQuantized"]
    assert small.flops < 0.81
    assert record_of(small).gate.passed
    assert len((tmp_path / "small" / "epochs.jsonl").read_text().splitlines()) == 1


def test_a_sasrec_is_tuned_too(tmp_path: Path) -> None:
    folder = train_small(tmp_path, choice=ModelChoice("sasrec", {"width": 32, "heads": 2}))
    small = compress(folder, recipe_of(tuned(how=QuantizedTuning(epochs=1))), tmp_path / "small")
    assert record_of(small).layers > 4
    assert record_of(small).gate.passed


def test_a_trial_tunes_to_int8_from_the_weights_of_the_one_in_floats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train_small(tmp_path, Split("2026-08-25", "2026-09-05"), WIDE)
    numbers = {"requests": 24, "min_requests": 16, "max_error": 10.0}
    plan = SearchPlan(
        steps=(StepSpace("prune", settings={"structures": ["ffn"], "requests": 8, "flops": 0.8}),),
        vary={"quantize": (False, {**numbers, "finetune": {"epochs": 2, "learning_rate": 5e-3}})},
        halvings=0,
        finetune=FineTuning(epochs=1),
        request=ReferenceRequest(candidates=8, target="reference"),
        timing=Timing(requests=4, rounds=1, throughput_s=0.01),
        gate=Gate(bounds={"ndcg@10": 0.2, "gauc": 0.2}, min_users=20, sampled=20),
    )
    trained: list[str] = []
    real = Trainer._epoch

    def counted(trainer: Trainer, number: int, progress: Any) -> Any:
        trained.append(f"{trainer.folder.name[:4]} {number}")
        if len(trained) == 3:
            raise KeyboardInterrupt
        return real(trainer, number, progress)

    monkeypatch.setattr(Trainer, "_epoch", counted)
    with Search(folder, tmp_path / "search", plan) as search, pytest.raises(KeyboardInterrupt):
        search.start(30, lambda done, total, line: None)
    with Search(folder, tmp_path / "search") as search:
        assert search.start(30, lambda done, total, line: None)
        floats, narrow = search.trials.known
    assert trained[1:] == ["int8 0", "int8 1", "int8 1"]  # after the interruption the second epoch alone
    assert floats.made is not None
    assert narrow.made is not None, narrow.failure
    assert (
        narrow.label == "prune + int8 requests 24 min_requests 16 max_error 10.0 finetune epochs 2 learning_rate 0.005"
    )
    assert narrow.made.gate != floats.made.gate  # other weights, in floats too
    places = [tmp_path / "search" / "trials" / one.trial_id for one in (floats, narrow)]
    assert sorted(path.name for path in places[1].iterdir()) == [
        "best.safetensors", "epochs.jsonl", "int8.json", "trial.json",
    ]  # fmt: skip
    weights = [load_file(place / "best.safetensors") for place in places]
    assert weights[0].keys() == weights[1].keys()
    assert any((tensor != weights[1][name]).any() for name, tensor in weights[0].items())
