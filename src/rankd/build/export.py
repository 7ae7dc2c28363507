"""Export: a torch ranker becomes graphs with named inputs and outputs: encode, extend (where it can), score.

In: an nn.Module of one of the shapes of `models.protocol`. Out: files in `engines/<target>/`. T, A and C are dynamic; B
is dynamic in `score` alone, since histories are encoded one at a time. A JointModel becomes a single `score` that reads
history and candidates together. `openvino` writes .xml, `onnxruntime` .onnx; `reference`, `native` and `cuda` need the
weights alone.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankd.errors import BuildError
from rankd.features.schema import FeatureSchema, TensorSpec, candidate_specs, graph_specs, history_specs
from rankd.models.protocol import Tensors, is_extendable, is_pooled, is_split

DTYPES = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32}
TRACED = {"B": 1, "T": 5, "C": 3, "A": 2}


@dataclass(frozen=True, slots=True)
class Graph:
    """One graph to be exported: a method of the model, its inputs in groups (a dict each), the names of its outputs."""

    name: str
    method: str
    groups: tuple[tuple[TensorSpec, ...], ...]
    outputs: tuple[str, ...]
    users: int  # B while tracing; 1 is fixed, 2 becomes dynamic

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """All inputs, in the order of the groups."""
        return tuple(spec for group in self.groups for spec in group)


class _Positional(nn.Module):
    """A method of a model that takes and returns tensors by position, for tracing."""

    def __init__(self, model: nn.Module, method: str, groups: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.model, self.method, self.groups = model, method, groups

    def forward(self, *tensors: Tensor) -> Any:
        waiting = list(tensors)
        arguments = [{name: waiting.pop(0) for name in group} for group in self.groups]
        result = getattr(self.model, self.method)(*arguments)
        return tuple(result.values()) if isinstance(result, dict) else (result,)


def graphs_of(model: nn.Module, schema: FeatureSchema) -> tuple[tuple[Graph, ...], tuple[TensorSpec, ...]]:
    """The graphs of a model, and the specs of its state (the history inputs for a JointModel; none for a `PooledModel`
    whose tables are outside).

    Raises:
        BuildError: a state whose shapes follow no rule.
    """
    history, candidates = (graph_specs(schema, specs) for specs in (history_specs(schema), candidate_specs(schema)))
    if is_pooled(model, schema):
        return (Graph("score", "score_embedded", (candidates,), ("logits",), 2),), ()
    if not is_split(model):
        return (Graph("score", "forward", (history, candidates), ("logits",), 2),), history
    state = state_specs(model, schema)
    names = tuple(spec.name for spec in state)
    graphs = [Graph("encode", "encode", (history,), names, 1)]
    if is_extendable(model):
        for spec in state:
            if "T" in spec.shape and (len(spec.shape) < 3 or spec.shape[1] != schema.num_sub_sequences):
                raise BuildError(
                    f"state '{spec.name}' is {spec.shape}; what grows with the history has to be laid out "
                    f"(B, {schema.num_sub_sequences} sub-sequences, ..., T, ...) for a model that has `extend`"
                )
        appended = tuple(
            TensorSpec(f"new_{spec.name}", spec.dtype, tuple("A" if d == "T" else d for d in spec.shape))
            for spec in history
        )
        graphs.append(Graph("extend", "extend", (state, appended), names, 1))
    graphs.append(Graph("score", "score", (state, candidates), ("logits",), 2))
    return tuple(graphs), state


def export(model: nn.Module, schema: FeatureSchema, target: str, folder: Path) -> tuple[TensorSpec, ...]:
    """Write the graphs for a target into `folder`; returns the specs of the state.

    Raises:
        BuildError: an operation that the target does not have (it is named), or outputs of the wrong shape.
    """
    folder.mkdir(parents=True, exist_ok=True)
    graphs, state = graphs_of(model.eval(), schema)
    write = WRITERS[target]
    for graph in graphs:
        groups = [[spec.name.removeprefix("new_") for spec in group] for group in graph.groups]
        # eval: an exporter leaves a module in the mode in which it found the wrapper, and dropout would wake up.
        write(_Positional(model, graph.method, groups).eval(), graph, folder)
    return state


def state_specs(model: Any, schema: FeatureSchema) -> tuple[TensorSpec, ...]:
    """Names, types and shapes of what `encode` returns; a dimension that follows T is found by trying two of them."""
    with torch.inference_mode():
        short = model.encode(example(history_specs(schema), T=5))
        long = model.encode(example(history_specs(schema), T=7))
    specs = []
    for name, tensor in short.items():
        shape: list[int | str] = []
        for index, (a, b) in enumerate(zip(tensor.shape, long[name].shape, strict=True)):
            if a != b and (a, b) != (5, 7):
                raise BuildError(f"state '{name}' has sizes {a} and {b} for 5 and 7 history tokens; only T may vary")
            shape.append("B" if index == 0 else "T" if a != b else a)
        specs.append(TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(shape)))
    return tuple(specs)


def example(specs: Sequence[TensorSpec], **sizes: int) -> Tensors:
    """Zero tensors of the given specs (ones for lengths), to trace and to size with.

    Zero is in every table: a log may have one type of events alone.
    """
    sizes, made = {**TRACED, **sizes}, {}
    for spec in specs:
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
        number = 1 if spec.name.endswith(("length", "lengths")) else 0
        made[spec.name] = torch.full(shape, number, dtype=DTYPES[spec.dtype])
    return made


def _write_openvino(module: nn.Module, graph: Graph, folder: Path) -> None:
    import openvino as ov
    from openvino.tools.ovc.telemetry_utils import init_ovc_telemetry

    init_ovc_telemetry().consent = False  # else its makers are told of each conversion, which waits 1 s for that
    types = {name: getattr(ov.Type, short) for name, short in _OV_TYPES.items()}
    users = 1 if graph.users == 1 else -1
    shapes = [[users if d == "B" else -1 if isinstance(d, str) else d for d in spec.shape] for spec in graph.inputs]
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # tracing warns of every Python integer; parity is checked after
            made = ov.convert_model(
                module,
                example_input=tuple(example(graph.inputs, B=graph.users).values()),
                input=[(shape, types[spec.dtype]) for shape, spec in zip(shapes, graph.inputs, strict=True)],
            )
    except Exception as error:  # the converter's errors share no public base class
        raise BuildError(f"OpenVINO cannot convert {graph.name}: {error}") from error
    _check_outputs(graph, len(made.outputs))
    # A state may hand an input through, and then input and output are one tensor: nodes carry the names, not tensors.
    # Names are unique in a graph, and `extend` has a state on both sides: outputs are called out_<name>.
    for port, spec in zip(made.inputs, graph.inputs, strict=True):
        port.get_node().set_friendly_name(spec.name)
    for port, name in zip(made.outputs, graph.outputs, strict=True):
        port.get_node().set_friendly_name(f"out_{name}")
    ov.save_model(made, folder / f"{graph.name}.xml", compress_to_fp16=False)


def _write_onnx(module: nn.Module, graph: Graph, folder: Path) -> None:
    inputs = [spec.name for spec in graph.inputs]
    outputs = [f"out_{name}" for name in graph.outputs]
    free = {"T", "C", "A"} | ({"B"} if graph.users > 1 else set())
    axes = {
        spec.name: {i: str(d) for i, d in enumerate(spec.shape) if isinstance(d, str) and d in free}
        for spec in graph.inputs
    }
    try:
        with warnings.catch_warnings(), torch.inference_mode(), _quiet("torch.onnx"):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                tuple(example(graph.inputs, B=graph.users).values()),
                str(folder / f"{graph.name}.onnx"),
                input_names=inputs,
                output_names=outputs,
                dynamic_axes=axes,
                opset_version=18,
                dynamo=False,
            )
    except Exception as error:  # the exporter's errors share no public base class
        raise BuildError(f"ONNX cannot express {graph.name}: {error}") from error


class _quiet:  # noqa: N801 - reads as the statement it is
    """Keep a logger from telling users of an exporter's inner life."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)


def _write_nothing(module: nn.Module, graph: Graph, folder: Path) -> None:
    """The reference computes with the torch module itself, the native engine and a GPU with its weights."""


def _check_outputs(graph: Graph, count: int) -> None:
    if count != len(graph.outputs):
        raise BuildError(f"{graph.name} has {count} outputs, expected {', '.join(graph.outputs)}")


WRITERS: dict[str, Callable[[nn.Module, Graph, Path], None]] = {
    "openvino": _write_openvino,
    "onnxruntime": _write_onnx,
    "reference": _write_nothing,
    "cuda": _write_nothing,
    "native": _write_nothing,
}
_OV_TYPES = {"int32": "i32", "int64": "i64", "float32": "f32"}
