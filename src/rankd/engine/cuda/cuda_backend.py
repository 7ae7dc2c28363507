"""The target `cuda`: a Climber or an HSTU on an NVIDIA GPU, its weights read from the artifact; no graphs to build.

In GPU memory are the weights, the pool of states, and what calls need; the host's states are in page-locked memory,
which the GPU reads and writes. Streams belong to `EngineConfig.executors`; each has k executors of ours, so that k
calls are under way on it. All of them share the GPU: how much they get done at once is measured at the start, and the
schedule goes by it. Nothing of torch or Triton is imported before an artifact is loaded. Pinning: the calling thread
launches and waits.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from rankd.artifact import Artifact, Manifest
from rankd.engine.backend import (
    MOST_IN_FLIGHT,
    EngineConfig,
    GpuStates,
    GpuStorage,
    InThisProcess,
    Precision,
    StateType,
    plan_threads,
)
from rankd.engine.cuda import gpu_presence
from rankd.engine.cuda.calls_in_flight import choose, described, rate, speeds
from rankd.engine.cuda.events_together import EventsTogether
from rankd.engine.cuda.pinned_memory import PinnedMemory
from rankd.engine.warming import Shapes
from rankd.errors import ArtifactError, ConfigError, EngineFailure
from rankd.types import Allocate, UserState

if TYPE_CHECKING:
    from rankd.engine.cuda.cuda_device import Device
    from rankd.engine.cuda.cuda_executor import CudaExecutor, CudaModel
    from rankd.engine.cuda.ranker_weights import Put
    from rankd.engine.cuda.state_pool import StatePool

log = logging.getLogger("rankd")
TARGET = "cuda"
EXECUTORS = 2
"""By default: streams that compute."""
SPARE = 1.5
"""Of the weights' bytes, what has to be free before they are loaded: the rest is for calls."""
USERS_A_CALL = 8
"""For so many users of each executor there is room in the pool in any case, if there is room on the GPU."""
MIB = 1 << 20


class CudaBackend(InThisProcess):
    """Weights on one GPU, the states that stay there, and executors over them.

    `calls_a_second` says what executors get done at once. It is asked of more and more of those that share the first
    streams, to choose k if that is not configured, and then of those of all streams. None: nothing is measured, k is 1
    if it is not configured, and executors count as independent.
    """

    target = TARGET

    def __init__(
        self,
        model: CudaModel,
        open_device: Callable[[], Device],
        config: EngineConfig,
        calls_a_second: Callable[[Sequence[CudaExecutor]], float] | None = None,
    ) -> None:
        self._model, self._open_device = model, open_device
        self._lock, self._made = threading.Lock(), 0
        self.state_type = model.state_type
        self.precision = Precision.BF16 if model.state_type is StateType.BF16 else Precision.FP32
        streams = config.executors or EXECUTORS
        self._device = open_device()
        self._memory = PinnedMemory(self._device)
        self.host_memory: Allocate | None = self._memory.allocate
        self._pool = open_pool(model, self._device, config, streams * (config.calls_in_flight or MOST_IN_FLIGHT))
        self.gpu_states: GpuStates | None = self._pool
        self._together = EventsTogether(streams, self._pool.most_users)
        self._ready: list[CudaExecutor] = []
        self.in_flight = config.calls_in_flight or 1
        if calls_a_second is not None:
            self._measure(calls_a_second, config.calls_in_flight, streams)
        self.plan = plan_threads(msgspec.structs.replace(config, executors=streams * self.in_flight, threads=1))
        self.num_executors = self.plan.num_executors

    @classmethod
    def load(cls, artifact: Artifact, config: EngineConfig, precision: Precision, state_type: StateType) -> CudaBackend:
        """Copy the artifact's weights to the GPU.

        Raises:
            ArtifactError: a model that the target does not run; the reason is named.
            ConfigError: the GPU has too little memory left for the weights or for states, or cannot do e4m3.
        """
        import torch

        from rankd.engine.cuda.cuda_device import CudaStreams

        if config.gpu_storage is GpuStorage.FP8 and (reason := gpu_presence.why_not(least=gpu_presence.LEAST_OF_FP8)):
            raise ConfigError(f'engine.gpu_storage = "fp8" cannot be had: {reason}; take "auto"')
        needed = int((artifact.path / "weights.safetensors").stat().st_size * SPARE)
        free, whole = torch.cuda.mem_get_info(0)
        check_memory(needed, free, whole)
        device = torch.device("cuda", 0)
        model = model_of(artifact, precision, lambda tensor: tensor.to(device))
        return cls(model, CudaStreams, config, partial(calls_a_second, artifact.manifest, model))

    def executor(self) -> CudaExecutor:
        """A new executor with memory of its own; `in_flight` of them one after the other share their streams."""
        with self._lock:
            number, self._made = self._made, self._made + 1
            if self._ready:
                return self._ready.pop(0)
            if number % self.in_flight == 0 and number:
                self._device = self._open_device()
            return self._executor()

    def memory_bytes(self) -> int:
        """Bytes of the weights and tables on the GPU."""
        return self._model.weights.num_bytes()

    def _measure(
        self, calls_a_second: Callable[[Sequence[CudaExecutor]], float], configured: int, streams: int
    ) -> None:
        """Choose k, and say what executors get done at once; those that are made for it are handed out later."""
        rates: list[float] = []

        def one_more() -> None:
            self._ready.append(self._executor())
            rates.append(calls_a_second(self._ready))

        while len(rates) < (configured or MOST_IN_FLIGHT):
            one_more()
        self.in_flight = configured or choose(rates)
        del self._ready[self.in_flight :], rates[self.in_flight :]
        while len(rates) < streams * self.in_flight:
            if len(rates) % self.in_flight == 0:
                self._device = self._open_device()
            one_more()
        self.speed = speeds(rates)
        log.info("%s", described(self.in_flight, rates, self.speed))

    def _executor(self) -> CudaExecutor:
        from rankd.engine.cuda.cuda_executor import CudaExecutor

        return CudaExecutor(self._model, self._pool, self._device, self._memory, self._together)


