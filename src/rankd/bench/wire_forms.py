"""The two forms in which a request goes over HTTP: JSON for people, and tensors (Open Inference Protocol, binary data).

In: RankRequests. Out: whole HTTP requests as bytes, made before the clock runs; and scores from the answers. Written
against the protocols and not with the server's own code, so that a mistake there cannot cancel out.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from enum import Enum
from typing import Any

import msgspec
import numpy as np

from rankd.bench.load import Answer, http_request
from rankd.errors import EngineFailure
from rankd.types import Float32Array, RankRequest

JSON_LENGTH = re.compile(rb"\r\ninference-header-content-length:\s*(\d+)", re.IGNORECASE)


class Form(Enum):
    """A contestant over HTTP, by its name in the report."""

    JSON = "http-json"
    BINARY = "http-binary"


class RankAnswer(msgspec.Struct, frozen=True):
    """Of the answer to /v1/rank what is read here."""

    scores: list[list[float]]
    timings_ms: dict[str, float]


_answers = msgspec.json.Decoder(RankAnswer)


def encode_request(form: Form, request: RankRequest) -> bytes:
    """A whole HTTP request."""
    return _json_request(request) if form is Form.JSON else _binary_request(request)


def decode_scores(form: Form, answer: Answer) -> Float32Array:
    """The scores (C, K) of an answer.

    Raises:
        EngineFailure: the server answered with an error.
    """
    if answer.status != 200:
        raise EngineFailure(f"{form.value}: the server answered {answer.status}: {answer.body[:500]!r}")
    if form is Form.JSON:
        return np.asarray(_answers.decode(answer.body).scores, np.float32)
    length = JSON_LENGTH.search(answer.head)
    if length is None:
        raise EngineFailure(f"{form.value}: the answer has no Inference-Header-Content-Length, so no binary data")
    header = msgspec.json.decode(answer.body[: int(length[1])])
    (scores,) = header["outputs"]
    return np.frombuffer(answer.body, "<f4", offset=int(length[1])).reshape(scores["shape"])


def decode_timings(body: bytes) -> dict[str, float]:
    """The server's own stage timings in milliseconds, from a JSON answer."""
    return _answers.decode(body).timings_ms


def _json_request(request: RankRequest) -> bytes:
    document: dict[str, Any] = {"user_id": request.user_id, "candidates": request.candidates}
    if request.model:
        document["model"] = request.model
    return http_request("/v1/rank", msgspec.json.encode(document), {"content-type": "application/json"})


def _binary_request(request: RankRequest) -> bytes:
    tensors = {"user_id": _packed([request.user_id]), "candidates": _packed(request.candidates)}
    shapes = {"user_id": (1,), "candidates": (len(request.candidates),)}
    return encode_bytes(request.model or "", tensors, shapes, request.timeout_ms)


def encode_bytes(
    model: str, tensors: Mapping[str, bytes], shapes: Mapping[str, tuple[int, ...]], timeout_ms: float | None = None
) -> bytes:
    """A whole `infer` request whose inputs are BYTES tensors, each element with its length before it; it asks for
    `scores` as binary data."""
    inputs = [
        {"name": n, "shape": shapes[n], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
        for n, data in tensors.items()
    ]
    outputs = [{"name": "scores", "parameters": {"binary_data": True}}]
    parameters = {} if timeout_ms is None else {"timeout_ms": timeout_ms}
    header = msgspec.json.encode({"inputs": inputs, "outputs": outputs, "parameters": parameters})
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(header))}
    return http_request(f"/v2/models/{model}/infer", header + b"".join(tensors.values()), headers)


def _packed(texts: tuple[str, ...] | list[str]) -> bytes:
    """BYTES elements: a 4-byte little-endian length before each."""
    return b"".join(struct.pack("<I", len(raw)) + raw for raw in (text.encode() for text in texts))
