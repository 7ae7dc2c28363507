"""Several models on one GPU: each takes of its memory what is left, and none disturbs another."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rankd.engine.backend import EngineConfig
from rankd.engine.cuda.cuda_backend import CudaBackend
from rankd.errors import ConfigError
from tests.engine.cuda.interpreted_device import InterpretedDevice
from tests.engine.cuda.test_cuda_executor import OPTIONS, model_over, near, state_of
from tests.engine.cuda.test_hstu_executor import DLRM_V3, model_of_hstu
from tests.engine.test_native_climber import candidates_of, history_of, schema_of

CONFIG = EngineConfig("cuda", executors=1, gpu_state_mib=1)
MIB = 1 << 20


@torch.inference_mode()
def test_a_climber_and_an_hstu_share_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    schema = schema_of(1)
    gpu = InterpretedDevice(memory_bytes=int(2.5 * MIB))
    models = [model_over(schema, OPTIONS | {"layers": 1}, torch.float32)[1], model_of_hstu(schema, DLRM_V3)[1]]
    history, candidates = history_of(schema, 16, [16]), candidates_of(schema, 5)
    alone = []
    for model in models:
        executor = CudaBackend(model, InterpretedDevice, CONFIG).executor()
        alone.append(executor.score([state_of(executor, history)], candidates))
    with caplog.at_level(logging.WARNING, "rankd"):
        backends = [CudaBackend(model, lambda: gpu, CONFIG) for model in models]
    assert caplog.text.count("in place of 1: no more is free") == 1  # the second gets half of what the first left
    executors = [backend.executor() for backend in backends]

    def asked(number: int) -> None:
        for _ in range(3):
            state = state_of(executors[number], history)
            near(executors[number].score([state], candidates), alone[number], 1e-6)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(asked, range(2)))
    gpu.memory_bytes = 1000
    with pytest.raises(ConfigError, match="the longest state of one user takes"):
        CudaBackend(models[0], lambda: gpu, CONFIG)
    asked(0)
    asked(1)
