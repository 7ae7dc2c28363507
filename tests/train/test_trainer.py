"""Training learns, resumes to the same weights, and refuses a folder of another run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from rankd.errors import ConfigError
from rankd.models.protocol import logits_of
from rankd.train.batches import training_batches
from rankd.train.recipe import ModelChoice
from rankd.train.trainer import Trainer, loss_of
from tests.train.small_log import RECIPE, small_dataset

EPOCHS = RECIPE.training.epochs


def trainer(folder: Path, **training: float | str) -> Trainer:
    recipe = msgspec.structs.replace(RECIPE, training=msgspec.structs.replace(RECIPE.training, **training))
    return Trainer(small_dataset(), recipe, folder)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer(tmp_path / "whole")
    history = whole.start()
    assert len(history) == EPOCHS

    class Interrupted(Exception):
        pass

    first = trainer(tmp_path / "cut")
    real = first._epoch

    def one_epoch_only(number: int, progress: object) -> dict[str, float]:
        if number == 1:
            raise Interrupted
        return real(number, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(first, "_epoch", one_epoch_only)
    with pytest.raises(Interrupted):
        first.start()
    second = trainer(tmp_path / "cut")
    resumed = second.start()
    assert [epoch["loss"] for epoch in resumed] == [epoch["loss"] for epoch in history]
    best, again = (load_file(tmp_path / name / "best.safetensors") for name in ("whole", "cut"))
    for name, tensor in best.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path, epochs=4, learning_rate=2e-2, batch_size=8)
    losses = [epoch["loss"] for epoch in run.start()]
    assert losses[-1] < 0.95 * losses[0]


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).start()
    with pytest.raises(ConfigError, match="another recipe"):
        trainer(tmp_path, learning_rate=1.0).start()


def test_padding_does_not_enter_the_loss() -> None:
    run = small_dataset()
    model = Trainer(run, RECIPE, Path("unused")).model.eval()
    samples = Trainer(run, RECIPE, Path("unused")).samples
    batch = next(training_batches(run, samples, RECIPE.training, 0))
    poisoned = {**batch.candidates, "candidate_numeric": batch.candidates["candidate_numeric"].clone()}
    poisoned["candidate_numeric"][~batch.real] = 1e3
    clean, dirty = loss_of(model, batch, 1.0), loss_of(model, dataclasses.replace(batch, candidates=poisoned), 1.0)
    torch.testing.assert_close(clean, dirty)
    assert logits_of(model, batch.history, batch.candidates).shape == batch.labels.shape


@pytest.mark.parametrize(
    "choice",
    [
        ModelChoice("sasrec", {"width": 8}),
        ModelChoice("hstu", {"width": 8, "layers": 2}),
        ModelChoice("dlrm", {"dim": 8}),
        ModelChoice("dlrm", {"dim": 8, "interaction": "dot"}),
        ModelChoice("examples/attentive_pooling.py:AttentivePooling"),
    ],
)
def test_other_rankers_train_by_the_same_code(tmp_path: Path, choice: ModelChoice) -> None:
    training = msgspec.structs.replace(RECIPE.training, learning_rate=2e-2, batch_size=8)
    recipe = msgspec.structs.replace(RECIPE, model=choice, training=training)
    history = Trainer(small_dataset(), recipe, tmp_path).start()
    assert history[-1]["loss"] < 0.98 * history[0]["loss"]


def test_training_in_bfloat16_is_training_in_float32_but_for_rounding(tmp_path: Path) -> None:
    runs = {name: trainer(tmp_path / name, precision=name, epochs=2) for name in ("fp32", "bf16")}
    losses = {name: [epoch["loss"] for epoch in run.start()] for name, run in runs.items()}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]
    assert {tensor.dtype for tensor in load_file(tmp_path / "bf16" / "best.safetensors").values()} == {torch.float32}
