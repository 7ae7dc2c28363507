"""What the suite `features` measures: a model over a large catalogue, a store's contents, requests, and right answers.

In: a workload and options. Out: `Subject`. Next: `features.py`, which starts the servers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from rankd.bench.feature_suite.feature_rows import ROW_BYTES, StoreFiles, write_store_files
from rankd.bench.feature_suite.lookups import LookupFigures, measure_lookups
from rankd.bench.feature_suite.zipf_requests import ZipfRequests
from rankd.bench.parity import against_torch, scores_in_process
from rankd.bench.synthetic_model import build_model, schema_of, users_for
from rankd.bench.workload import Fixed, Workload
from rankd.engine.backend import Precision
from rankd.engine.targets import float_precision, why_not, why_not_model
from rankd.ranker import Ranker
from rankd.types import Float32Array, RankRequest

PARITY_REQUESTS = 16
SLOT_BYTES = ROW_BYTES + 24 + 1 / 16
"""Of a row in RowCache: the row, its key and marks, and its part of a bucket's age."""
SPARE_BYTES = 64 << 10
"""Over what the rows take: memory comes in whole pages and buckets."""


@dataclass(frozen=True, slots=True)
class FeatureOptions:
    """Numbers of candidates and delays to the store, all of one with all of the other; `seconds` of a measurement, of
    which a round has six a contestant; `cached_share` of the item rows fit a cache."""

    candidates: tuple[int, ...] = (512, 128)
    delays_ms: tuple[float, ...] = (0.2, 1.0)
    items: int = 1_000_000
    seconds: float = 5.0
    runs: int = 3
    ttl_seconds: float = 3600.0
    cached_share: float = 0.1


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a version folder, the store's contents, requests by their number of candidates, and the scores
    that some of them have to get. A cache of `budget_bytes` holds `slots` rows."""

    workload: Workload
    path: Path
    name: str
    about: Mapping[str, Any]
    files: StoreFiles
    requests: Mapping[int, ZipfRequests]
    checked: list[RankRequest]
    expected: list[Float32Array]
    parity: float
    lookups: LookupFigures
    slots: int
    budget_bytes: int


def prepare(workload: Workload, options: FeatureOptions, folder: Path) -> Subject:
    """Build the model, write the store's files, compute the right answers; nothing of it stays in memory.

    Raises:
        MissingExtra: torch is not installed.
        ConfigError: fewer items than candidates.
        EngineFailure: the engine differs from torch, or the two ways to look rows up differ.
    """
    enlarged = _enlarged(workload, options)
    targets, precision = _served(enlarged)
    path = build_model(enlarged, folder / "built", targets, precision)
    slots = max(int(options.items * options.cached_share), 1)
    budget_bytes = int(slots * SLOT_BYTES) + SPARE_BYTES
    with Ranker.load(path) as ranker:
        catalogue, schema, name = ranker.catalogue, ranker.schema, ranker.manifest.name
        users = users_for(catalogue, enlarged)
        requests = {
            count: ZipfRequests(enlarged, users, catalogue.ids.items, count, name) for count in options.candidates
        }
        first = requests[options.candidates[0]]
        checked = [first.request(number) for number in range(PARITY_REQUESTS)]
        expected = scores_in_process(ranker, checked)
        return Subject(
            workload=enlarged,
            path=ranker.artifact.path,
            name=name,
            about={
                "name": name,
                "version": ranker.manifest.version,
                "source": "random weights",
                "target": ranker.backend.target,
                "precision": ranker.backend.precision.value,
                "users": len(users),
            },
            files=write_store_files(catalogue, schema, folder / "files", enlarged.seed),
            requests=requests,
            checked=checked,
            expected=expected,
            parity=against_torch(ranker, checked, expected),
            lookups=measure_lookups(catalogue, schema, first, budget_bytes, enlarged.seed),
            slots=slots,
            budget_bytes=budget_bytes,
        )


def _enlarged(workload: Workload, options: FeatureOptions) -> Workload:
    """The workload over as many items as are asked for, and with buckets for exactly its candidates."""
    replace, largest = msgspec.structs.replace, max(options.candidates)
    buckets = replace(workload.buckets, candidates=tuple(sorted(set(options.candidates))))
    return replace(workload, items=options.items, candidates=Fixed(largest), buckets=buckets)


def _served(workload: Workload) -> tuple[tuple[str, ...], Precision]:
    """The target and the precision: bfloat16 where the machine has it, by the native engine if it runs the model."""
    kind, options = workload.model.kind.value, workload.model.options()
    if not (why_not("native", Precision.BF16) or why_not_model("native", kind, options, schema_of(workload))):
        return ("native",), Precision.BF16
    return ("openvino",), float_precision("openvino")
