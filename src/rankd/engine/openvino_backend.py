"""OpenVINO on CPUs: two graphs of an artifact (encode, score), compiled once, one pair of inference requests a thread.

No torch here: the graphs were exported by `rankd build`. Shapes are dynamic in T and C; the first call of a new shape
costs milliseconds, so requests are padded to the schema's buckets and every bucket is warmed before a model is ready.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rankd.artifact import Artifact
from rankd.engine.backend import EngineConfig, Precision
from rankd.errors import ArtifactError, EngineFailure
from rankd.types import Array, Float32Array, UserState

TARGET = "openvino"
HINTS = {Precision.FP32: "f32", Precision.BF16: "bf16"}


class OpenVinoBackend:
    """Compiled graphs of one artifact. `encoder` is None for a model that has no state of its own."""

    def __init__(self, encoder: Any, scorer: Any, precision: Precision, num_executors: int, size_bytes: int) -> None:
        self._encoder, self._scorer, self._size_bytes = encoder, scorer, size_bytes
        self.precision, self.num_executors = precision, num_executors

    @classmethod
    def load(cls, artifact: Artifact, config: EngineConfig) -> OpenVinoBackend:
        """Compile `engines/openvino/*.xml` of an artifact.

        Raises:
            ArtifactError: not built for OpenVINO, a precision that was not checked at build, or a graph that fails.
        """
        path = artifact.path
        record = artifact.manifest.engines.get(TARGET)
        if record is None:
            raise ArtifactError(f"{path} was not built for {TARGET}; run `rankd build --target {TARGET}`")
        precision = config.precision if config.precision is not Precision.AUTO else Precision(record.precision)
        if config.precision is Precision.AUTO and not supports(precision):
            precision = Precision.FP32
        if precision.value not in record.parity:
            raise ArtifactError(
                f"{path} was checked for the precisions {', '.join(record.parity)}, not for {precision.value}"
            )
        count = config.executors or os.cpu_count() or 1
        folder = artifact.path / "engines" / TARGET
        scorer = compile_graph(folder / "score.xml", precision, count, config.threads)
        encoder = None
        if artifact.manifest.split:
            encoder = compile_graph(folder / "encode.xml", precision, count, config.threads)
        size = sum(file.stat().st_size for file in folder.glob("*.bin"))
        return cls(encoder, scorer, precision, count, size)

    def executor(self) -> OpenVinoExecutor:
        """A new pair of inference requests over the shared weights."""
        return OpenVinoExecutor(self._encoder, self._scorer)

    def memory_bytes(self) -> int:
        """Bytes of the graphs' constants as stored."""
        return self._size_bytes


class OpenVinoExecutor:
    """One inference request for each graph. Inputs are read where they lie, the state stays in the outputs."""

    def __init__(self, encoder: Any, scorer: Any) -> None:
        self._encode = _Call(encoder) if encoder is not None else None
        self._score = _Call(scorer)

    def encode(self, history: Mapping[str, Array]) -> UserState:
        """The state of a history; for a model without one, the history itself."""
        return UserState(history if self._encode is None else self._encode(history))

    def score(self, state: UserState, candidates: Mapping[str, Array]) -> Float32Array:
        """Logits (C, K) of all candidate rows, padding included."""
        logits: Float32Array = self._score({**state.arrays, **candidates})["logits"][0].copy()
        return logits


class _Call:
    """An inference request called with named arrays."""

    def __init__(self, compiled: Any) -> None:
        import openvino as ov

        self._tensor = ov.Tensor
        self._request = compiled.create_infer_request()
        self._inputs = [port.get_node().get_friendly_name() for port in compiled.inputs]
        self._outputs = [port.get_node().get_friendly_name() for port in compiled.outputs]

    def __call__(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        try:
            for index, name in enumerate(self._inputs):
                array = np.ascontiguousarray(arrays[name])
                self._request.set_input_tensor(index, self._tensor(array, shared_memory=True))
            self._request.infer()
        except RuntimeError as error:
            raise EngineFailure(f"OpenVINO failed on inputs {_shapes(arrays)}: {error}") from error
        return {name: self._request.get_output_tensor(i).data for i, name in enumerate(self._outputs)}


def compile_graph(path: Path, precision: Precision, streams: int, threads: int) -> Any:
    """Compile one exported graph for the CPU with `streams` concurrent calls of `threads` threads each.

    Raises:
        ArtifactError: the graph cannot be read or compiled.
    """
    import openvino as ov

    core = ov.Core()
    options = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": str(streams * threads),
        "ENABLE_CPU_PINNING": "NO",
    }
    try:
        return core.compile_model(core.read_model(path), "CPU", options)
    except RuntimeError as error:
        raise ArtifactError(f"{path}: OpenVINO cannot compile it here: {error}") from error


def supports(precision: Precision) -> bool:
    """Whether this processor computes in the precision natively."""
    import openvino as ov

    capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return precision is not Precision.BF16 or "BF16" in capabilities


def _shapes(arrays: Mapping[str, Array]) -> str:
    return ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in arrays.items())
