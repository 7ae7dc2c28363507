"""The full model under more than it can do, alone and with the compressed one as its variant ([elastic]).

In: built versions of a run and of its compression, requests. Out: a row for each, of what was answered in time. Users'
states are kept in both, and are there when the measurement begins; requests have deadlines.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec

from rankd.artifact import Artifact, Manifest, write_artifact
from rankd.bench.arrivals import POISSON
from rankd.bench.compress_suite.stages import MODEL, VERSION, openvino
from rankd.bench.report import Row
from rankd.bench.schedule_suite.live_contestants import Contestant, served
from rankd.bench.schedule_suite.live_load import LoadedServer, Promise
from rankd.bench.served_model import ServedModel
from rankd.bench.server_process import ServerProcess
from rankd.engine.backend import Precision
from rankd.types import RankRequest

VARIANT = f"{VERSION}-compressed"
ENGINE = openvino(Precision.AUTO)
ALONE, ELASTIC = "full alone", "full, with the variant"
OVER = 1.5
"""Times what the full model answers a second when it always has some."""
TIMES = 4
"""As many seconds as a rate that is tried, so that changing to the variant and what waited until then is a part."""


def elastic_rows(folder: Path, full: Path, small: Path, requests: Sequence[RankRequest], promise: Promise) -> list[Row]:
    """The `full` version alone, then, in a `folder`, with the `small` one as its variant.

    Raises:
        EngineFailure, Unavailable: a server answers nothing, or does not start.
    """
    shutil.copytree(full, folder / MODEL / VERSION)
    _called(VARIANT, Artifact.open(small), folder)
    variant = {f"RANKD_ELASTIC__{MODEL.upper()}__VARIANTS": VARIANT}
    alone, rate = _overload(served(ALONE, full.parent.parent, ENGINE), requests, promise)
    elastic, _ = _overload(served(ELASTIC, folder, ENGINE | variant), requests, promise, rate)
    return [alone, elastic]


def _called(name: str, artifact: Artifact, root: Path) -> None:
    """The same version under another name, in a model repository."""

    def fill(work: Path) -> Manifest:
        for file in artifact.manifest.files:
            (work / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.path / file, work / file)
        return msgspec.structs.replace(artifact.manifest, version=name)

    write_artifact(root, MODEL, name, fill)


def _overload(
    contestant: Contestant, requests: Sequence[RankRequest], promise: Promise, rate: float | None = None
) -> tuple[Row, float]:
    """One of them at a rate, by default OVER times what it answers at most; and that rate."""
    with contestant.launch(0) as server:
        loaded = LoadedServer(contestant, server, requests, POISSON, seed=1)
        loaded.warm(len(requests))
        capacity = loaded.warm(len(requests))  # with all states there
        rate = OVER * capacity if rate is None else rate
        before = _answers(server)
        row, _, _ = loaded.overload(rate, TIMES * promise.seconds, promise.bound_ms)
        by_variant = _answers(server) - before
    kept = {key: row[key] for key in ("offered_rate", "good_rate", "answered", "refused", "late", "lost")}
    table = f"{OVER:g} times what the full model can do"
    return {"contestant": contestant.name, "table": table, **kept, "by_variant": by_variant}, rate


def _answers(server: ServerProcess) -> float:
    """How many the variant has given."""
    return server.counter("rankd_elastic_answers_total", version=VARIANT) if isinstance(server, ServedModel) else 0.0
