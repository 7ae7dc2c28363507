"""The Open Inference Protocol v2, whatever carries it: tensors as a request, scores as tensors, what a model says of
itself.

A model takes `user_id` BYTES [1] and `candidates` BYTES (or INT64) [C], and if wanted `time` INT64 [1] and an
inline history (`history_item` BYTES, `history_event` BYTES, `history_time` INT64, all [n]). Outputs are `scores` FP32
[C, K], `candidates` BYTES [C] and `unknown` BOOL [C]. Parameters: `top_k`, `timeout_ms`, or Triton's
`timeout` in microseconds, and `rank_priority`. Next: `open_inference.py` (HTTP), `grpc_inference.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rankd.errors import InvalidRequest
from rankd.ranker import Ranker
from rankd.serve.repository import ModelRepository
from rankd.serve.tensors import InferHeader, InputTensor
from rankd.types import Array, Event, RankRequest, Scores

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")
TEXT_INPUTS = ("user_id", "candidates", "history_item", "history_event")
NUMBER_INPUTS = ("time", "history_time")
OUTPUTS = ("scores", "candidates", "unknown")
LARGEST = 1e15
"""Of a parameter that is a number."""


def rank_request(model: str, version: str, header: InferHeader, inputs: dict[str, InputTensor]) -> RankRequest:
    """Tensors as a request.

    Raises:
        InvalidRequest: an input or a parameter is missing, unknown, or not of its type.
    """
    for name in inputs:
        if name not in (*TEXT_INPUTS, *NUMBER_INPUTS):
            raise InvalidRequest(f"unknown input '{name}'; there are: {', '.join((*TEXT_INPUTS, *NUMBER_INPUTS))}")
    for name in ("user_id", "candidates"):
        if name not in inputs:
            raise InvalidRequest(f"input '{name}' is missing; user_id and candidates are required")
    users, times = _texts(inputs, "user_id"), _numbers(inputs, "time")
    if len(users) != 1 or len(times) > 1:
        raise InvalidRequest(f"user_id has {len(users)} elements, time {len(times)}; one user a request")
    timeout_ms = _number(header, "timeout_ms")
    if timeout_ms is None and (microseconds := _number(header, "timeout")):
        timeout_ms = microseconds / 1e3
    top_k = _number(header, "top_k")
    if top_k is not None and top_k != int(top_k):
        raise InvalidRequest(f"parameter top_k is {top_k}; it has to be a whole number")
    return RankRequest(
        user_id=users[0],
        candidates=tuple(_texts(inputs, "candidates")),
        model=model,
        version=version,
        history=_history(inputs),
        time=times[0] if times else None,
        top_k=None if top_k is None else int(top_k),
        timeout_ms=timeout_ms,
        request_id=header.id,
        priority=_text(header, "rank_priority", "interactive"),
    )


def _history(inputs: dict[str, InputTensor]) -> tuple[Event, ...] | None:
    if "history_item" not in inputs:
        return None
    items = _texts(inputs, "history_item")
    types: list[str] = _texts(inputs, "history_event") if "history_event" in inputs else [""] * len(items)
    times: list[Any] = _numbers(inputs, "history_time") if "history_time" in inputs else [None] * len(items)
    if not len(items) == len(types) == len(times):
        raise InvalidRequest(
            f"history_item, history_event and history_time have {len(items)}, {len(types)} and {len(times)} elements; "
            "they have to be as long as each other"
        )
    return tuple(map(Event, items, types, times))


def _texts(inputs: dict[str, InputTensor], name: str) -> list[str]:
    """An input as texts; whole numbers are ids too."""
    values = inputs[name].values
    if isinstance(values, list):
        return values
    if values.dtype.kind not in "iu":
        raise InvalidRequest(f"input '{name}' is {inputs[name].datatype}; it has to be BYTES or INT64")
    return [str(value) for value in values.tolist()]


def _numbers(inputs: dict[str, InputTensor], name: str) -> list[int]:
    if name not in inputs:
        return []
    values = inputs[name].values
    if isinstance(values, list) or values.dtype.kind not in "iu":
        raise InvalidRequest(f"input '{name}' is {inputs[name].datatype}; it has to be INT64, seconds since 1970")
    numbers: list[int] = values.tolist()
    return numbers


def _number(header: InferHeader, name: str) -> float | None:
    value = header.parameters.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise InvalidRequest(f"parameter {name} is {value!r}; it has to be a number")
    if value is not None and not -LARGEST <= value <= LARGEST:
        raise InvalidRequest(f"parameter {name} is {value:.3g}; it has to be between -{LARGEST:g} and {LARGEST:g}")
    return value


def _text(header: InferHeader, name: str, default: str) -> str:
    value = header.parameters.get(name, default)
    if not isinstance(value, str):
        raise InvalidRequest(f"parameter {name} is {value!r}; it has to be a text")
    return value


def asked_outputs(header: InferHeader) -> dict[str, bool]:
    """The outputs to send, and whether each is to be binary.

    Raises:
        InvalidRequest: an output that is not there, or in a way that is not offered.
    """
    default = header.parameters.get("binary_data_output", False) is True
    if not header.outputs:
        return dict.fromkeys(OUTPUTS, default)
    asked = {}
    for output in header.outputs:
        if output.name not in OUTPUTS:
            raise InvalidRequest(f"unknown output '{output.name}'; there are: {', '.join(OUTPUTS)}")
        refused = {"classification", "shared_memory_region"} & set(output.parameters)
        if refused:
            raise InvalidRequest(f"output '{output.name}': '{refused.pop()}' is not offered here; ask for data")
        asked[output.name] = output.parameters.get("binary_data", default) is True
    return asked


def output_tensors(scores: Scores, names: Mapping[str, bool]) -> dict[str, Array | tuple[str, ...]]:
    """The outputs that were asked for, in that order."""
    unknown = set(scores.unknown)
    tensors: dict[str, Array | tuple[str, ...]] = {
        "scores": scores.scores,
        "candidates": scores.candidates,
        "unknown": np.asarray([candidate in unknown for candidate in scores.candidates]),
    }
    return {name: tensors[name] for name in names}


def model_metadata(repository: ModelRepository, ranker: Ranker) -> dict[str, Any]:
    """Names, types and shapes."""
    manifest = ranker.manifest
    return {
        "name": manifest.name,
        "versions": [version for name, version, _ in repository.rankers() if name == manifest.name],
        "platform": f"rankd_{ranker.manifest.model.rpartition(':')[2].lower()}",
        "inputs": [
            *({"name": name, "datatype": "BYTES", "shape": [1 if name == "user_id" else -1]} for name in TEXT_INPUTS),
            *({"name": name, "datatype": "INT64", "shape": [1 if name == "time" else -1]} for name in NUMBER_INPUTS),
        ],
        "outputs": [
            {"name": "scores", "datatype": "FP32", "shape": [-1, len(ranker.schema.tasks)]},
            {"name": "candidates", "datatype": "BYTES", "shape": [-1]},
            {"name": "unknown", "datatype": "BOOL", "shape": [-1]},
        ],
    }


def model_configuration(ranker: Ranker) -> dict[str, Any]:
    """What of Triton's model configuration means something here."""
    required = ("user_id", "candidates")
    return {
        "name": ranker.manifest.name,
        "platform": "rankd",
        "backend": "rankd",
        "max_batch_size": 0,
        "input": [
            {
                "name": name,
                "data_type": "TYPE_INT64" if name in NUMBER_INPUTS else "TYPE_STRING",
                "dims": [1 if name in ("user_id", "time") else -1],
                "optional": name not in required,
            }
            for name in (*TEXT_INPUTS, *NUMBER_INPUTS)
        ],
        "output": [
            {"name": "scores", "data_type": "TYPE_FP32", "dims": [-1, len(ranker.schema.tasks)]},
            {"name": "candidates", "data_type": "TYPE_STRING", "dims": [-1]},
            {"name": "unknown", "data_type": "TYPE_BOOL", "dims": [-1]},
        ],
        "instance_group": [{"count": ranker.backend.num_executors, "kind": "KIND_CPU"}],
    }


def model_statistics(repository: ModelRepository, name: str, version: str) -> dict[str, Any]:
    """What a version has done since it was loaded."""
    known = repository.metrics.statistics(name, version)

    def of(count: int, nanoseconds: int) -> dict[str, int]:
        return {"count": count, "ns": nanoseconds}

    return {
        "name": name,
        "version": version,
        "last_inference": known.last_request_ms,
        "inference_count": known.successes,
        "execution_count": known.successes,
        "inference_stats": {
            "success": of(known.successes, known.total_ns),
            "fail": of(known.failures, known.failed_ns),
            "queue": of(known.successes, known.queue_ns),
            "compute_input": of(known.successes, known.features_ns),
            "compute_infer": of(known.successes, known.engine_ns),
            "compute_output": of(known.successes, known.order_ns),
            "cache_hit": of(0, 0),
            "cache_miss": of(0, 0),
        },
        "batch_stats": [],
    }
