"""Where `gpu.py` measures, and how it takes times; what an engine is there, and what is asked of it."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rankd.artifact import Artifact
from rankd.bench.workload import Workload, load_workload
from rankd.engine.backend import EngineConfig, GpuStorage, Precision
from rankd.engine.cuda import gpu_presence
from rankd.engine.targets import load_backend
from rankd.features.schema import TensorSpec
from rankd.types import Array

ROOT = Path(__file__).resolve().parents[1]
TURN_SECONDS, FEWEST = 10.0, 5
"""All calls of all contestants take about so long, with at least so many of each."""
Call = Callable[[], object]


@dataclass(frozen=True)
class Place:
    """Where it is computed, by torch's name, and how much: users of a call, calls of each contestant, seconds of a
    rate, the sides of the matrix whose product is the limit."""

    name: str
    users: tuple[int, ...]
    calls: int
    rate_seconds: float
    side: int
    workloads: Callable[[], list[Workload]]

    @property
    def rehearses(self) -> bool:
        """Whether no figure means anything."""
        return self.name == "cpu"

    @property
    def flight_users(self) -> int:
        """Of each call, where many calls are under way."""
        return self.users[1]


GPU = Place(
    "cuda", (1, 8, 32), 30, 0.5, 8192, lambda: [load_workload(name) for name in ("base", "long", "hstu", "hstu-long")]
)


def rehearsal() -> list[Workload]:
    """A Climber and an HSTU whose calls take seconds in the interpreter."""
    made = []
    for name in ("base", "hstu"):
        whole = load_workload(name)
        model = msgspec.structs.replace(whole.model, layers=2, width=16, heads=1, hidden=16)
        buckets = msgspec.structs.replace(whole.buckets, history=(24,), candidates=(8,))
        history, candidates = (msgspec.structs.replace(law, value=size) for law, size in
                               ((whole.history, 24 * model.blocks), (whole.candidates, 8)))  # fmt: skip
        made.append(
            msgspec.structs.replace(
                whole, model=model, buckets=buckets, history=history, candidates=candidates, items=50,
                users=msgspec.structs.replace(whole.users, count=20),
            )
        )  # fmt: skip
    return made


PROCESSOR = Place("cpu", (1, 2), 1, 0.01, 64, rehearsal)


def device_ms(place: Place, call: Callable[[], object]) -> float:
    """Median milliseconds between events around a call, after three that do not count."""
    import torch

    if place.rehearses:
        return whole_ms(place, {"": call})[""]
    for _ in range(3):
        call()
    spent: list[float] = []
    for _ in range(place.calls):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end))
    return statistics.median(spent)


def whole_ms(place: Place, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of whole calls, what the host does included, the contestants in turn."""
    import torch

    def wait() -> None:
        if not place.rehearses:
            torch.cuda.synchronize()

    rounds = place.calls
    started = time.perf_counter()
    for call in calls.values():
        call()
    wait()
    rounds = max(min(rounds, int(TURN_SECONDS / (time.perf_counter() - started))), min(rounds, FEWEST))
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            wait()
            started = time.perf_counter()
            call()
            wait()
            spent[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(times) for name, times in spent.items()}


def place_for(rehearse: bool) -> Place | str:
    """Where a script measures, made ready for it; or why it cannot."""
    if not rehearse:
        return gpu_presence.why_not() or GPU
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(ROOT))  # tests.engine.cuda.interpreted_device
    return PROCESSOR


def backend_of(
    place: Place,
    artifact: Artifact,
    executors: int,
    calls_in_flight: int,
    storage: GpuStorage = GpuStorage.AUTO,
    rehearsed: int = 16,
) -> Any:
    """The target, with so many groups of streams and calls under way on each, and its pages of a type. A rehearsal has
    tiles and pages of `rehearsed` rows."""
    from rankd.engine.cuda.cuda_backend import CudaBackend

    config = EngineConfig(
        "cuda", Precision.BF16, executors, gpu_state_mib=16384, gpu_storage=storage, calls_in_flight=calls_in_flight
    )
    if not place.rehearses:
        return load_backend(artifact, config)
    config = msgspec.structs.replace(config, gpu_state_mib=8)
    return CudaBackend(gpu_model(place, artifact, rehearsed), device_class(place), config)


def gpu_model(place: Place, artifact: Artifact, rehearsed: int = 16) -> Any:
    """An artifact's weights where calls read them."""
    from rankd.engine.cuda.cuda_backend import model_of

    sizes = {"tile": rehearsed, "page": rehearsed} if place.rehearses else {}
    return model_of(artifact, Precision.BF16, lambda tensor: tensor.to(place.name), **sizes)


def device_class(place: Place) -> Any:
    """What a `Device` is here."""
    if place.rehearses:
        from tests.engine.cuda.interpreted_device import InterpretedDevice

        return InterpretedDevice
    from rankd.engine.cuda.cuda_device import CudaStreams

    return CudaStreams


def inputs_of(artifact: Artifact, workload: Workload, users: int) -> tuple[list[dict[str, Array]], dict[str, Array]]:
    """Random full histories of `users` users, each B = 1, and their candidates together."""
    random, manifest = np.random.default_rng(workload.seed), artifact.manifest
    tokens, count = manifest.schema.history_buckets[-1], manifest.schema.candidate_buckets[-1]
    histories = []
    for _ in range(users):
        history = {spec.name: drawn(spec, random, {"B": 1, "T": tokens}) for spec in manifest.history_inputs}
        history["history_time"] = np.sort(random.integers(0, 10**7, history["history_time"].shape, np.int32))
        history["history_event"] %= len(manifest.schema.event_types)
        history["history_length"][...] = tokens
        histories.append(history)
    candidates = {spec.name: drawn(spec, random, {"B": users, "C": count}) for spec in manifest.candidate_inputs}
    candidates["context_time"][...] = 2 * 10**7
    return histories, candidates


def drawn(spec: TensorSpec, random: np.random.Generator, sizes: dict[str, int]) -> Array:
    """Random numbers for one input; ids are small, for tables of every size."""
    shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
    if spec.dtype == "float32":
        return random.standard_normal(shape).astype(np.float32)
    return random.integers(0, 3, shape).astype(spec.dtype)
