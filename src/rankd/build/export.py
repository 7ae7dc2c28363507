"""Export: a torch ranker becomes the OpenVINO graphs `encode.xml` and `score.xml`.

In: an nn.Module of one of the two shapes of `models.protocol`. Out: graphs with named inputs and outputs, T and C
dynamic, B fixed at 1. A JointModel becomes a single `score.xml` that reads history and candidates together.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankd.errors import BuildError
from rankd.features.schema import FeatureSchema, TensorSpec, candidate_specs, history_specs
from rankd.models.protocol import Tensors, is_split

DTYPES = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32}
TRACED = {"B": 1, "T": 5, "C": 3}


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


def export(model: nn.Module, schema: FeatureSchema, folder: Path) -> tuple[TensorSpec, ...]:
    """Write the graphs into `folder`; returns the specs of the state (of the history inputs for a JointModel).

    Raises:
        BuildError: an operation that OpenVINO does not have, or outputs of the wrong shape.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = model.eval()
    history, candidates = history_specs(schema), candidate_specs(schema)
    if is_split(model):
        state = state_specs(model, schema)
        _export(_Positional(model, "encode", [_names(history)]), history, _names(state), folder / "encode.xml")
        method = "score"
    else:
        state, method = history, "forward"
    scoring = _Positional(model, method, [_names(state), _names(candidates)])
    _export(scoring, (*state, *candidates), ["logits"], folder / "score.xml")
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
    """Zero tensors of the given specs (ones for lengths), to trace and to size with."""
    sizes = {**TRACED, **sizes}
    return {
        spec.name: torch.ones([sizes[d] if isinstance(d, str) else d for d in spec.shape], dtype=DTYPES[spec.dtype])
        for spec in specs
    }


def _export(module: nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[str], path: Path) -> None:
    import openvino as ov

    types = {name: getattr(ov.Type, short) for name, short in _OV_TYPES.items()}
    shapes = [[1 if d == "B" else -1 if isinstance(d, str) else d for d in spec.shape] for spec in inputs]
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # tracing warns of every Python integer; parity is checked after
            graph = ov.convert_model(
                module,
                example_input=tuple(example(inputs).values()),
                input=[(shape, types[spec.dtype]) for shape, spec in zip(shapes, inputs, strict=True)],
            )
    except RuntimeError as error:
        raise BuildError(f"OpenVINO cannot convert {path.stem}: {error}") from error
    if len(graph.outputs) != len(outputs):
        raise BuildError(f"{path.stem} has {len(graph.outputs)} outputs, expected {', '.join(outputs)}")
    # A state may hand an input through, and then input and output are one tensor: nodes carry the names, not tensors.
    for port, spec in zip(graph.inputs, inputs, strict=True):
        port.get_node().set_friendly_name(spec.name)
    for port, name in zip(graph.outputs, outputs, strict=True):
        port.get_node().set_friendly_name(name)
    ov.save_model(graph, path, compress_to_fp16=False)


_OV_TYPES = {"int32": "i32", "int64": "i64", "float32": "f32"}


def _names(specs: Sequence[TensorSpec]) -> list[str]:
    return [spec.name for spec in specs]
