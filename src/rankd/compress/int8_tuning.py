"""Quantization-aware fine-tuning: a model learns to be good in int8, where scales alone lose too much.

In: a model in floats, calibration requests. Out: the model with other weights, and the scales that it was tuned on; the
gate judges its graphs next, as any other's (`quantization.py`). Scales are found before, on the products that
`int8_search.py` quantizes, and kept: they are what the weights have learned with. The loss is that of fine-tuning.

    floats/    what `smaller_model.py` needs to go on
    int8/      scales.json, and the trainer's files: an epoch that is over is not done again
    best.safetensors, epochs.jsonl    when it is over
"""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
from safetensors.torch import save_file

from rankd.build.int8_graphs import plan_at, product_places
from rankd.compress.calibration import Calibration
from rankd.compress.compression_recipe import CompressionRecipe, Quantize, QuantizedTuning
from rankd.compress.fake_quantization import FakeQuantized, call_limits
from rankd.compress.int8_search import Found, int8_error, search_int8
from rankd.compress.quantization import GRAPHS, float_graphs
from rankd.compress.record_files import read_record, write_record
from rankd.compress.smaller_model import EPOCHS, WEIGHTS, Original, read_subject, tuner
from rankd.compress.surgery import Subject
from rankd.train.evaluation import Progress
from rankd.train.trainer import seen_days

FLOATS, TUNING = "floats", "int8"


class Scales(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """scales.json: limits of activations by the number of the product in each graph, and by that of the call of
    `linear` in the model; which layers stay in float, of how many."""

    places: dict[str, dict[int, float]]
    calls: dict[str, dict[int, float]]
    kept: tuple[str, ...]
    layers: int


def tuning_of(recipe: CompressionRecipe) -> QuantizedTuning | None:
    """How a recipe tunes in int8; None if it does not."""
    return None if recipe.quantize is None else recipe.quantize.finetune


def float_folder(work: Path, recipe: CompressionRecipe) -> Path:
    """Where the model in floats is made."""
    return work if tuning_of(recipe) is None else work / FLOATS


def tidy_tuning(work: Path) -> None:
    """Remove what only unfinished tuning needs."""
    for name in (FLOATS, TUNING):
        shutil.rmtree(work / name, ignore_errors=True)


def tune_in_int8(
    work: Path,
    original: Original,
    recipe: CompressionRecipe,
    subject: Subject,
    calibration: Calibration,
    progress: Progress,
) -> tuple[Subject, Found]:
    """The subject tuned in fake int8, its weights in `work`, and its scales; goes on with what is there already.

    Raises:
        DataError, BuildError: see `search_int8`, `call_limits`.
    """
    plan, folder = recipe.quantize or Quantize(), work / TUNING
    scales = _scales(folder, original, subject, plan, calibration, progress)
    model = FakeQuantized(copy.deepcopy(subject.model), scales.calls)
    quantized = replace(subject, model=model)
    tuner(original, recipe, quantized, folder, plan.finetune or QuantizedTuning()).start(progress)
    part = work / f"{WEIGHTS}.part"
    save_file(model.model.state_dict(), part, seen_days(original.dataset))
    os.replace(part, work / WEIGHTS)
    shutil.copyfile(folder / EPOCHS, work / EPOCHS)
    subject = read_subject(original, subject.choice, work / WEIGHTS)
    with float_graphs(subject, original.dataset) as plain:
        limits = plan_at(plain.path / GRAPHS, scales.places)
        error = int8_error(plain.path / GRAPHS, calibration.requests, limits)
    return subject, Found(limits, error, scales.kept, scales.layers)


def _scales(
    folder: Path, original: Original, subject: Subject, plan: Quantize, calibration: Calibration, progress: Progress
) -> Scales:
    """The scales of the model in floats: found now, or read again."""
    place = folder / "scales.json"
    if place.exists():
        return read_record(place, Scales)
    with float_graphs(subject, original.dataset) as plain:
        graphs = plain.path / GRAPHS
        found = search_int8(graphs, calibration.requests, plan, progress)
        calls = call_limits(subject.model, graphs, found.plan, calibration.requests[0])
        scales = Scales(product_places(graphs, found.plan), calls, found.kept, found.layers)
    folder.mkdir(parents=True, exist_ok=True)
    write_record(place, scales)
    return scales
