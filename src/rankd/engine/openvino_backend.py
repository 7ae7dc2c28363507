"""OpenVINO on CPUs: the graphs of an artifact (encode, extend, score), compiled once, with requests for each thread.

No torch here: the graphs were exported by `rankd build` and are compiled by `openvino_graphs.py`. The first call of a
new shape costs milliseconds, so requests are padded to the schema's buckets and every bucket is warmed before a model
is ready. Arrays cross the border as they lie: inputs are read in place, a state is written where the caller keeps it.

With one stream the calling thread computes. With more, OpenVINO's own threads do while ours waits, and hand-overs cost
time. So graphs are compiled for each executor by itself as long as there is memory for the copies of their weights
(`weight_copies_mib`); otherwise executors share them. As far as that memory goes there is one more graph, of several
threads, that encodes a history while nothing else is computed; whoever that is uses it.

Pinning (OpenVINO 2026.4, watched on a simulated machine of two nodes): any stream of a shared graph may serve any call.
So executors are bound to nodes, not to cores, and graphs are compiled for a node on a thread that runs there:
OpenVINO puts the streams on that node, as far as it has cores for them, and keeps them there while they compute.
ENABLE_CPU_PINNING stays off: it ties the n-th stream of each graph to the same core, where two executors that are in
different graphs would meet while another core is idle. OpenVINO keeps to a cpuset by itself, and has no more streams
than allowed cpus; executors beyond that take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from rankd.artifact import Artifact, Manifest
from rankd.engine.backend import EngineConfig, InThisProcess, Precision, StateType, plan_threads
from rankd.engine.openvino_graphs import (
    GRAPHS,
    MIB,
    CompiledGraph,
    CompileOptions,
    ShapedGraph,
    computes_in,
    load_graphs,
    output_name,
    packed_bytes,
)
from rankd.engine.state_arrays import SideBySide, empty_state
from rankd.engine.thread_plan import Cpus, ThreadPlan, pin
from rankd.errors import EngineFailure
from rankd.types import Array, Float32Array, UserState

TARGET = "openvino"
Names = Sequence[str]
NamedCall = Callable[[Mapping[str, Array], Mapping[str, Array] | None], Mapping[str, Array]]


class OpenVinoBackend(InThisProcess):
    """Compiled graphs of one artifact. `encoder` is None for a model that has no state of its own."""

    target = TARGET

    def __init__(
        self,
        graphs: Sequence[Mapping[str, ShapedGraph]],
        compile_anew: Callable[[Cpus | None], Mapping[str, ShapedGraph]],
        wide: ShapedGraph | None,
        manifest: Manifest,
        precision: Precision,
        state_type: StateType,
        plan: ThreadPlan,
    ) -> None:
        self._manifest, self._made = manifest, count()
        self._graphs, self._compile_anew, self._wide = graphs, compile_anew, WideEncoding(wide)
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

        sizes = {file.stem: packed_bytes(file, precision) for file in folder.glob("*.xml")}
        copies = (plan.num_executors - 1) * sum(sizes.values())
        left, wide = config.weight_copies_mib * MIB, None

        def compiled(
            cpus: Cpus | None, streams: int, spare_bytes: int, threads: int = config.threads, names: Names = GRAPHS
        ) -> dict[str, ShapedGraph]:
            static_bytes = spare_bytes if config.static_shapes else 0
            options = CompileOptions(precision, state_type, streams, threads, static_bytes)
            return _on(cpus, partial(load_graphs, folder, manifest, options, names))

        if copies <= left:
            left -= copies
            threads = config.wide_threads(plan.num_executors)
            size = sizes.get("encode", left)
            if threads > config.threads and len(set(plan.cpus)) == 1 and size < left:
                shapes = 1 + len(manifest.schema.history_buckets)
                wide = compiled(plan.cpus[0], 1, min(shapes * size, left) - size, threads, ("encode",))["encode"]
                left -= min(shapes * size, left)
            graphs = [compiled(cpus, 1, left // plan.num_executors) for cpus in plan.cpus]
        else:
            places = dict.fromkeys(plan.cpus)
            shared = {cpus: compiled(cpus, plan.cpus.count(cpus), left // len(places)) for cpus in places}
            graphs = [shared[cpus] for cpus in plan.cpus]
        backend = cls(graphs, lambda cpus: compiled(cpus, 1, 0), wide, manifest, precision, state_type, plan)
        backend._size_bytes = sum(file.stat().st_size for file in folder.glob("*.bin"))
        return backend

    def executor(self) -> OpenVinoExecutor:
        """New inference requests. One in place of an executor that was lost gets graphs that are compiled anew, for any
        shape: nobody knows what the lost one still holds."""
        number = next(self._made)
        if number < len(self._graphs):
            graphs = self._graphs[number]
        else:
            graphs = self._compile_anew(self.plan.cpus[number % self.num_executors])
        return OpenVinoExecutor(graphs, self._manifest, self.state_type, self._wide)

    def memory_bytes(self) -> int:
        """Bytes of the graphs' constants as stored."""
        return self._size_bytes


