"""The model of a recipe before int8: all steps are taken, and what is left is tuned to the original.

In: a run, a recipe, a folder to work in. Out: a `Subject` whose weights are in the folder. An interrupted one goes on:

    start.json, start.safetensors    the model after all steps
    checkpoint.pt, epochs.jsonl      the trainer's
    best.safetensors                 the tuned weights

Next: `int8_tuning.py` if int8 is trained for, then the gate.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import nn

from rankd.build.pack import catalogue_of
from rankd.compress.anatomy import Anatomy
from rankd.compress.compression_recipe import (
    CompressionRecipe,
    Factorise,
    FineTuning,
    Prune,
    QuantizedTuning,
    ShareLayers,
    Student,
)
from rankd.compress.distillation import DistillationLoss
from rankd.compress.layer_prices import PriceList, Yardstick, measure_ms, measure_prices, yardstick
from rankd.compress.record_files import read_record, write_record
from rankd.compress.steps import factorise, prune, share_layers, student
from rankd.compress.surgery import Subject
from rankd.models.protocol import create_model
from rankd.train.batches import Batch, training_batches
from rankd.train.evaluation import Progress
from rankd.train.recipe import ModelChoice, Training
from rankd.train.run import Run, share_unseen_items
from rankd.train.samples import Dataset, baskets_between
from rankd.train.trainer import Trainer, load_weights, loss_of, seen_days

WEIGHTS, EPOCHS = "best.safetensors", "epochs.jsonl"
CALIBRATION_BATCH = 8


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model after all steps, before fine-tuning, and what was measured on the way."""

    choice: ModelChoice
    flops: float
    parameters: float
    ms: dict[str, float]
    price_error: float


@dataclass(frozen=True, slots=True)
class Original:
    """The run that is compressed: its folder, run.json, dataset, and model."""

    folder: Path
    run: Run
    dataset: Dataset
    model: nn.Module

    def subject(self) -> Subject:
        """Its model, to take steps from."""
        return Subject(self.run.recipe.model, self.dataset.schema, self.model)


def make_smaller(
    work: Path, original: Original, recipe: CompressionRecipe, progress: Progress
) -> tuple[Start, Subject]:
    """The model after all steps and fine-tuning, its weights in `work`; goes on with what is there already."""
    work.mkdir(parents=True, exist_ok=True)
    start, model = _started(work, original, recipe)
    _fine_tune(work, original, recipe, Subject(start.choice, original.dataset.schema, model), progress)
    return start, read_subject(original, start.choice, work / WEIGHTS)


def read_subject(original: Original, choice: ModelChoice, weights: Path) -> Subject:
    """A model with weights from a file, as `open_run` reads them.

    Raises:
        ConfigError: the file is missing or holds another model's tensors.
    """
    model = create_model(choice.kind, original.dataset.schema, choice.options)
    load_weights(model, weights)
    share_unseen_items(model, original.dataset)
    return Subject(choice, original.dataset.schema, model.eval())


def tuner(
    original: Original, recipe: CompressionRecipe, subject: Subject, folder: Path, tuning: FineTuning | QuantizedTuning
) -> Trainer:
    """What trains a subject's model in a folder as the run was trained, for the epochs and at the rate of `tuning`, on
    the losses of the recipe's fine-tuning; to int8 always in float32, so that its roundings are the only ones."""
    run, dataset = original.run.recipe, original.dataset
    training = msgspec.structs.replace(
        run.training,
        epochs=tuning.epochs,
        patience=tuning.epochs,
        learning_rate=tuning.learning_rate,
        precision="fp32" if isinstance(tuning, QuantizedTuning) else run.training.precision,
    )
    weights = torch.tensor([task.rank_weight for task in dataset.schema.tasks])
    loss = DistillationLoss(original.model, recipe.finetune, weights, training.listwise)
    tuned = msgspec.structs.replace(run, model=subject.choice, training=training)
    return Trainer(dataset, tuned, folder, subject.model, loss)


