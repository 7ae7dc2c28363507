"""Who is compared by `rankd bench compress`: the same ranker served in ways of which each has one cause more.

torch                the model as it was trained, dense, torch eager in float32, no user states
torch, fast path     the same, with MKL's best code on any maker's processor (where a C compiler is)
library              its dense graph on OpenVINO, in the best precision of this machine
mask-aware           rankd's graphs of it: histories apart, no work between candidates
pruned               the compressed model
int8                 the compressed model in int8, if it was quantized
pruned, states       the compressed model with its users' states kept; all requests find theirs
int8, states         the same in int8

All are behind rankd's server with as many executors as there are cores, OpenVINO's graphs for the shapes of their calls
(`engine.static_shapes`). A single request of the first three is computed on all cores by one executor; rankd's own
spread it over their executors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from rankd.bench.compress_suite.dense_artifact import build_dense
from rankd.bench.engine_suite.contestant_process import fast_path_library
from rankd.bench.schedule_suite.live_contestants import IN_ORDER, STATIC_SHAPES, Contestant, served
from rankd.build.int8_graphs import Int8Plan
from rankd.build.pack import BuildOptions, build_artifact
from rankd.compress.smaller_model import Original
from rankd.compress.surgery import Subject
from rankd.engine.backend import Precision
from rankd.engine.targets import float_precision
from rankd.errors import EngineFailure
from rankd.gate_record import Compression
from rankd.train.run import weights_sha256

TORCH, FAST, LIBRARY, MASKED = "torch", "torch, fast path", "library", "mask-aware"
PRUNED, INT8 = "pruned", "int8"
STATES = ", states"
NO_STATES = {"RANKD_STATES__BUDGET_MIB": "0"}
MODEL, VERSION = "ranker", "1"


@dataclass(frozen=True, slots=True)
class Stage:
    """A way to serve. `truth` is the version whose scores in process it has to give: its own, or of the dense ones the
    whole model's. `variables` are of its server; `alone` come to them where one request is computed at a time, `loaded`
    where there are always some. `warm`: all requests find their states."""

    name: str
    version: Path
    truth: Path
    variables: Mapping[str, str]
    alone: Mapping[str, str] = field(default_factory=dict)
    loaded: Mapping[str, str] = field(default_factory=dict)
    warm: bool = False

    @property
    def precision(self) -> str:
        """What it computes in."""
        return self.variables["RANKD_ENGINE__PRECISION"]

    @property
    def set_for_load(self) -> bool:
        """Whether its server is another one under load."""
        return self.alone != self.loaded

    def contestant(self, single: bool) -> Contestant:
        """Its server, set for single requests or for load."""
        variables = {**self.variables, **(self.alone if single else self.loaded)}
        return served(self.name, self.version.parent.parent, variables)


@dataclass(frozen=True, slots=True)
class Compressed:
    """What `rankd compress` made of a run: the model, the record of how, and the scales of int8 if it was quantized."""

    subject: Subject
    made: Compression
    int8: Int8Plan | None


def build_stages(folder: Path, original: Original, compressed: Compressed) -> tuple[Stage, ...]:
    """Build all versions into a folder; the stages in the order of their causes.

    Raises:
        BuildError: a model that cannot be built here. EngineFailure: one that has no dense form.
    """
    best = float_precision("openvino")
    dense = build_dense(
        folder / "dense",
        original.model,
        original.dataset,
        original.run.recipe,
        BuildOptions(MODEL, VERSION, best, ("openvino", "reference"), fall_back=True),
    )
    whole = build_version(folder / "whole", original, original.subject(), best)
    small = build_version(folder / "small", original, compressed.subject, best, compressed)
    cores = str(len(os.sched_getaffinity(0)))
    dense_at = partial(Stage, version=dense, truth=whole, alone=_threads("1", cores), loaded=_threads(cores, "1"))
    plain = {**NO_STATES, **IN_ORDER}
    stages = [dense_at(TORCH, variables={**plain, **_engine("reference", Precision.FP32)})]
    try:
        fast = {"LD_PRELOAD": str(fast_path_library(folder))}
        stages.append(dense_at(FAST, variables={**stages[0].variables, **fast}))
    except EngineFailure:
        pass  # without a compiler there is the one baseline
    engine = openvino(best)
    stages.append(dense_at(LIBRARY, variables={**plain, **engine}))
    stages.append(Stage(MASKED, whole, whole, {**NO_STATES, **engine}))
    stages += _cold_and_warm(PRUNED, small, engine)
    if compressed.int8 is not None:
        narrow = build_version(folder / "int8", original, compressed.subject, Precision.INT8, compressed)
        stages += _cold_and_warm(INT8, narrow, openvino(Precision.INT8))
    return tuple(stages)


def build_version(
    root: Path,
    original: Original,
    subject: Subject,
    precision: Precision,
    compressed: Compressed | None = None,
) -> Path:
    """A version of a subject, with the record of its compression if it is compressed, else the checksum of its run."""
    recipe = msgspec.structs.replace(original.run.recipe, model=subject.choice)
    made, int8 = (None, None) if compressed is None else (compressed.made, compressed.int8)
    plan = int8 if precision is Precision.INT8 else None
    options = BuildOptions(MODEL, VERSION, precision, ("openvino",), int8=plan)
    sha256 = weights_sha256(original.folder) if compressed is None else ""
    return build_artifact(root, subject.model, original.dataset, recipe, options, compression=made, run_sha256=sha256)


def _cold_and_warm(name: str, version: Path, engine: Mapping[str, str]) -> list[Stage]:
    return [
        Stage(name, version, version, {**NO_STATES, **engine}),
        Stage(name + STATES, version, version, engine, warm=True),
    ]


def openvino(precision: Precision) -> dict[str, str]:
    """OpenVINO in a precision, as all of its stages have it."""
    return {**_engine("openvino", precision), **STATIC_SHAPES}


def _engine(target: str, precision: Precision) -> dict[str, str]:
    return {"RANKD_ENGINE__TARGET": target, "RANKD_ENGINE__PRECISION": precision.value}


def _threads(executors: str, threads: str) -> dict[str, str]:
    return {"RANKD_ENGINE__EXECUTORS": executors, "RANKD_ENGINE__THREADS": threads}
