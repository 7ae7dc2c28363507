"""ONNX Runtime: the portable second choice, where OpenVINO does not run. float32; needs the onnxruntime extra.

The graphs are `engines/onnxruntime/*.onnx`, exported by `rankd build --target onnxruntime`.

Pinning: the calling thread computes, as the plan says. With more than one thread a call, the others are started with
the session, work for all executors and stay free.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rankd.artifact import Artifact, Manifest
from rankd.engine.backend import EngineConfig, InThisProcess, Precision, StateType, plan_threads
from rankd.engine.state_arrays import SideBySide, written
from rankd.errors import ArtifactError, EngineFailure
from rankd.types import Array, Float32Array, UserState

TARGET = "onnxruntime"


class OnnxRuntimeBackend(InThisProcess):
    """One session a graph; sessions may be run by several threads at once."""

    target, precision, state_type = TARGET, Precision.FP32, StateType.FP32

    def __init__(self, sessions: Mapping[str, Any], manifest: Manifest, config: EngineConfig, size_bytes: int) -> None:
        self._sessions, self._manifest, self._size_bytes = sessions, manifest, size_bytes
        self.plan = plan_threads(config)
        self.num_executors = self.plan.num_executors

    @classmethod
    def load(
        cls, artifact: Artifact, config: EngineConfig, precision: Precision, state_type: StateType
    ) -> OnnxRuntimeBackend:
        """Open the artifact's ONNX graphs.

        Raises:
            ArtifactError: a graph that this ONNX Runtime does not take.
        """
        import onnxruntime as ort

        folder = artifact.path / "engines" / TARGET
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = config.threads, 1
        options.log_severity_level = 3
        # A thread of ours waits for each call: workers that spin between calls would take its core.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        sessions = {}
        for path in sorted(folder.glob("*.onnx")):
            try:
                sessions[path.stem] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime's errors share no public base class
                raise ArtifactError(f"{path}: ONNX Runtime cannot load it here: {error}") from error
        size = sum(file.stat().st_size for file in folder.glob("*"))
        return cls(sessions, artifact.manifest, config, size)

    def executor(self) -> OnnxRuntimeExecutor:
        """A new executor over the shared sessions."""
        return OnnxRuntimeExecutor(self._sessions, self._manifest)

    def memory_bytes(self) -> int:
        """Bytes of the graphs as stored."""
        return self._size_bytes


class OnnxRuntimeExecutor(InThisProcess):
    """Runs sessions with named arrays."""

    def __init__(self, sessions: Mapping[str, Any], manifest: Manifest) -> None:
        self._sessions = sessions
        self._inputs = {name: [i.name for i in session.get_inputs()] for name, session in sessions.items()}
        self._outputs = {name: [o.name for o in session.get_outputs()] for name, session in sessions.items()}
        self._side_by_side = SideBySide(manifest.state, StateType.FP32)

    def encode(self, history: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        """The state of a history; for a model without one, the history itself."""
        if "encode" not in self._sessions:
            return history
        return written(self._call("encode", history), into)

    def extend(self, state: UserState, new: Mapping[str, Array]) -> Mapping[str, Array]:
        """What A new events a block add to a state."""
        return self._call("extend", {**state.arrays, **{f"new_{name}": array for name, array in new.items()}})

    def score(self, states: Sequence[UserState], candidates: Mapping[str, Array]) -> Float32Array:
        """Logits (B, C, K) of all candidate rows, padding included."""
        return self._call("score", {**self._side_by_side.arrays(states), **candidates})["logits"]

    def _call(self, graph: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
        wanted = {name: np.ascontiguousarray(arrays[name]) for name in self._inputs[graph]}
        try:
            results = self._sessions[graph].run(None, wanted)
        except Exception as error:  # ONNX Runtime's errors share no public base class
            raise EngineFailure(f"ONNX Runtime failed on {graph}: {error}") from error
        names = (name.removeprefix("out_") for name in self._outputs[graph])
        return dict(zip(names, results, strict=True))


def why_not(precision: Precision) -> str:
    """Why ONNX Runtime cannot be used in a precision; empty if it can."""
    if precision is not Precision.FP32:
        return "ONNX Runtime is used in fp32 alone: it has no bfloat16 products on CPUs, and int8 is OpenVINO's here"
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed; install rankd[onnxruntime]"
    return ""
