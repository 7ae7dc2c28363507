"""The reference: the artifact's weights in its own torch module, float32, nothing fused. The truth, and slow.

Needs the train extra, and the module that the model was trained with. The other targets are held against it.
Pinning: the calling thread computes; torch starts the further threads for each caller, and they inherit its cpus.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from rankd.artifact import Artifact, Manifest
from rankd.engine.backend import EngineConfig, InThisProcess, Precision, StateType, plan_threads
from rankd.engine.state_arrays import SideBySide, written
from rankd.errors import EngineFailure
from rankd.types import Array, Float32Array, UserState

TARGET = "reference"


class ReferenceBackend(InThisProcess):
    """A torch module; its executors share the weights."""

    target, precision, state_type = TARGET, Precision.FP32, StateType.FP32

    def __init__(self, model: Any, manifest: Manifest, config: EngineConfig) -> None:
        self._model, self._manifest = model.eval(), manifest
        self.plan = plan_threads(msgspec.structs.replace(config, executors=config.executors or 1))
        self.num_executors = self.plan.num_executors

    @classmethod
    def load(
        cls, artifact: Artifact, config: EngineConfig, precision: Precision, state_type: StateType
    ) -> ReferenceBackend:
        """Make the model by its name and read `weights.safetensors`.

        Raises:
            ConfigError: the model's class is not to be found, or takes other options.
            ArtifactError: the weights are not those of the class.
        """
        import torch

        from rankd.models.protocol import load_model

        manifest = artifact.manifest
        torch.set_num_threads(config.threads)
        model = load_model(manifest.model, manifest.schema, manifest.options, artifact.path / "weights.safetensors")
        return cls(model, manifest, config)

    def executor(self) -> ReferenceExecutor:
        """A new executor over the shared module."""
        return ReferenceExecutor(self._model, self._manifest)

    def memory_bytes(self) -> int:
        """Bytes of the parameters."""
        return sum(p.numel() * p.element_size() for p in self._model.state_dict().values())


class ReferenceExecutor(InThisProcess):
    """Calls the module with arrays in place of tensors."""

    def __init__(self, model: Any, manifest: Manifest) -> None:
        self._model, self._split = model, manifest.split
        self._side_by_side = SideBySide(manifest.state, StateType.FP32)

    def encode(self, history: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        """The state of a history; for a model without one, the history itself."""
        if not self._split:
            return history
        return written(self._call(self._model.encode, history), into)

    def extend(self, state: UserState, new: Mapping[str, Array]) -> Mapping[str, Array]:
        """What A new events a block add to a state."""
        return self._call(self._model.extend, state.arrays, new)

    def score(self, states: Sequence[UserState], candidates: Mapping[str, Array]) -> Float32Array:
        """Logits (B, C, K) of all candidate rows, padding included."""
        method = self._model.score if self._split else self._model
        logits: Float32Array = self._call(method, self._side_by_side.arrays(states), candidates)["logits"]
        return logits

    def _call(self, method: Any, *arguments: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        tensors = [
            {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in one.items()} for one in arguments
        ]
        try:
            with torch.inference_mode():
                result = method(*tensors)
        except RuntimeError as error:
            raise EngineFailure(f"torch failed: {error}") from error
        named = result if isinstance(result, Mapping) else {"logits": result}
        return {name: tensor.numpy() for name, tensor in named.items()}


def why_not(precision: Precision) -> str:
    """Why the reference cannot be used in a precision; empty if it can."""
    if precision is not Precision.FP32:
        return "the reference computes in fp32 alone"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed; install rankd[train]"
    return ""
