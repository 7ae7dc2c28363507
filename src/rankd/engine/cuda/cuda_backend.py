"""The target `cuda`: a Climber on an NVIDIA GPU, its weights read from the artifact; there are no graphs to build.

Nothing of torch or Triton is imported before an artifact is loaded. Pinning: the calling thread launches and waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from rankd.artifact import Artifact
from rankd.engine.backend import EngineConfig, InThisProcess, Precision, StateType, plan_threads
from rankd.engine.cuda import gpu_presence
from rankd.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from rankd.engine.cuda.climber_weights import Put
    from rankd.engine.cuda.cuda_device import Device
    from rankd.engine.cuda.cuda_executor import CudaExecutor, CudaModel

TARGET = "cuda"
EXECUTORS = 2
"""By default: while one's request is computed the other's is packed and sent."""
SPARE = 1.5
"""Of the weights' bytes, what has to be free before they are loaded: the rest is for calls."""


class CudaBackend(InThisProcess):
    """Weights on one GPU, and executors with streams of their own over them."""

    target = TARGET

    def __init__(self, model: CudaModel, open_device: Callable[[], Device], config: EngineConfig) -> None:
        self._model, self._open_device = model, open_device
        self.state_type = model.state_type
        self.precision = Precision.BF16 if model.state_type is StateType.BF16 else Precision.FP32
        self.plan = plan_threads(msgspec.structs.replace(config, executors=config.executors or EXECUTORS, threads=1))
        self.num_executors = self.plan.num_executors

    @classmethod
    def load(cls, artifact: Artifact, config: EngineConfig, precision: Precision, state_type: StateType) -> CudaBackend:
        """Copy the artifact's weights to the GPU.

        Raises:
            ArtifactError: a model that the target does not run; the reason is named.
            ConfigError: the GPU has too little memory left for the weights.
        """
        import torch

        from rankd.engine.cuda.cuda_device import CudaStream

        needed = int((artifact.path / "weights.safetensors").stat().st_size * SPARE)
        free, whole = torch.cuda.mem_get_info(0)
        check_memory(needed, free, whole)
        device = torch.device("cuda", 0)
        return cls(model_of(artifact, precision, lambda tensor: tensor.to(device)), CudaStream, config)

    def executor(self) -> CudaExecutor:
        """A new executor with a stream and memory of its own."""
        from rankd.engine.cuda.cuda_executor import CudaExecutor

        return CudaExecutor(self._model, self._open_device())

    def memory_bytes(self) -> int:
        """Bytes of the weights and tables on the GPU."""
        return self._model.weights.num_bytes()


def model_of(artifact: Artifact, precision: Precision, put: Put, **block: int) -> CudaModel:
    """An artifact's model with its weights where `put` puts them. `block` are sizes of `climber_steps.Block`.

    Raises:
        ArtifactError: a model that the target does not run.
    """
    import torch
    from safetensors.numpy import load_file

    from rankd.engine.cuda.climber_steps import Block
    from rankd.engine.cuda.climber_weights import WeightLoader
    from rankd.engine.cuda.cuda_executor import CudaModel

    manifest = artifact.manifest
    if reason := gpu_presence.why_not_model(manifest.model, manifest.options, manifest.schema):
        raise ArtifactError(f"{artifact.path} cannot be served by {TARGET}: {reason}; take another target")
    dtype = torch.bfloat16 if precision is Precision.BF16 else torch.float32
    try:
        loader = WeightLoader(load_file(artifact.path / "weights.safetensors"), dtype, put)
        weights = loader.load(manifest.schema, gpu_presence.fusion_heads(manifest.options))
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