class OpenVinoExecutor(InThisProcess):
    """Inference requests of its own for each graph."""

    def __init__(
        self,
        graphs: Mapping[str, ShapedGraph],
        manifest: Manifest,
        state_type: StateType,
        wide: WideEncoding | None = None,
    ) -> None:
        self._calls = {name: _Call(graph) for name, graph in graphs.items()}
        self._wide = wide or WideEncoding(None)
        self._specs, self._state_type = manifest.state, state_type
        self._side_by_side = SideBySide(manifest.state, state_type)

    def encode(self, history: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        """The state of a history; for a model without one, the history itself."""
        if "encode" not in self._calls:
            return history
        if into is None:
            into = empty_state(self._specs, history["history_item"].shape[2], self._state_type)
        encode = self._wide.call if self.encode_wide else None
        (encode or self._calls["encode"])(history, into)
        return into

    def extend(self, state: UserState, new: Mapping[str, Array]) -> Mapping[str, Array]:
        """What A new events a block add to a state."""
        return self._calls["extend"]({**state.arrays, **{f"new_{name}": array for name, array in new.items()}})

    def score(self, states: Sequence[UserState], candidates: Mapping[str, Array]) -> Float32Array:
        """Logits (B, C, K) of all candidate rows, padding included."""
        arrays = {**self._side_by_side.arrays(states), **candidates}
        logits: Float32Array = self._calls["score"](arrays)["logits"].copy()
        return logits

    def close(self) -> None:
        """It may still be in the graph that all share."""
        self._wide.call = None


class WideEncoding:
    """The graph of several threads that executors share, one of them at a time. `call` is None if there is none, or
    an executor was lost that may still be in it."""

    def __init__(self, graph: ShapedGraph | None) -> None:
        self.call: NamedCall | None = None if graph is None else _Call(graph)


class _Call:
    """A graph called with named arrays: compiled for their shapes if it was, else for any."""

    def __init__(self, graph: ShapedGraph) -> None:
        self._key, self._any_shape = graph.key, _Request(graph.any_shape)
        self._static = {key: _Request(one) for key, one in graph.static.items()}

    def __call__(self, arrays: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        return self._static.get(self._key(arrays), self._any_shape)(arrays, into)


class _Request:
    """An inference request called with named arrays; always with `into`, or never."""

    def __init__(self, graph: CompiledGraph) -> None:
        import openvino as ov

        self._ov, self._handed_through, compiled = ov, graph.handed_through, graph.compiled
        self._request = compiled.create_infer_request()
        self._inputs = [(port.get_node().get_friendly_name(), port.get_element_type()) for port in compiled.inputs]
        self._outputs = [(output_name(port), port.get_element_type()) for port in compiled.outputs]

    def __call__(self, arrays: Mapping[str, Array], into: Mapping[str, Array] | None) -> Mapping[str, Array]:
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


def _on(cpus: Cpus | None, make: Callable[[], dict[str, ShapedGraph]]) -> dict[str, ShapedGraph]:
    """Compile on a thread of its own that is bound to cpus; None: here."""
    if cpus is None:
        return make()
    with ThreadPoolExecutor(1, initializer=pin, initargs=(cpus,)) as thread:
        return thread.submit(make).result()


def why_not(precision: Precision) -> str:
    """Why this processor or library cannot compute in a precision; empty if it can."""
    import openvino as ov

    if precision is Precision.BF16 and not computes_in(ov.Core(), "BF16"):
        return "this processor has no bfloat16 arithmetic; use fp32"
    if precision is Precision.INT8 and not computes_in(ov.Core(), "INT8"):
        return "OpenVINO has no int8 arithmetic for this processor; use fp32"
    return ""


def _shapes(arrays: Mapping[str, Array]) -> str:
    return ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in arrays.items())
