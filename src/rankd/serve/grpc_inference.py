"""The Open Inference Protocol v2 over gRPC: its messages as requests of ours, and answers as its messages.

Tensors come as `raw_input_contents` (the quick way) or as `contents`; scores go out raw. What tensors mean is in
`inference.py`; the server is in `grpc_server.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import rankd
from rankd.errors import InvalidRequest, NotFound, Unavailable
from rankd.serve.inference import (
    EXTENSIONS,
    asked_outputs,
    model_configuration,
    model_metadata,
    model_statistics,
    output_tensors,
    rank_request,
)
from rankd.serve.messages import message
from rankd.serve.operations import check_ready
from rankd.serve.repository import ModelRepository
from rankd.serve.tensors import (
    DTYPES,
    InferHeader,
    InputHeader,
    InputTensor,
    OutputHeader,
    pack_bytes,
    tensor_of,
    tensor_of_values,
    type_of,
)
from rankd.types import RankRequest, Scores

PACKAGE = "inference"
SERVICE = "inference.GRPCInferenceService"
DATA_TYPES = {"TYPE_BOOL": 1, "TYPE_INT64": 9, "TYPE_FP32": 11, "TYPE_STRING": 13}
"""Triton's numbers of data types in model configurations."""
CONTENTS = {
    "BOOL": "bool_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def decode_infer(request: Any) -> tuple[InferHeader, RankRequest]:
    """A ModelInferRequest.

    Raises:
        InvalidRequest: its tensors do not fit; the message names the input.
    """
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            f"{len(request.inputs)} inputs and {len(raw)} raw_input_contents; give one for each, or none"
        )
    inputs: dict[str, InputTensor] = {}
    for number, one in enumerate(request.inputs):
        if one.name in inputs:
            raise InvalidRequest(f"input '{one.name}' is given twice")
        tensor = InputHeader(one.name, one.datatype, list(one.shape), _parameters(one.parameters))
        if min(tensor.shape, default=0) < 0:
            raise InvalidRequest(f"input '{one.name}' has shape {tensor.shape}; no dimension may be negative")
        inputs[one.name] = tensor_of(tensor, raw[number]) if raw else _from_contents(tensor, one.contents)
    outputs = [OutputHeader(one.name, _parameters(one.parameters)) for one in request.outputs]
    header = InferHeader([], request.id, _parameters(request.parameters), outputs)
    asked_outputs(header)  # refused before anything is computed
    return header, rank_request(request.model_name, request.model_version, header, inputs)


def encode_infer(scores: Scores, header: InferHeader) -> Any:
    """Scores as a ModelInferResponse."""
    response = message("inference.ModelInferResponse")(
        model_name=scores.model, model_version=scores.version, id=header.id
    )
    for name, values in output_tensors(scores, asked_outputs(header)).items():
        datatype, shape = type_of(values)
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        chunk = pack_bytes(values) if datatype == "BYTES" else np.ascontiguousarray(values).tobytes()
        response.raw_output_contents.append(chunk)
    return response


class Information:
    """The protocol's methods beside inference: what is there, what it is like, load and unload."""

    def __init__(self, repository: ModelRepository) -> None:
        self._repository = repository

    def server_live(self, _request: Any) -> dict[str, Any]:
        """It answers, so it lives."""
        return {"live": True}

    def server_ready(self, _request: Any) -> dict[str, Any]:
        """Whether every model takes requests."""
        try:
            check_ready(self._repository)
        except Unavailable:
            return {"ready": False}
        return {"ready": True}

    def model_ready(self, request: Any) -> dict[str, Any]:
        """Whether a model takes requests."""
        try:
            self._repository.get(request.name, request.version)
        except (Unavailable, NotFound):
            return {"ready": False}
        return {"ready": True}

    def server_metadata(self, _request: Any) -> dict[str, Any]:
        """Name, release, extensions."""
        return {"name": "rankd", "version": rankd.__version__, "extensions": EXTENSIONS}

    def model_metadata(self, request: Any) -> dict[str, Any]:
        """Names, types and shapes of tensors."""
        return model_metadata(self._repository, self._repository.get(request.name, request.version))

    def model_config(self, request: Any) -> dict[str, Any]:
        """What of Triton's model configuration means something here."""
        known = model_configuration(self._repository.get(request.name, request.version))
        for tensor in (*known["input"], *known["output"]):
            tensor["data_type"] = DATA_TYPES[tensor["data_type"]]
        kept = ("name", "platform", "max_batch_size", "input", "output", "backend")
        return {"config": {name: known[name] for name in kept}}

    def model_statistics(self, request: Any) -> dict[str, Any]:
        """What versions have done since they were loaded."""
        chosen = [(name, version) for name, version, _ in self._repository.rankers()]
        if request.name:
            manifest = self._repository.get(request.name, request.version).manifest
            chosen = [(manifest.name, manifest.version)]
        found = [model_statistics(self._repository, name, version) for name, version in chosen]
        return {"model_stats": [{k: v for k, v in one.items() if k != "batch_stats"} for one in found]}

    def repository_index(self, request: Any) -> dict[str, Any]:
        """Every version on disk or in memory."""
        rows = [one for one in self._repository.index() if not request.ready or one.state.value == "READY"]
        return {
            "models": [
                {"name": one.name, "version": one.version, "state": one.state.value, "reason": one.reason}
                for one in rows
            ]
        }

    def repository_model_load(self, request: Any) -> dict[str, Any]:
        """Load the newest version of a model."""
        if not self._repository.ready:
            raise Unavailable("the server is starting or draining; load models once it is ready")
        self._repository.load(request.model_name)
        return {}

    def repository_model_unload(self, request: Any) -> dict[str, Any]:
        """Take all versions of a model out of service."""
        self._repository.unload(request.model_name)
        return {}


def _parameters(given: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    return {
        name: getattr(value, kind)
        for name, value in given.items()
        if (kind := value.WhichOneof("parameter_choice")) is not None
    }


def _from_contents(header: InputHeader, contents: Any) -> InputTensor:
    field = CONTENTS.get(header.datatype)
    if field is None:
        raise InvalidRequest(
            f"input '{header.name}' is of datatype '{header.datatype}'; read are BYTES, {', '.join(DTYPES)}"
        )
    values = list(getattr(contents, field))
    if header.datatype == "BYTES":
        try:
            return tensor_of_values(header, [value.decode() for value in values])
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"input '{header.name}': a BYTES element is not UTF-8: {error}") from error
    return tensor_of_values(header, np.asarray(values, DTYPES[header.datatype]))
