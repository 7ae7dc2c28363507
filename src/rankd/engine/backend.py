"""The protocol between the request path and whatever computes: a Backend makes Executors, an Executor runs one call.

In: Features (named arrays, padded to warmed shapes). Out: UserState, then logits. The schedule knows this file alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Protocol

import msgspec

from rankd.artifact import Artifact
from rankd.errors import ArtifactError, nearest
from rankd.types import Array, Float32Array, UserState


class Precision(Enum):
    """Arithmetic of the compiled graphs. AUTO is what the artifact was built for, if this processor has it."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model is computed. 0 executors: one for each core; threads are those of one call."""

    target: str = "openvino"
    precision: Precision = Precision.AUTO
    executors: int = 0
    threads: int = 1


class Executor(Protocol):
    """One compiled instance with buffers of its own; it runs one call at a time, on one thread."""

    def encode(self, history: Mapping[str, Array]) -> UserState:
        """The state of a history. Its arrays belong to this executor until its next `encode`."""
        ...

    def score(self, state: UserState, candidates: Mapping[str, Array]) -> Float32Array:
        """Logits (C, K) of all candidate rows, padding included; a copy."""
        ...


class Backend(Protocol):
    """An artifact compiled for a target."""

    precision: Precision
    num_executors: int

    def executor(self) -> Executor:
        """A new executor; at most `num_executors` are in use at once."""
        ...

    def memory_bytes(self) -> int:
        """Bytes of weights that the compiled graphs hold."""
        ...


def load_backend(artifact: Artifact, config: EngineConfig) -> Backend:
    """Compile an opened artifact for the configured target.

    Raises:
        ArtifactError: the artifact was not built for that target, or its graph does not compile here.
    """
    if config.target != "openvino":
        raise ArtifactError(
            f"unknown engine target '{config.target}'; there is openvino.{nearest(config.target, ['openvino'])}"
        )
    from rankd.engine.openvino_backend import OpenVinoBackend

    return OpenVinoBackend.load(artifact, config)