def tidy_start(work: Path) -> None:
    """Remove what only an unfinished model needs."""
    for name in ("checkpoint.pt", "start.json", "start.safetensors"):
        (work / name).unlink(missing_ok=True)


def _started(work: Path, original: Original, recipe: CompressionRecipe) -> tuple[Start, nn.Module]:
    """The model after the steps, taken or read again. start.json is written last: with it there, all is."""
    if (work / "start.json").exists():
        start = read_record(work / "start.json", Start)
        model = create_model(start.choice.kind, original.dataset.schema, start.choice.options)
        load_weights(model, work / "start.safetensors")
        return start, model.eval()
    first = original.subject()
    stick = yardstick(recipe.request, first.schema)
    catalogue = catalogue_of(original.dataset)
    in_ms = any(isinstance(step, Prune) and step.predicted_ms is not None for step in recipe.steps)
    prices = measure_prices(first, catalogue, recipe.request, stick) if in_ms else None
    subject = first
    for step in recipe.steps:
        match step:
            case Prune():
                subject = _prune(subject, step, original, stick, prices)
            case Factorise():
                subject = factorise(subject, step)
            case ShareLayers():
                subject = share_layers(subject, step)
            case Student():
                subject = student(subject, step)
    ms = {}
    if prices is not None:
        ms = {
            "original": measure_ms(first, catalogue, recipe.request, stick),
            "compressed": measure_ms(subject, catalogue, recipe.request, stick),
            "predicted": _predicted_ms(prices, stick, subject.anatomy()),
        }
    flops = stick.flops(subject.anatomy()) / stick.flops(first.anatomy())
    error = 0.0 if prices is None else prices.worst_error
    start = Start(subject.choice, flops, _size(subject) / _size(first), ms, error)
    save_file(subject.model.state_dict(), work / "start.safetensors", seen_days(original.dataset))
    write_record(work / "start.json", start)
    return start, subject.model


def _prune(subject: Subject, step: Prune, original: Original, stick: Yardstick, prices: PriceList | None) -> Subject:
    """A pruning under its own budget: predicted milliseconds, or a share of the original's FLOPs."""
    training = original.run.recipe.training
    batches = partial(calibration_batches, original.dataset, training, step)
    loss = partial(loss_of, listwise=training.listwise)
    if step.predicted_ms is not None and prices is not None:
        return prune(subject, step, partial(_predicted_ms, prices, stick), step.predicted_ms, batches, loss)
    share = 1.0 if step.flops is None else step.flops
    return prune(subject, step, stick.flops, share * stick.flops(original.subject().anatomy()), batches, loss)


def _predicted_ms(prices: PriceList, stick: Yardstick, anatomy: Anatomy) -> float:
    return prices.predicted_ms(stick.work(anatomy))


def calibration_batches(dataset: Dataset, training: Training, step: Prune) -> Iterable[Batch]:
    """Batches of a few of the training time's requests, the same for the same seed."""
    samples, _ = baskets_between(dataset, 0, dataset.train_until)
    plan = msgspec.structs.replace(training, batch_size=CALIBRATION_BATCH, seed=step.seed)
    return itertools.islice(training_batches(dataset, samples, plan, epoch=0), -(-step.requests // CALIBRATION_BATCH))


def _fine_tune(work: Path, original: Original, recipe: CompressionRecipe, subject: Subject, progress: Progress) -> None:
    """Train what is left, from the last whole epoch if there is one; best.safetensors after. Without a step there is
    nothing to make up for."""
    if recipe.finetune.epochs == 0 or not recipe.steps:
        shutil.copyfile(work / "start.safetensors", work / WEIGHTS)
        return
    tuner(original, recipe, subject, work, recipe.finetune).start(progress)


def _size(subject: Subject) -> int:
    return sum(parameter.numel() for parameter in subject.model.parameters())
