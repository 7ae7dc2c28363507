"""Compression from end to end: a training run and a recipe become another run, if the gate lets it pass.

    <out>                    run.json, best.safetensors, compression.json: a run like any other, for `rankd build`;
                             int8.json with the scales of int8, if the recipe quantizes
    .<out>.compressing       while it is made: begun.json, start.json, start.safetensors, the trainer's checkpoint

An interrupted compression goes on when the same command is run again. <out> appears whole, and only if the gate passed;
the run that was compressed, and what is built of it, are never touched.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from safetensors.torch import save_file
from torch import nn

from rankd.build.int8_graphs import Int8Plan
from rankd.build.pack import catalogue_of
from rankd.compress.accuracy_gate import gate_days, gate_events, judge
from rankd.compress.anatomy import Anatomy
from rankd.compress.calibration import Calibration, calibration_of
from rankd.compress.compression_recipe import CompressionRecipe, Factorise, Prune, ShareLayers, Student, check_recipe
from rankd.compress.distillation import DistillationLoss
from rankd.compress.layer_prices import PriceList, Yardstick, measure_ms, measure_prices, yardstick
from rankd.compress.quantization import Judged, check_int8, check_plan, quantize_and_judge
from rankd.compress.steps import factorise, prune, share_layers, student
from rankd.compress.surgery import Subject
from rankd.errors import ConfigError, GateRefused, RankdError
from rankd.gate_record import Compression, GateRecord, Searched
from rankd.models.protocol import create_model
from rankd.train.batches import Batch, training_batches
from rankd.train.evaluation import Progress, TestEvent
from rankd.train.recipe import ModelChoice, Training
from rankd.train.run import Run, file_sha256, open_run, share_unseen_items
from rankd.train.samples import Dataset, baskets_between
from rankd.train.trainer import Trainer, load_weights, loss_of, seen_days

RECORD = "compression.json"
INT8 = "int8.json"
CALIBRATION_BATCH = 8
S = TypeVar("S", bound=msgspec.Struct)


class Begun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an unfinished compression is of."""

    recipe: CompressionRecipe
    original_sha256: str
    data_sha256: str
    calibration_sha256: str = ""


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model after all steps, before fine-tuning, and what was measured on the way."""

    choice: ModelChoice
    flops: float
    parameters: float
    ms: dict[str, float]
    price_error: float


@dataclass(frozen=True, slots=True)
class Judging:
    """Requests that are no part of any training: the gate's, and those that int8 is calibrated on."""

    events: Sequence[TestEvent]
    calibration: Calibration | None

    @property
    def calibration_sha256(self) -> str:
        """Of the file of the latter; empty if there is none."""
        return "" if self.calibration is None else self.calibration.sha256


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


def compress(
    run: Path,
    recipe: CompressionRecipe,
    out: Path,
    data: Path | None = None,
    progress: Progress = lambda done, total, line: None,
    calibrate: Path | None = None,
) -> Compression:
    """Make a smaller version of a trained run in the folder `out`, or go on with it.

    `calibrate` is a file of requests for int8 (`calibration.py`); without it they are the log's.

    Raises:
        ConfigError: `out` exists, or a compression of something else was begun for it; a bad recipe; a run that is a
            compression itself.
        DataError: the log is not the one that the run was trained on, no days or users to judge by, or requests that
            nothing can be calibrated on.
        BuildError: a step that cannot be done, or a budget that cannot be met.
        GateRefused: the model keeps less than the recipe's bounds; nothing is left in `out` or beside it.
    """
    check_recipe(recipe)
    if out.exists():
        raise ConfigError(f"{out} exists; name another folder with --out, or remove it")
    if (run / RECORD).exists():
        raise ConfigError(
            f"{run} is a compression itself, and a gate on it would not see what it has lost already; compress the "
            "run that it was made from, with the steps of both"
        )
    original = Original(run, *open_run(run, data))
    judging = Judging(gate_events(original.dataset, recipe.gate), _calibration(original.dataset, recipe, calibrate))
    work = out.with_name(f".{out.name}.compressing")
    begun = Begun(recipe, file_sha256(run / "best.safetensors"), original.run.data_sha256, judging.calibration_sha256)
    _begin(work, begun)
    try:
        return _carry_out(work, out, original, recipe, judging, progress)
    except RankdError:  # it would end so again; what was only interrupted stays
        shutil.rmtree(work)
        raise


def _carry_out(
    work: Path,
    out: Path,
    original: Original,
    recipe: CompressionRecipe,
    judging: Judging,
    progress: Progress,
) -> Compression:
    start, model = make_smaller(work, original, recipe, progress)
    dataset, events = original.dataset, judging.events
    gate = judge(original.model, model, dataset, recipe.gate, events, progress)
    if not gate.passed:
        raise GateRefused(f"the compressed model is refused: {refusal(gate)}; nothing was written to {out}")
    if judging.calibration is None:
        return finish(work, out, original, recipe, start, gate)
    subject = Subject(start.choice, dataset.schema, model)
    int8 = quantize_and_judge(original.model, subject, dataset, recipe, judging.calibration, events, progress)
    if not int8.record.gate.passed:
        raise GateRefused(
            f"the model is refused in int8: {refusal(int8.record.gate)}; scales were found on "
            f"{int8.record.num_requests} requests ({int8.record.calibration}), on which int8 changes a logit by "
            f"{int8.record.error:.3g} of their spread; nothing was written to {out}"
        )
    return finish(work, out, original, recipe, start, gate, int8=int8)


