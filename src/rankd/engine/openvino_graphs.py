"""Graphs of an artifact, compiled by OpenVINO: each for any shape, and for static shapes by itself.

In: `engines/openvino/*.xml`. Out: a `ShapedGraph` for each. A graph for any shape infers the shapes of all of its nodes
anew whenever a call has others than the one before: 2.5 ms of a call of 6 for base's model and 16 candidates. Compiled
for the padded shapes that calls will have, it takes half of that time for 16 candidates and nine tenths for 640; what
it costs is its weights once more, packed for that shape, and a third of a second at the start.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rankd.artifact import Manifest
from rankd.engine.backend import Precision, StateType
from rankd.engine.signal_stack import kept_signal_stack
from rankd.engine.state_arrays import APPEND_BUCKETS
from rankd.engine.warming import Shapes
from rankd.errors import ArtifactError
from rankd.types import Array

log = logging.getLogger("rankd")
MIB = 1 << 20
GRAPHS = ("encode", "extend", "score")
COMPILERS = 2
"""Graphs that are compiled at a time."""
Key = tuple[tuple[int, ...], ...]
"""Shapes of the inputs whose shape is not always the same, in the order of `ShapedGraph.varying`."""


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """How graphs are compiled: `streams` concurrent calls of `threads` threads each, and the bytes that weights packed
    for static shapes may take."""

    precision: Precision
    state_type: StateType
    streams: int = 1
    threads: int = 1
    static_bytes: int = 0


@dataclass(frozen=True, slots=True)
class CompiledGraph:
    """A compiled graph, and the outputs that are inputs handed through: {output: input}. They are no part of it.

    OpenVINO lets such a pair share memory, and with tensors of ours on both sides it overwrites the input.
    """

    compiled: Any
    handed_through: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ShapedGraph:
    """A graph for any shape, and for some shapes by itself. `varying` are the inputs that tell these apart."""

    any_shape: CompiledGraph
    varying: tuple[str, ...]
    static: Mapping[Key, CompiledGraph]

    def key(self, arrays: Mapping[str, Array]) -> Key:
        """Which of `static` a call with these inputs would need."""
        return tuple(arrays[name].shape for name in self.varying)


def load_graphs(
    folder: Path, manifest: Manifest, options: CompileOptions, names: Collection[str] = GRAPHS
) -> dict[str, ShapedGraph]:
    """Compile the graphs in a folder that are named: {"score": ..., "encode": ..., "extend": ...}, the latter two
    where they are.

    Static shapes are taken in the order of `static_inputs`, as far as their memory goes.

    Raises:
        ArtifactError: a graph cannot be read or compiled.
    """
    floats = {spec.name for spec in manifest.state if spec.dtype == "float32"} if manifest.split else set()
    narrow = floats if options.state_type is StateType.BF16 else set()
    paths = {path.stem: path for path in sorted(folder.glob("*.xml")) if path.stem in names}
    plain = {name: compile_graph(path, options, narrow) for name, path in paths.items()}
    varying = {name: _varying(graph) for name, graph in plain.items()}
    static: dict[str, dict[Key, CompiledGraph]] = {name: {} for name in paths}
    left = options.static_bytes
    if not left:
        return {name: ShapedGraph(plain[name], varying[name], static[name]) for name in paths}
    weights = {name: packed_bytes(path, options.precision) for name, path in paths.items()}
    with ThreadPoolExecutor(COMPILERS) as threads:
        compiling = []
        for name, arrays in static_inputs(manifest, options.state_type):
            if name in paths and varying[name] and left >= weights[name]:
                left -= weights[name]
                shapes = {input_name: array.shape for input_name, array in arrays.items()}
                key = tuple(shapes[one] for one in varying[name])
                compiling.append((name, key, threads.submit(compile_graph, paths[name], options, narrow, shapes)))
        for name, key, graph in compiling:
            try:
                static[name][key] = graph.result()
            except ArtifactError as error:  # the graph for any shape does as well, a little slower
                log.warning("%s for the shapes %s: %s", name, key, error)
    return {name: ShapedGraph(plain[name], varying[name], static[name]) for name in paths}


def static_inputs(manifest: Manifest, state_type: StateType) -> Iterator[tuple[str, Mapping[str, Array]]]:
    """The inputs of every call of one user, with the graph that it goes to, the most useful first: histories, then
    candidates over the longest ones."""
    shapes = Shapes(manifest, state_type)
    rooms = shapes.rooms[::-1]
    if manifest.split:
        for room in rooms:
            yield "encode", shapes.history(room)
    for room in rooms if manifest.extends else ():
        for new in APPEND_BUCKETS:
            added = {f"new_{name}": array for name, array in shapes.history(new).items()}
            yield "extend", {**shapes.state(room).arrays, **added}
    for room in rooms:
        for bucket in shapes.candidate_buckets:
            yield "score", {**shapes.state(room).arrays, **shapes.candidates(bucket, 1)}


def compile_graph(
    path: Path,
    options: CompileOptions,
    bf16_ports: set[str] | frozenset[str] = frozenset(),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> CompiledGraph:
    """Compile one exported graph for the CPU: for any shape, or for inputs of these `shapes`.

    Inputs and outputs named in `bf16_ports` are bfloat16 instead of float32.

    Raises:
        ArtifactError: the graph cannot be read or compiled.
    """
    import openvino as ov

    core = ov.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": _hint(core, options.precision),
        "NUM_STREAMS": str(options.streams),
        "INFERENCE_NUM_THREADS": str(options.streams * options.threads),
        "ENABLE_CPU_PINNING": "NO",
    }
    try:
        graph = core.read_model(path)
        if shapes is not None:
            graph.reshape({index: list(shapes[_input_name(port)]) for index, port in enumerate(graph.inputs)})
        handed_through = {}
        for result in graph.get_results():
            source = result.input_value(0).get_node()
            if source.get_type_name() == "Parameter":
                handed_through[output_name(result.output(0))] = source.get_friendly_name()
                graph.remove_result(result)
        ports = ov.preprocess.PrePostProcessor(graph)
        for index, port in enumerate(graph.inputs):
            if _input_name(port) in bf16_ports:
                ports.input(index).tensor().set_element_type(ov.Type.bf16)
        for index, port in enumerate(graph.outputs):
            if output_name(port) in bf16_ports:
                ports.output(index).tensor().set_element_type(ov.Type.bf16)
        with kept_signal_stack():
            return CompiledGraph(core.compile_model(ports.build(), "CPU", settings), handed_through)
    except RuntimeError as error:
        raise ArtifactError(f"{path}: OpenVINO cannot compile it here: {error}") from error


def packed_bytes(path: Path, precision: Precision) -> int:
    """What a compiled graph packs: all constants but tables that rows are gathered from, which stay mapped."""
    import openvino as ov

    size = 0
    for node in ov.Core().read_model(path).get_ops():
        if node.get_type_name() == "Constant":
            readers = {one.get_node().get_type_name() for one in node.output(0).get_target_inputs()}
            each = 1 if node.get_element_type() == ov.Type.i8 else 2 if precision is Precision.BF16 else 4
            size += 0 if "Gather" in readers else int(np.prod(node.get_output_shape(0))) * each
    return size


def _hint(core: Any, precision: Precision) -> str:
    """OpenVINO's word for the arithmetic of floats; products of int8 are in the graph."""
    narrow = precision is Precision.BF16 or (precision is Precision.INT8 and computes_in(core, "BF16"))
    return "bf16" if narrow else "f32"


def computes_in(core: Any, capability: str) -> bool:
    """Whether this processor has "BF16" or another of OpenVINO's capabilities."""
    with kept_signal_stack():  # who is asked first loads what compiles
        found: list[str] = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return capability in found


def output_name(port: Any) -> str:
    """An output is called out_<name> in the graph."""
    name: str = port.get_node().get_friendly_name()
    return name.removeprefix("out_")


def _input_name(port: Any) -> str:
    name: str = port.get_node().get_friendly_name()
    return name


def _varying(graph: CompiledGraph) -> tuple[str, ...]:
    return tuple(_input_name(port) for port in graph.compiled.inputs if port.get_partial_shape().is_dynamic)
