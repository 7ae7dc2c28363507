"""The Open Inference Protocol v2 over HTTP, with Triton's extensions, so that other people's clients work unmodified.

A model takes `user_id` BYTES [1] and `candidates` BYTES (or INT64) [C], and if wanted `time` INT64 [1] and an
inline history (`history_item` BYTES, `history_event` BYTES, `history_time` INT64, all [n]). Outputs are `scores` FP32
[C, K], `candidates` BYTES [C] and `unknown` BOOL [C]. Parameters: `top_k`, `timeout_ms`, or Triton's
`timeout` in microseconds.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import rankd
from rankd.errors import InvalidRequest, PayloadTooLarge, RankdError, Unavailable, UnsupportedMedia
from rankd.ranker import Ranker
from rankd.serve.bodies import read_body
from rankd.serve.operations import check_ready
from rankd.serve.repository import ModelRepository
from rankd.serve.settings import ServeConfig
from rankd.serve.tensors import InferHeader, InputTensor, decode_infer, encode_outputs
from rankd.serve.v1 import book_failure, json_response, rank_with
from rankd.serve.wire import IndexBody
from rankd.types import Array, Event, RankRequest, Scores

Handler = Callable[[Request], Awaitable[Response]]
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")
JSON_LENGTH = "inference-header-content-length"
TEXT_INPUTS = ("user_id", "candidates", "history_item", "history_event")
NUMBER_INPUTS = ("time", "history_time")
OUTPUTS = ("scores", "candidates", "unknown")


def routes(repository: ModelRepository, config: ServeConfig) -> list[Route]:
    """Everything under /v2."""

    async def server(request: Request) -> Response:
        return _json({"name": "rankd", "version": rankd.__version__, "extensions": EXTENSIONS})

    async def live(request: Request) -> Response:
        return _json({"live": True})

    async def ready(request: Request) -> Response:
        check_ready(repository)
        return _json({"ready": True})

    async def model_ready(request: Request) -> Response:
        ranker = _ranker(repository, request)
        return _json({"name": ranker.manifest.name, "ready": True})

    async def metadata(request: Request) -> Response:
        return _json(_metadata(repository, _ranker(repository, request)))

    async def configuration(request: Request) -> Response:
        return _json(_configuration(_ranker(repository, request)))

    async def infer(request: Request) -> Response:
        started = time.perf_counter()
        name, version = request.path_params["model"], request.path_params.get("version", "")
        try:
            body = _decompressed(await read_body(request, config.max_body_bytes), request, config.max_body_bytes)
            header, inputs = decode_infer(body, request.headers.get(JSON_LENGTH))
            asked, decoded = _asked_outputs(header), _rank_request(name, version, header, inputs)
        except RankdError as error:
            book_failure(repository, None, error, started)
            raise
        scores = await rank_with(repository, decoded)
        return _infer_response(scores, header, asked, request)

    async def statistics(request: Request) -> Response:
        chosen = repository.rankers()
        if "model" in request.path_params:
            ranker = _ranker(repository, request)
            chosen = [(ranker.manifest.name, ranker.manifest.version, ranker)]
        return _json({"model_stats": [_statistics(repository, name, version) for name, version, _ in chosen]})

    async def index(request: Request) -> Response:
        wanted = _index_body(await read_body(request, config.max_body_bytes))
        rows = [
            {"name": s.name, "version": s.version, "state": s.state.value, "reason": s.reason}
            for s in repository.index()
            if not wanted.ready or s.state.value == "READY"
        ]
        return _json(rows)

    async def load(request: Request) -> Response:
        _json_body(await read_body(request, config.max_body_bytes))
        if not repository.ready:
            raise Unavailable("the server is starting or draining; load models once it is ready")
        await asyncio.to_thread(repository.load, request.path_params["model"])
        return _json({})

    async def unload(request: Request) -> Response:
        _json_body(await read_body(request, config.max_body_bytes))
        await asyncio.to_thread(repository.unload, request.path_params["model"])
        return _json({})

    get = [("/v2", server), ("/v2/health/live", live), ("/v2/health/ready", ready), ("/v2/models/stats", statistics)]
    for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        get += [(f"{prefix}/ready", model_ready), (f"{prefix}/config", configuration), (f"{prefix}/stats", statistics)]
        get += [(prefix, metadata)]
    post = [(f"{prefix}/infer", infer) for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")]
    post += [("/v2/repository/index", index)]
    post += [(f"/v2/repository/models/{{model}}/{verb}", do) for verb, do in (("load", load), ("unload", unload))]
    return [
        *(Route(path, _in_their_words(handler), methods=["GET"]) for path, handler in get),
        *(Route(path, _in_their_words(handler), methods=["POST"]) for path, handler in post),
    ]


def _in_their_words(handler: Handler) -> Handler:
    """This protocol's error body is {"error": "message"}."""

    async def wrapped(request: Request) -> Response:
        try:
            return await handler(request)
        except RankdError as error:
            from rankd.serve.app import error_headers

            return _json({"error": str(error)}, error.http_status, error_headers(error))

    return wrapped


