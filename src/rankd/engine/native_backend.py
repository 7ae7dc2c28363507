"""The native engine as a target: a Climber in bfloat16, compiled by numba on the serving machine (see `native/`).

Needs a processor with AVX512-BF16. It reads the artifact's weights; there are no graphs.

Pinning: the calling thread computes, as the plan says. With more than one thread a call, the others are started by
whichever thread needs them first and inherit its cpus; that is the free thread on which a Ranker warms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file

from rankd.artifact import Artifact
from rankd.engine.backend import EngineConfig, InThisProcess, Precision, StateType, plan_threads
from rankd.engine.native import support
from rankd.errors import ArtifactError, ConfigError
from rankd.types import Array, Float32Array, UserState

if TYPE_CHECKING:
    from rankd.engine.native.native_climber import NativeClimber

TARGET = "native"


class NativeBackend(InThisProcess):
    """Packed weights of one Climber."""

    target, precision, state_type = TARGET, Precision.BF16, StateType.BF16

    def __init__(self, model: NativeClimber, config: EngineConfig) -> None:
        self._model = model
        self.plan = plan_threads(config)
        self.num_executors = self.plan.num_executors

    @classmethod
    def load(
        cls, artifact: Artifact, config: EngineConfig, precision: Precision, state_type: StateType
    ) -> NativeBackend:
        """Pack the artifact's weights.

        Raises:
            ArtifactError: a model that the native engine does not run; the reason is named.
        """
        manifest = artifact.manifest
        if reason := support.why_not(manifest.options, manifest.schema, manifest.model):
            raise ArtifactError(f"{artifact.path} cannot be served by {TARGET}: {reason}; take another target")
        from rankd.engine.native.native_climber import NativeClimber

        weights = load_file(artifact.path / "weights.safetensors")
        try:
            return cls(NativeClimber(weights, manifest.options, manifest.schema, config.threads), config)
        except (ConfigError, KeyError) as error:
            raise ArtifactError(f"{artifact.path} cannot be served by {TARGET}: {error}") from error

    def executor(self) -> NativeExecutor:
        """A new executor over the shared weights."""
        return NativeExecutor(self._model.twin())

    def memory_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self._model.memory_bytes()


class NativeExecutor(InThisProcess):
    """One NativeClimber with memory of its own."""

    def __init__(self, model: NativeClimber) -> None:
        self._model = model

    def encode(self, history: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        """The state of a history."""
        return self._model.encode(history, into)

    def extend(self, state: UserState, new: Mapping[str, Array]) -> Mapping[str, Array]:
        """What A new events a block add to a state."""
        return self._model.extend(state.arrays, new)

    def score(self, states: Sequence[UserState], candidates: Mapping[str, Array]) -> Float32Array:
        """Logits (B, C, K) of all candidate rows, padding included; users one after the other."""
        return np.stack(
            [
                self._model.score(state.arrays, {name: array[row : row + 1] for name, array in candidates.items()})
                for row, state in enumerate(states)
            ]
        )


def why_not(precision: Precision) -> str:
    """Why the native engine cannot be used in a precision here; empty if it can."""
    if precision is not Precision.BF16:
        return "the native engine computes in bf16 alone"
    return support.machine_lacks() or ""
