"""OpenVINO on CPUs: the graphs of an artifact (encode, extend, score), compiled once, with requests for each thread.

No torch here: the graphs were exported by `rankd build`. Shapes are dynamic in T, C and (of score) B; the first call of
a new shape costs milliseconds, so requests are padded to the schema's buckets and every bucket is warmed before a model
is ready. Arrays cross the border as they lie: inputs are read in place, a state is written where the caller keeps it.

Pinning (OpenVINO 2026.4, watched on a simulated machine of two nodes): with one stream the calling thread computes.
With more, OpenVINO's own threads do while ours waits, and any stream of a compiled graph may serve any call. So
executors are bound to nodes, not to cores, and the graphs are compiled once for each node, on a thread that runs there:
OpenVINO puts the streams on that node, as far as it has cores for them, and keeps them there while they compute.
ENABLE_CPU_PINNING stays off: it ties the n-th stream of each graph to the same core, where two executors that are in
different graphs would meet while another core is idle. OpenVINO keeps to a cpuset by itself, and has no more streams
than allowed cpus; executors beyond that take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from rankd.artifact import Artifact, Manifest
from rankd.engine.backend import EngineConfig, Precision, StateType, plan_threads
from rankd.engine.signal_stack import kept_signal_stack
from rankd.engine.state_arrays import SideBySide, empty_state
from rankd.engine.thread_plan import Cpus, ThreadPlan, pin
from rankd.errors import ArtifactError, EngineFailure
from rankd.types import Array, Float32Array, UserState

TARGET = "openvino"
HINTS = {Precision.FP32: "f32", Precision.BF16: "bf16"}


class OpenVinoBackend:
    """Compiled graphs of one artifact. `encoder` is None for a model that has no state of its own."""

    target = TARGET

    def __init__(
        self,
        graphs: Mapping[Cpus | None, Mapping[str, CompiledGraph]],
        manifest: Manifest,
        precision: Precision,
        state_type: StateType,
        plan: ThreadPlan,
    ) -> None:
        self._manifest = manifest
        self._graphs_in_turn = cycle([graphs[cpus] for cpus in plan.cpus])
        self.precision, self.state_type = precision, state_type
        self.plan, self.num_executors = plan, plan.num_executors
        self._size_bytes = 0

    @classmethod
    def load(
        cls, artifact: Artifact, config: EngineConfig, precision: Precision, state_type: StateType
    ) -> OpenVinoBackend:
        """Compile `engines/openvino/*.xml` of an artifact.

        Raises:
            ArtifactError: a graph that fails.
        """
        folder, manifest = artifact.path / "engines" / TARGET, artifact.manifest
        plan = plan_threads(config, by_node=True)

        def compiled(cpus: Cpus | None) -> dict[str, CompiledGraph]:
            streams = plan.cpus.count(cpus)
            return load_graphs(folder, manifest, precision, state_type, streams, config.threads)

        graphs = {cpus: _on(cpus, partial(compiled, cpus)) for cpus in dict.fromkeys(plan.cpus)}
        backend = cls(graphs, manifest, precision, state_type, plan)
        backend._size_bytes = sum(file.stat().st_size for file in folder.glob("*.bin"))
        return backend

    def executor(self) -> OpenVinoExecutor:
        """New inference requests over the weights of its node."""
        return OpenVinoExecutor(next(self._graphs_in_turn), self._manifest, self.state_type)

    def memory_bytes(self) -> int:
        """Bytes of the graphs' constants as stored."""
        return self._size_bytes


