"""Int8, the last thing that a compression does: scales from real requests, then the gate on the graphs as they serve.

In: the model after all steps, calibration requests, the gate's requests. Out: an `Int8Plan` for `rankd build`, and the
record of how it was found and judged. `int8_search.py` finds it; nothing here trains, `int8_tuning.py` does.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from rankd.artifact import Artifact, EngineRecord, Manifest
from rankd.build.int8_graphs import Int8Plan, write_int8
from rankd.build.pack import BuildOptions, Contents, catalogue_of, draft
from rankd.compress.accuracy_gate import AccuracyGate
from rankd.compress.calibration import Calibration
from rankd.compress.compression_recipe import CompressionRecipe, Quantize, ReferenceRequest
from rankd.compress.int8_search import Found, search_int8
from rankd.compress.layer_prices import INT8_TARGET as TARGET
from rankd.compress.layer_prices import request_ms, yardstick
from rankd.compress.record_files import read_record, write_record
from rankd.compress.surgery import Subject
from rankd.engine.backend import EngineConfig, Precision
from rankd.engine.targets import float_precision, load_backend, why_not
from rankd.errors import ConfigError
from rankd.gate_record import GateRecord, Int8Record
from rankd.train.evaluation import Progress
from rankd.train.run import executor_scorer
from rankd.train.samples import Dataset

GRAPHS = Path("engines") / TARGET
PLAN = "int8.json"


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
    gate: AccuracyGate,
    subject: Subject,
    recipe: CompressionRecipe,
    calibration: Calibration,
    known: Found | None = None,
    progress: Progress = lambda done, total, line: None,
) -> Judged:
    """Find scales, or take those that are known, and score the gate's requests with the quantized graphs; whether that
    passed is in the record.

    Raises:
        DataError, BuildError: see `search_int8`.
    """
    with float_graphs(subject, gate.dataset) as plain:
        plan = recipe.quantize or Quantize()
        found = known or search_int8(plain.path / GRAPHS, calibration.requests, plan, progress)
        decision, ms = _decision(gate, plain, found.plan, recipe.request, progress)
    return Judged(
        found.plan,
        Int8Record(
            calibration=calibration.source,
            calibration_sha256=calibration.sha256,
            num_requests=len(calibration.requests),
            layers=found.layers,
            kept=found.kept,
            error=found.error,
            plan_sha256=plan_sha256(found.plan),
            gate=decision,
            ms=ms,
        ),
    )


def judge_again(
    gate: AccuracyGate,
    subject: Subject,
    judged: Judged,
    request: ReferenceRequest,
    progress: Progress = lambda done, total, line: None,
) -> Judged:
    """The same scales, judged by another gate.

    Raises:
        BuildError: they are of other weights.
    """
    with float_graphs(subject, gate.dataset) as plain:
        decision, ms = _decision(gate, plain, judged.plan, request, progress)
    return Judged(judged.plan, msgspec.structs.replace(judged.record, gate=decision, ms=ms))


@contextmanager
def float_graphs(subject: Subject, dataset: Dataset) -> Iterator[Artifact]:
    """What `rankd build` would make of the model in floats, without its tables, in a folder that goes afterwards."""
    with tempfile.TemporaryDirectory(prefix="rankd-int8-") as name:
        folder = Path(name) / "plain"
        folder.mkdir()
        choice = subject.choice
        contents = Contents(subject.model, choice.kind, subject.schema, catalogue_of(dataset), (), choice.options)
        manifest = draft(folder, contents, BuildOptions("judged", "1", targets=(TARGET,)))
        precision = float_precision(TARGET)
        yield Artifact(folder, _served_in(manifest, precision))


def _decision(
    gate: AccuracyGate, plain: Artifact, plan: Int8Plan, request: ReferenceRequest, progress: Progress
) -> tuple[GateRecord, dict[str, float]]:
    """What the gate says of the graphs in int8; if they pass, milliseconds of a request in floats and in int8."""
    place = plain.path.with_name("int8")
    shutil.copytree(plain.path, place)
    write_int8(place / GRAPHS, plan)
    narrow = Artifact(place, _served_in(plain.manifest, Precision.INT8))
    executor = load_backend(narrow, EngineConfig(precision=Precision.INT8, executors=1)).executor()
    decision = gate.judge(executor_scorer(narrow, executor, gate.dataset), progress)
    ms = {one: _ms(artifact, request) for one, artifact in _both(plain, narrow)} if decision.passed else {}
    return decision, ms


def _served_in(manifest: Manifest, precision: Precision) -> Manifest:
    record = EngineRecord(precision.value, {precision.value: 0.0})
    return msgspec.structs.replace(manifest, engines={TARGET: record})


def _both(*artifacts: Artifact) -> list[tuple[str, Artifact]]:
    """Artifacts by their precision."""
    return [(one.manifest.engines[TARGET].precision, one) for one in artifacts]


def _ms(artifact: Artifact, request: ReferenceRequest) -> float:
    """Milliseconds of a request on this machine, one thread, the best of a few."""
    backend = load_backend(artifact, EngineConfig(target=TARGET, executors=1))
    return request_ms(backend, artifact.manifest, yardstick(request, artifact.schema))


def plan_sha256(plan: Int8Plan) -> str:
    """The checksum of a plan, by which a record knows it."""
    return hashlib.sha256(msgspec.json.encode(plan, order="deterministic")).hexdigest()


def write_plan(folder: Path, plan: Int8Plan) -> None:
    """int8.json of a run or of a trial."""
    write_record(folder / PLAN, plan)


def read_plan(folder: Path, record: Int8Record) -> Int8Plan:
    """What `write_plan` wrote.

    Raises:
        ConfigError: it cannot be read, or is not what the gate has judged.
    """
    plan = read_record(folder / PLAN, Int8Plan)
    if plan_sha256(plan) != record.plan_sha256:
        raise ConfigError(
            f"{folder / PLAN}: the scales of int8 are not what the gate has judged (their checksum differs); remove "
            f"{folder} and compress again"
        )
    return plan