def make_smaller(
    work: Path, original: Original, recipe: CompressionRecipe, progress: Progress
) -> tuple[Start, nn.Module]:
    """The model after all steps and fine-tuning, its weights in `work`; goes on with what is there already."""
    start, model = _started(work, original, recipe)
    subject = Subject(start.choice, original.dataset.schema, model)
    _fine_tune(work, original, recipe, subject, progress)
    load_weights(model, work / "best.safetensors")
    share_unseen_items(model, original.dataset)
    return start, model.eval()


def read_compression(folder: Path) -> Compression | None:
    """How a run folder came from `rankd compress`; None for one that did not.

    Raises:
        ConfigError: the record cannot be read, did not pass, or is not of the weights beside it.
    """
    if not (folder / RECORD).exists():
        return None
    made = read_record(folder / RECORD, Compression)
    if not made.gate.passed:
        raise ConfigError(f"{folder / RECORD}: {refusal(made.gate)}; a model that did not pass is not built")
    if made.weights_sha256 != file_sha256(folder / "best.safetensors"):
        raise ConfigError(
            f"{folder / 'best.safetensors'} is not what the gate has judged (its checksum differs); compress again"
        )
    return made


def read_int8(folder: Path, made: Compression | None) -> Int8Plan | None:
    """The scales of a run folder that was quantized; None for one that was not.

    Raises:
        ConfigError: they cannot be read, or are not what the gate has judged. BuildError: it refused them.
    """
    if made is None or isinstance(made.int8, msgspec.UnsetType):
        return None
    return check_plan(read_record(folder / INT8, Int8Plan), made.int8)


def _calibration(dataset: Dataset, recipe: CompressionRecipe, file: Path | None) -> Calibration | None:
    """The requests for int8, if the recipe quantizes."""
    if recipe.quantize is None:
        if file is not None:
            raise ConfigError(f"{file} is for int8, and the recipe has no [quantize]; add it, or leave the file out")
        return None
    check_int8()
    return calibration_of(dataset, recipe.quantize, gate_days(dataset, recipe.gate)[0], recipe.gate.sampled, file)


def refusal(gate: GateRecord) -> str:
    """The metrics that did not pass, with their figures."""
    return "; ".join(
        f"{name} keeps {one.kept:.4f} of the original (95%: {one.low:.4f} to {one.high:.4f}), allowed is {one.bound:g} "
        f"at the lower end"
        for name, one in gate.metrics.items()
        if not one.passed
    )


def _begin(work: Path, begun: Begun) -> None:
    """Make the work folder, or see that it is of the same compression."""
    if (work / "begun.json").exists():
        if read_record(work / "begun.json", Begun) != begun:
            raise ConfigError(
                f"{work} holds an unfinished compression with another recipe, model or log; remove it, or name "
                "another folder with --out"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    write_record(work / "begun.json", begun)


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
    plan, run = recipe.finetune, original.run.recipe
    if plan.epochs == 0 or not recipe.steps:
        shutil.copyfile(work / "start.safetensors", work / "best.safetensors")
        return
    training = msgspec.structs.replace(
        run.training, epochs=plan.epochs, patience=plan.epochs, learning_rate=plan.learning_rate
    )
    weights = torch.tensor([task.rank_weight for task in subject.schema.tasks])
    loss = DistillationLoss(original.model, plan, weights, training.listwise)
    tuned = msgspec.structs.replace(run, model=subject.choice, training=training)
    Trainer(original.dataset, tuned, work, subject.model, loss).start(progress)
    subject.model.eval()


def finish(
    work: Path,
    out: Path,
    original: Original,
    recipe: CompressionRecipe,
    start: Start,
    gate: GateRecord,
    *,
    search: Searched | msgspec.UnsetType = msgspec.UNSET,
    int8: Judged | None = None,
) -> Compression:
    """Write the run of a gate that passed and its record, and move the folder to its place."""
    made = Compression(
        recipe=_without_nothing(recipe),
        original_sha256=file_sha256(original.folder / "best.safetensors"),
        weights_sha256=file_sha256(work / "best.safetensors"),
        flops=start.flops,
        parameters=start.parameters,
        gate=gate,
        ms=start.ms,
        price_error=start.price_error,
        search=search,
        int8=msgspec.UNSET if int8 is None else int8.record,
    )
    run = original.run
    write_record(
        work / "run.json", msgspec.structs.replace(run, recipe=msgspec.structs.replace(run.recipe, model=start.choice))
    )
    if int8 is not None:
        write_record(work / INT8, int8.plan)
    write_record(work / RECORD, made)
    tidy(work)
    work.rename(out)
    return made


def tidy(work: Path) -> None:
    """Remove what only an unfinished compression needs."""
    for name in ("checkpoint.pt", "start.json", "start.safetensors", "begun.json"):
        (work / name).unlink(missing_ok=True)


def _without_nothing(recipe: CompressionRecipe) -> dict[str, Any]:
    """The recipe as a document without nulls, which TOML does not have."""
    document: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(recipe))
    document["steps"] = [{k: v for k, v in step.items() if v is not None} for step in document["steps"]]
    return {name: value for name, value in document.items() if value is not None}


def _size(subject: Subject) -> int:
    return sum(parameter.numel() for parameter in subject.model.parameters())


def write_record(path: Path, value: msgspec.Struct) -> None:
    """Replace a JSON file as a whole."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(value)))
    os.replace(part, path)


def read_record(path: Path, kind: type[S]) -> S:
    """What `write_record` wrote. Raises: ConfigError, it is not there or damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; remove {path.parent} and compress again") from error