class OpenVinoExecutor:
    """One inference request for each graph."""

    def __init__(self, graphs: Mapping[str, CompiledGraph], manifest: Manifest, state_type: StateType) -> None:
        self._calls = {name: _Call(graph) for name, graph in graphs.items()}
        self._specs, self._state_type = manifest.state, state_type
        self._side_by_side = SideBySide(manifest.state, state_type)

    def encode(self, history: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        """The state of a history; for a model without one, the history itself."""
        if "encode" not in self._calls:
            return history
        if into is None:
            into = empty_state(self._specs, history["history_item"].shape[2], self._state_type)
        self._calls["encode"](history, into)
        return into

    def extend(self, state: UserState, new: Mapping[str, Array]) -> Mapping[str, Array]:
        """What A new events a block add to a state."""
        return self._calls["extend"]({**state.arrays, **{f"new_{name}": array for name, array in new.items()}})

    def score(self, states: Sequence[UserState], candidates: Mapping[str, Array]) -> Float32Array:
        """Logits (B, C, K) of all candidate rows, padding included."""
        arrays = {**self._side_by_side.arrays(states), **candidates}
        logits: Float32Array = self._calls["score"](arrays)["logits"].copy()
        return logits


@dataclass(frozen=True, slots=True)
class CompiledGraph:
    """A compiled graph, and the outputs that are inputs handed through: {output: input}. They are no part of it.

    OpenVINO lets such a pair share memory, and with tensors of ours on both sides it overwrites the input.
    """

    compiled: Any
    handed_through: Mapping[str, str]


class _Call:
    """An inference request called with named arrays; always with `into`, or never."""

    def __init__(self, graph: CompiledGraph) -> None:
        import openvino as ov

        self._ov, self._handed_through, compiled = ov, graph.handed_through, graph.compiled
        self._request = compiled.create_infer_request()
        self._inputs = [(port.get_node().get_friendly_name(), port.get_element_type()) for port in compiled.inputs]
        self._outputs = [(output_name(port), port.get_element_type()) for port in compiled.outputs]

    def __call__(self, arrays: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        try:
            for index, (name, kind) in enumerate(self._inputs):
                self._request.set_input_tensor(index, self._tensor(arrays[name], kind))
            if into is not None:
                for index, (name, kind) in enumerate(self._outputs):
                    self._request.set_output_tensor(index, self._tensor(into[name], kind))
            self._request.infer()
        except RuntimeError as error:
            raise EngineFailure(f"OpenVINO failed on inputs {_shapes(arrays)}: {error}") from error
        same = {output: arrays[name] for output, name in self._handed_through.items()}
        if into is None:
            return {name: self._array(index, kind) for index, (name, kind) in enumerate(self._outputs)} | same
        for output, array in same.items():
            into[output][...] = array
        return into

    def _tensor(self, array: Array, kind: Any) -> Any:
        if kind == self._ov.Type.bf16:
            return self._ov.Tensor(array, self._ov.Shape(array.shape), kind)
        return self._ov.Tensor(array if array.flags.c_contiguous else np.ascontiguousarray(array), shared_memory=True)

    def _array(self, index: int, kind: Any) -> Array:
        data: Array = self._request.get_output_tensor(index).data
        return data.view(np.uint16) if kind == self._ov.Type.bf16 else data


def _on(cpus: Cpus | None, make: Callable[[], dict[str, CompiledGraph]]) -> dict[str, CompiledGraph]:
    """Compile on a thread of its own that is bound to cpus; None: here."""
    if cpus is None:
        return make()
    with ThreadPoolExecutor(1, initializer=pin, initargs=(cpus,)) as thread:
        return thread.submit(make).result()


def load_graphs(
    folder: Path, manifest: Manifest, precision: Precision, state_type: StateType, streams: int, threads: int
) -> dict[str, CompiledGraph]:
    """Compile every graph in a folder: {"score": ..., "encode": ..., "extend": ...}, the latter two where they are.

    Raises:
        ArtifactError: a graph cannot be read or compiled.
    """
    floats = {spec.name for spec in manifest.state if spec.dtype == "float32"} if manifest.split else set()
    narrow = floats if state_type is StateType.BF16 else set()
    return {
        path.stem: compile_graph(path, precision, streams, threads, narrow) for path in sorted(folder.glob("*.xml"))
    }


def compile_graph(
    path: Path, precision: Precision, streams: int, threads: int, bf16_ports: set[str] | frozenset[str] = frozenset()
) -> CompiledGraph:
    """Compile one exported graph for the CPU with `streams` concurrent calls of `threads` threads each.

    Inputs and outputs named in `bf16_ports` are bfloat16 instead of float32.

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
        graph = core.read_model(path)
        handed_through = {}
        for result in graph.get_results():
            source = result.input_value(0).get_node()
            if source.get_type_name() == "Parameter":
                handed_through[output_name(result.output(0))] = source.get_friendly_name()
                graph.remove_result(result)
        ports = ov.preprocess.PrePostProcessor(graph)
        for index, port in enumerate(graph.inputs):
            if port.get_node().get_friendly_name() in bf16_ports:
                ports.input(index).tensor().set_element_type(ov.Type.bf16)
        for index, port in enumerate(graph.outputs):
            if output_name(port) in bf16_ports:
                ports.output(index).tensor().set_element_type(ov.Type.bf16)
        with kept_signal_stack():
            return CompiledGraph(core.compile_model(ports.build(), "CPU", options), handed_through)
    except RuntimeError as error:
        raise ArtifactError(f"{path}: OpenVINO cannot compile it here: {error}") from error


def output_name(port: Any) -> str:
    """An output is called out_<name> in the graph."""
    name: str = port.get_node().get_friendly_name()
    return name.removeprefix("out_")


def why_not(precision: Precision) -> str:
    """Why this processor or library cannot compute in a precision; empty if it can."""
    import openvino as ov

    if precision is Precision.BF16 and "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "this processor has no bfloat16 arithmetic; use fp32"
    return ""


def _shapes(arrays: Mapping[str, Array]) -> str:
    return ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in arrays.items())
