"""k calls in flight: chosen by what they bring, and executors that share their streams."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import msgspec
import pytest

from rankd.artifact import Artifact
from rankd.demo import MODELS
from rankd.engine.backend import EngineConfig, GpuStorage, Precision
from rankd.engine.cuda.calls_in_flight import choose, measured
from rankd.engine.cuda.cuda_backend import CudaBackend, measured_in_flight, model_of
from rankd.engine.cuda.cuda_executor import CudaExecutor
from rankd.errors import ConfigError
from tests.engine.cuda.interpreted_device import InterpretedDevice

ARTIFACT = Artifact.open(MODELS / "demo" / "1")
MODEL = model_of(ARTIFACT, Precision.FP32, lambda tensor: tensor, tile=16, page=16)


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [({1: 100}, 1), ({1: 100, 2: 103, 3: 300}, 1), ({1: 100, 2: 150, 3: 155}, 2), ({1: 100, 2: 150, 3: 200}, 3)],
)
def test_one_more_is_under_way_as_long_as_it_pays(rates: dict[int, float], chosen: int) -> None:
    assert choose(rates) == chosen


def test_what_two_calls_share_is_measured(caplog: pytest.LogCaptureFixture) -> None:
    sending, computing = threading.Lock(), threading.Lock()

    def call() -> None:
        for way in (sending, computing):
            with way:
                time.sleep(0.01)

    with caplog.at_level(logging.INFO, "rankd"):
        assert measured([call] * 3, 0.2) == 2  # two ways: a third call only waits
    assert "2 calls in flight for each executor" in caplog.text


def test_a_backend_has_k_executors_for_each_of_its_streams() -> None:
    opened: list[InterpretedDevice] = []

    def open_device() -> InterpretedDevice:
        opened.append(InterpretedDevice())
        return opened[-1]

    config = EngineConfig(gpu_state_mib=1, executors=2)
    made: list[CudaExecutor] = []

    def two_pay(make: Callable[[], CudaExecutor]) -> int:
        made.extend(make() for _ in range(3))
        return 2

    backend = CudaBackend(MODEL, open_device, config, two_pay)
    assert backend.num_executors == 4
    executors = [backend.executor() for _ in range(4)]
    assert executors[:2] == made[:2]  # they have compiled already
    assert [one._device for one in executors] == [opened[0], opened[0], opened[1], opened[1]]
    assert len({id(one._pool) for one in executors}) == 1
    assert (
        CudaBackend(MODEL, open_device, EngineConfig(gpu_state_mib=1, executors=1, calls_in_flight=3)).num_executors
        == 3
    )


def test_k_is_measured_on_calls_that_are_computed() -> None:
    backend = CudaBackend(MODEL, InterpretedDevice, EngineConfig(gpu_state_mib=1, calls_in_flight=1))
    made: list[CudaExecutor] = []

    def make() -> CudaExecutor:
        made.append(backend.executor())
        return made[-1]

    replace, manifest = msgspec.structs.replace, ARTIFACT.manifest
    small = replace(manifest, schema=replace(manifest.schema, history_buckets=(4,), candidate_buckets=(2,)))
    assert measured_in_flight(small, MODEL, make) in (1, 2, 3)
    assert len(made) == 3
    counts = made[0]._pool.counts()
    assert (counts.sent, counts.states) == (0, 1)
    assert counts.found >= 6


def test_the_pool_is_smaller_where_memory_is_and_refused_where_there_is_none(caplog: pytest.LogCaptureFixture) -> None:
    def backend(memory_bytes: int, **config: object) -> CudaBackend:
        made = EngineConfig(calls_in_flight=1, executors=1, **config)  # type: ignore[arg-type]
        return CudaBackend(MODEL, lambda: InterpretedDevice(memory_bytes), made)

    whole = backend(64 << 20, gpu_state_mib=4).gpu_states
    assert whole is not None
    assert 3 << 20 < whole.counts().budget_bytes <= 4 << 20
    with caplog.at_level(logging.WARNING, "rankd"):
        less = backend(2 << 20, gpu_state_mib=4).gpu_states
    assert less is not None
    assert less.counts().budget_bytes <= 1 << 20
    assert "engine.gpu_state_mib: 0 MiB in place of 4" in caplog.text
    with pytest.raises(ConfigError, match=r"the longest state of one user takes .* CUDA_VISIBLE_DEVICES"):
        backend(1000, gpu_state_mib=4)
    none = backend(64 << 20, gpu_state_mib=0).gpu_states
    assert none is not None
    narrow = backend(64 << 20, gpu_state_mib=0, gpu_storage=GpuStorage.FP8).gpu_states
    assert narrow is not None
    assert narrow.counts().budget_bytes < 0.6 * none.counts().budget_bytes
