"""Int8, the last thing that a compression does: scales from real requests, then the gate on the graphs as they serve.

In: the model after all steps, calibration requests, the gate's requests. Out: an `Int8Plan` for `rankd build`, and the
record of how it was found and judged. `int8_search.py` finds it; nothing here trains.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from torch import nn

from rankd.artifact import Artifact, EngineRecord
from rankd.build.export import export
from rankd.build.int8_graphs import Int8Plan
from rankd.build.pack import BuildOptions, Contents, catalogue_of, draft
from rankd.compress.accuracy_gate import judge
from rankd.compress.calibration import Calibration
from rankd.compress.compression_recipe import CompressionRecipe, Quantize
from rankd.compress.int8_search import Found, search_int8
from rankd.compress.layer_prices import measure_ms, yardstick
from rankd.compress.surgery import Subject
from rankd.engine.backend import Precision
from rankd.engine.targets import why_not
from rankd.errors import BuildError, ConfigError
from rankd.gate_record import GateRecord, Int8Record
from rankd.train.evaluation import Progress, Scorer, TestEvent
from rankd.train.run import executor_scorer
from rankd.train.samples import Dataset

TARGET = "openvino"


@dataclass(frozen=True, slots=True)
class Judged:
    """A plan, and all that is known of it."""

    plan: Int8Plan
    record: Int8Record


def check_int8() -> None:
    """Raises ConfigError: int8 does not run here, so that the gate could not judge it."""
    if reason := why_not(TARGET, Precision.INT8):
        raise ConfigError(f"[quantize]: {TARGET} cannot compute in int8 here: {reason}")


def quantize_and_judge(
    original: nn.Module,
    subject: Subject,
    dataset: Dataset,
    recipe: CompressionRecipe,
    calibration: Calibration,
    events: Sequence[TestEvent],
    progress: Progress = lambda done, total, line: None,
) -> Judged:
    """Find scales, and score the gate's requests with the quantized graphs; whether that passed is in the record.

    Raises:
        DataError, BuildError: see `search_int8`.
    """
    found = find_int8(subject, calibration, recipe.quantize or Quantize(), progress)
    with int8_scorer(subject, dataset, found.plan) as scorer:
        gate = judge(original, scorer, dataset, recipe.gate, events, progress)
    ms = measured_ms(subject, dataset, recipe, found.plan) if gate.passed else {}
    return Judged(found.plan, _record(found, calibration, gate, ms))


def find_int8(
    subject: Subject, calibration: Calibration, plan: Quantize, progress: Progress = lambda done, total, line: None
) -> Found:
    """Scales, and what stays in float; Raises: see `search_int8`."""
    with tempfile.TemporaryDirectory(prefix="rankd-int8-") as name:
        export(subject.model, subject.schema, TARGET, Path(name))
        return search_int8(Path(name), calibration.requests, plan, progress)


@contextmanager
def int8_scorer(subject: Subject, dataset: Dataset, plan: Int8Plan) -> Iterator[Scorer]:
    """The quantized graphs as a contestant: the artifact that `rankd build` would make of them."""
    choice = subject.choice
    contents = Contents(subject.model, choice.kind, subject.schema, catalogue_of(dataset), (), choice.options)
    options = BuildOptions("judged", "1", Precision.INT8, (TARGET,), int8=plan)
    with tempfile.TemporaryDirectory(prefix="rankd-int8-") as name:
        record = EngineRecord(Precision.INT8.value, {Precision.INT8.value: 0.0})
        manifest = msgspec.structs.replace(draft(Path(name), contents, options), engines={TARGET: record})
        yield executor_scorer(Artifact(Path(name), manifest), Precision.INT8, dataset)


def measured_ms(subject: Subject, dataset: Dataset, recipe: CompressionRecipe, plan: Int8Plan) -> dict[str, float]:
    """Milliseconds of the recipe's request on this machine, in int8 and in its floats: {"int8": 2.1, "fp32": 4.0}."""
    catalogue, stick = catalogue_of(dataset), yardstick(recipe.request, subject.schema)
    plain = Precision.FP32 if why_not(TARGET, Precision.BF16) else Precision.BF16
    return {
        one.value: measure_ms(
            subject, catalogue, msgspec.structs.replace(recipe.request, target=TARGET, precision=one), stick, plan
        )
        for one in (plain, Precision.INT8)
    }


def plan_sha256(plan: Int8Plan) -> str:
    """The checksum of a plan, by which a record knows it."""
    return hashlib.sha256(msgspec.json.encode(plan, order="deterministic")).hexdigest()


def check_plan(plan: Int8Plan, record: Int8Record) -> Int8Plan:
    """The plan, if it is what the gate has judged.

    Raises:
        ConfigError: it is another one.
        BuildError: the gate did not let it pass.
    """
    if plan_sha256(plan) != record.plan_sha256:
        raise ConfigError(
            "the scales of int8 are not what the gate has judged (their checksum differs); compress again"
        )
    if not record.gate.passed:
        raise BuildError("the gate did not let the model pass in int8; build it in bf16 or fp32")
    return plan


def _record(found: Found, calibration: Calibration, gate: GateRecord, ms: dict[str, float]) -> Int8Record:
    return Int8Record(
        calibration=calibration.source,
        calibration_sha256=calibration.sha256,
        num_requests=len(calibration.requests),
        layers=found.layers,
        kept=found.kept,
        error=found.error,
        plan_sha256=plan_sha256(found.plan),
        gate=gate,
        ms=ms,
    )