def _json(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return json_response(msgspec.json.encode(document), status, headers)


def _ranker(repository: ModelRepository, request: Request) -> Ranker:
    return repository.get(request.path_params["model"], request.path_params.get("version", ""))


def _index_body(body: bytes) -> IndexBody:
    try:
        return msgspec.json.decode(body, type=IndexBody) if body.strip() else IndexBody()
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body does not fit: {error}") from error


def _json_body(body: bytes) -> dict[str, Any]:
    """The optional JSON object of a repository call."""
    try:
        document = msgspec.json.decode(body) if body.strip() else {}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidRequest(f"the body is a {type(document).__name__}; it has to be a JSON object, or nothing")
    return document


def _decompressed(body: bytes, request: Request, limit_bytes: int) -> bytes:
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise UnsupportedMedia(f"content encoding '{encoding}' is not read here; send gzip, deflate or none")
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: gzip or zlib, by its header
    try:
        plain = inflater.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not {encoding} data: {error}") from error
    if len(plain) > limit_bytes:
        raise PayloadTooLarge(f"the body unpacks to more than {limit_bytes} bytes; send fewer candidates at once")
    if not inflater.eof:
        raise InvalidRequest(f"the {encoding} data of the body is cut")
    return plain


def _rank_request(model: str, version: str, header: InferHeader, inputs: dict[str, InputTensor]) -> RankRequest:
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
    return value


def _asked_outputs(header: InferHeader) -> dict[str, bool]:
    """The outputs to send, and whether each is to be binary."""
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


def _infer_response(scores: Scores, header: InferHeader, asked: dict[str, bool], request: Request) -> Response:
    unknown = set(scores.unknown)
    tensors: dict[str, Array | tuple[str, ...]] = {
        "scores": scores.scores,
        "candidates": scores.candidates,
        "unknown": np.asarray([candidate in unknown for candidate in scores.candidates]),
    }
    body, json_length = encode_outputs(
        (scores.model, scores.version, header.id),
        {name: tensors[name] for name in asked},
        [name for name, binary in asked.items() if binary],
    )
    headers = {} if json_length is None else {JSON_LENGTH: str(json_length)}
    accepted = [part.split(";")[0].strip() for part in request.headers.get("accept-encoding", "").split(",")]
    for encoding, bits in (("gzip", zlib.MAX_WBITS | 16), ("deflate", zlib.MAX_WBITS)):
        if accepted[0] == encoding:  # only if it is asked for first: browsers and httpx offer it always
            packer = zlib.compressobj(1, zlib.DEFLATED, bits)
            body = packer.compress(body) + packer.flush()
            headers["content-encoding"] = encoding
    kind = "application/json" if json_length is None else "application/octet-stream"
    return Response(body, headers=headers, media_type=kind)


def _metadata(repository: ModelRepository, ranker: Ranker) -> dict[str, Any]:
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


def _configuration(ranker: Ranker) -> dict[str, Any]:
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


def _statistics(repository: ModelRepository, name: str, version: str) -> dict[str, Any]:
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
