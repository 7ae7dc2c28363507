"""k calls in flight: chosen by what they bring, what executors get done at once, and those that share their streams."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import pytest

from rankd.artifact import Artifact
from rankd.demo import MODELS
from rankd.engine.backend import EngineConfig, GpuStorage, Precision
from rankd.engine.cuda.calls_in_flight import choose, rate, speeds
from rankd.engine.cuda.cuda_backend import CudaBackend, calls_a_second, model_of
from rankd.engine.cuda.cuda_executor import CudaExecutor
from rankd.errors import ConfigError
from tests.engine.cuda.interpreted_device import InterpretedDevice

ARTIFACT = Artifact.open(MODELS / "demo" / "1")
MODEL = model_of(ARTIFACT, Precision.FP32, lambda tensor: tensor, tile=16, page=16)


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [([100], 1), ([100, 103, 300], 1), ([100, 150, 155], 2), ([100, 150, 200], 3)],
)
def test_one_more_is_under_way_as_long_as_it_pays(rates: list[float], chosen: int) -> None:
    assert choose(rates) == chosen


@pytest.mark.parametrize(
    ("rates", "curve"),
    [
        ([50], [1]),
        ([100, 130, 140], [1, 1.3, 1.4]),
        ([100, 210, 300, 290], [1, 2, 3, 3]),  # two do no more than twice as much, four no less than three
        ([100, 90, 95], [1, 1, 1]),
    ],
)
def test_speed_never_falls_and_is_at_most_as_many_times_as_there_are(rates: list[float], curve: list[float]) -> None:
    assert speeds(rates) == pytest.approx(curve)


def test_what_two_calls_share_is_measured() -> None:
    sending, computing = threading.Lock(), threading.Lock()

    def call() -> None:
        for way in (sending, computing):
            with way:
                time.sleep(0.01)

    rates = [rate([call] * number, 0.2) for number in (1, 2, 3)]
    assert choose(rates) == 2  # two ways: a third call only waits
    assert speeds(rates)[1:] == pytest.approx((2.0, 2.0), abs=0.4)


def made_up(*rates: float) -> tuple[list[list[CudaExecutor]], Callable[[Sequence[CudaExecutor]], float]]:
    """Calls a second by how many executors are at work, and those that they were asked of."""
    asked: list[list[CudaExecutor]] = []

    def calls(executors: Sequence[CudaExecutor]) -> float:
        asked.append(list(executors))
        return rates[len(executors) - 1]

    return asked, calls


def test_k_and_the_speed_of_all_executors_are_measured_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    asked, calls = made_up(100.0, 130.0, 132.0, 140.0)
    with caplog.at_level(logging.INFO, "rankd"):
        backend = CudaBackend(MODEL, InterpretedDevice, EngineConfig(gpu_state_mib=1, executors=2), calls)
    assert (backend.in_flight, backend.num_executors) == (2, 4)
    assert backend.speed == pytest.approx((1.0, 1.3, 1.32, 1.4))
    assert "2 calls in flight for each executor's streams" in caplog.text
    assert "2: 130 (1.30), 3: 132 (1.32), 4: 140 (1.40)" in caplog.text
    executors = [backend.executor() for _ in range(4)]
    assert [len(one) for one in asked] == [1, 2, 3, 3, 4]  # k first, then all streams
    assert asked[-1] == executors  # they have compiled already
    assert executors[2] not in asked[2]  # what k = 3 was tried with is not used
    assert [one._device for one in executors[:2]] == [executors[0]._device] * 2
    assert executors[2]._device is executors[3]._device is not executors[0]._device


def test_the_speed_is_measured_where_k_is_configured_too() -> None:
    asked, calls = made_up(100.0, 90.0, 150.0, 400.0)
    config = EngineConfig(gpu_state_mib=1, executors=4, calls_in_flight=1)
    backend = CudaBackend(MODEL, InterpretedDevice, config, calls)
    assert (backend.in_flight, backend.num_executors) == (1, 4)
    assert backend.speed == pytest.approx((1.0, 1.0, 1.5, 4.0))
    assert [len(one) for one in asked] == [1, 2, 3, 4]
    assert len({id(one._device) for one in asked[-1]}) == 4
    assert CudaBackend(MODEL, InterpretedDevice, config).speed is None  # nobody has measured it


def test_a_backend_has_k_executors_for_each_of_its_streams() -> None:
    opened: list[InterpretedDevice] = []

    def open_device() -> InterpretedDevice:
        opened.append(InterpretedDevice())
        return opened[-1]

    config = EngineConfig(gpu_state_mib=1, executors=2)
    backend = CudaBackend(MODEL, open_device, config, made_up(1.0, 2.0, 2.0, 2.0)[1])
    assert backend.num_executors == 4
    executors = [backend.executor() for _ in range(4)]
    assert [one._device for one in executors] == [opened[0], opened[0], opened[1], opened[1]]
    assert len({id(one._pool) for one in executors}) == 1
    assert (
        CudaBackend(MODEL, open_device, EngineConfig(gpu_state_mib=1, executors=1, calls_in_flight=3)).num_executors
        == 3
    )


def test_what_is_measured_are_calls_that_are_computed() -> None:
    backend = CudaBackend(MODEL, InterpretedDevice, EngineConfig(gpu_state_mib=1, calls_in_flight=1))
    made = [backend.executor() for _ in range(2)]
    replace, manifest = msgspec.structs.replace, ARTIFACT.manifest
    small = replace(manifest, schema=replace(manifest.schema, history_buckets=(4,), candidate_buckets=(2,)))
    assert all(calls_a_second(small, MODEL, made[:count]) > 0 for count in (1, 2))
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
