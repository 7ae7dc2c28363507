"""Int8, the last thing that a compression does: scales from real requests, then the gate on the graphs as they serve.

In: the model after all steps, calibration requests, the gate's requests. Out: an `Int8Plan` for `rankd build`, and the
record of how it was found and judged. `int8_search.py` finds it; nothing here trains.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from torch import nn

from rankd.artifact import Artifact, EngineRecord, Manifest
from rankd.build.int8_graphs import Int8Plan, write_int8
from rankd.build.pack import BuildOptions, Contents, catalogue_of, draft
from rankd.compress.accuracy_gate import judge
from rankd.compress.calibration import Calibration
from rankd.compress.compression_recipe import CompressionRecipe, Quantize
from rankd.compress.int8_search import Found, search_int8
from rankd.compress.layer_prices import request_ms, yardstick
from rankd.compress.surgery import Subject
from rankd.engine.backend import EngineConfig, Precision
from rankd.engine.targets import load_backend, why_not
from rankd.errors import BuildError, ConfigError
from rankd.gate_record import GateRecord, Int8Record
from rankd.train.evaluation import Progress, TestEvent
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
    with tempfile.TemporaryDirectory(prefix="rankd-int8-") as name:
        plain = _drafted(Path(name) / "plain", subject, dataset)
        graphs = Path("engines") / TARGET
        found = search_int8(plain.path / graphs, calibration.requests, recipe.quantize or Quantize(), progress)
        shutil.copytree(plain.path, Path(name) / "int8")
        write_int8(Path(name) / "int8" / graphs, found.plan)
        narrow = Artifact(Path(name) / "int8", _served_in(plain.manifest, Precision.INT8))
        scorer = executor_scorer(narrow, Precision.INT8, dataset)
        gate = judge(original, scorer, dataset, recipe.gate, events, progress)
        ms = {one: _ms(artifact, recipe) for one, artifact in _both(plain, narrow)} if gate.passed else {}
    return Judged(found.plan, _record(found, calibration, gate, ms))


def _drafted(folder: Path, subject: Subject, dataset: Dataset) -> Artifact:
    """What `rankd build` would make of the model in floats, without its tables."""
    folder.mkdir()
    choice = subject.choice
    contents = Contents(subject.model, choice.kind, subject.schema, catalogue_of(dataset), (), choice.options)
    manifest = draft(folder, contents, BuildOptions("judged", "1", targets=(TARGET,)))
    return Artifact(folder, _served_in(manifest, Precision.FP32 if why_not(TARGET, Precision.BF16) else Precision.BF16))


def _served_in(manifest: Manifest, precision: Precision) -> Manifest:
    record = EngineRecord(precision.value, {precision.value: 0.0})
    return msgspec.structs.replace(manifest, engines={TARGET: record})


def _both(*artifacts: Artifact) -> list[tuple[str, Artifact]]:
    """Artifacts by their precision."""
    return [(one.manifest.engines[TARGET].precision, one) for one in artifacts]


def _ms(artifact: Artifact, recipe: CompressionRecipe) -> float:
    """Milliseconds of the recipe's request on this machine, one thread, the best of a few."""
    backend = load_backend(artifact, EngineConfig(target=TARGET, executors=1))
    return request_ms(backend, artifact.manifest, yardstick(recipe.request, artifact.schema))


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