def open_pool(model: CudaModel, device: Device, config: EngineConfig, executors: int) -> StatePool:
    """Memory for the states: what is configured, or as much of it as there is.

    Raises:
        ConfigError: not even one user's longest state fits.
    """
    from rankd.engine.cuda.paged_states import PageType
    from rankd.engine.cuda.state_pool import StatePool, pages_within

    shape = model.state_shape(PageType.FP8 if config.gpu_storage is GpuStorage.FP8 else None)
    wanted, free = config.gpu_state_mib * MIB, device.free_bytes()
    pages = pages_within(shape, wanted, free, executors * USERS_A_CALL)
    while True:
        try:
            with device.running():
                pool = StatePool(device, shape, pages, keeps=wanted > 0)
            break
        except EngineFailure as error:
            if pages == shape.pages_a_user:
                raise ConfigError(
                    f"the GPU has {free / MIB:.1f} MiB free, and the longest state of one user takes "
                    f"{shape.pages_a_user * shape.page_bytes / MIB:.1f}; end what else runs on this GPU, choose "
                    "another with CUDA_VISIBLE_DEVICES, or take another target"
                ) from error
            pages = max(pages // 2, shape.pages_a_user)
    have = pages * shape.page_bytes
    if have < wanted - shape.page_bytes:
        log.warning("engine.gpu_state_mib: %d MiB in place of %d: no more is free", have // MIB, config.gpu_state_mib)
    return pool


def calls_a_second(manifest: Manifest, model: CudaModel, executors: Sequence[CudaExecutor]) -> float:
    """What executors get done at once: calls for the largest list of candidates and a state that is there."""
    shapes, mark = Shapes(manifest, model.state_type), b"in flight"
    room, candidates = shapes.rooms[-1], shapes.candidates(shapes.candidate_buckets[-1], 1)
    history = shapes.history(room)
    history["history_length"][...] = room
    state = UserState(executors[0].encode(history), (room,) * manifest.schema.num_sub_sequences, mark)
    executors[0].keep(mark)
    calls = [partial(one.score, [state], candidates) for one in executors]
    for call in calls:
        call()
    return rate(calls)


def model_of(artifact: Artifact, precision: Precision, put: Put, **block: int) -> CudaModel:
    """An artifact's model with its weights where `put` puts them. `block` are sizes of `ranker_steps.Block`.

    Raises:
        ArtifactError: a model that the target does not run.
    """
    import torch
    from safetensors.numpy import load_file

    from rankd.engine.cuda.climber_layers import climber_weights
    from rankd.engine.cuda.cuda_executor import CudaModel
    from rankd.engine.cuda.hstu_layers import hstu_weights
    from rankd.engine.cuda.ranker_steps import Block
    from rankd.engine.cuda.ranker_weights import WeightReader

    manifest = artifact.manifest
    if reason := gpu_presence.why_not_model(manifest.model, manifest.options, manifest.schema):
        raise ArtifactError(f"{artifact.path} cannot be served by {TARGET}: {reason}; take another target")
    dtype = torch.bfloat16 if precision is Precision.BF16 else torch.float32
    try:
        reader = WeightReader(load_file(artifact.path / "weights.safetensors"), dtype, put)
        make = {gpu_presence.CLIMBER: climber_weights, gpu_presence.HSTU: hstu_weights}[manifest.model]
        weights = make(reader, manifest.schema, manifest.options)
    except KeyError as error:
        raise ArtifactError(f"{artifact.path} cannot be served by {TARGET}: it has no weight {error}") from error
    return CudaModel(weights, manifest.schema, manifest.state, dtype, Block(**block))


def check_memory(needed: int, free: int, whole: int) -> None:
    """Refuse a GPU with too little memory left.

    Raises:
        ConfigError: how much is there and how much is needed.
    """
    if needed > free:
        raise ConfigError(
            f"the model needs {needed >> 20} MiB of GPU memory to start, and {free >> 20} of {whole >> 20} MiB are "
            "free; end what else runs on this GPU, choose another with CUDA_VISIBLE_DEVICES, or take another target"
        )


def why_not(precision: Precision) -> str:
    """Why the target cannot be used on this machine; empty if it can."""
    return gpu_presence.why_not()
