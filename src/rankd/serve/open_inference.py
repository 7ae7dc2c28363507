"""The Open Inference Protocol v2 over HTTP, with Triton's extensions, so that other people's clients work unmodified.

What its tensors mean is in `inference.py`.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import rankd
from rankd.errors import InvalidRequest, PayloadTooLarge, RankdError, Unavailable, UnsupportedMedia
from rankd.ranker import Ranker
from rankd.serve.bodies import read_body
from rankd.serve.booking import book_failure
from rankd.serve.inference import (
    EXTENSIONS,
    asked_outputs,
    model_configuration,
    model_metadata,
    model_statistics,
    output_tensors,
    rank_request,
)
from rankd.serve.operations import check_ready
from rankd.serve.repository import ModelRepository
from rankd.serve.settings import ServeConfig
from rankd.serve.tensors import InferHeader, decode_infer, encode_outputs
from rankd.serve.traced_http import trace_of
from rankd.serve.v1 import json_response, rank_with
from rankd.serve.wire import IndexBody
from rankd.types import Scores

Handler = Callable[[Request], Awaitable[Response]]
JSON_LENGTH = "inference-header-content-length"


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
        return _json(model_metadata(repository, _ranker(repository, request)))

    async def configuration(request: Request) -> Response:
        return _json(model_configuration(_ranker(repository, request)))

    async def infer(request: Request) -> Response:
        started = time.perf_counter()
        name, version = request.path_params["model"], request.path_params.get("version", "")
        try:
            body = _decompressed(await read_body(request, config.max_body_bytes), request, config.max_body_bytes)
            header, inputs = decode_infer(body, request.headers.get(JSON_LENGTH))
            asked, decoded = asked_outputs(header), rank_request(name, version, header, inputs)
        except RankdError as error:
            book_failure(repository, None, error, started)
            raise
        scores = await rank_with(repository, decoded, request.receive, trace_of(request))
        return _infer_response(scores, header, asked, request)

    async def statistics(request: Request) -> Response:
        chosen = repository.rankers()
        if "model" in request.path_params:
            ranker = _ranker(repository, request)
            chosen = [(ranker.manifest.name, ranker.manifest.version, ranker)]
        return _json({"model_stats": [model_statistics(repository, name, version) for name, version, _ in chosen]})

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


def _infer_response(scores: Scores, header: InferHeader, asked: dict[str, bool], request: Request) -> Response:
    body, json_length = encode_outputs(
        (scores.model, scores.version, header.id),
        output_tensors(scores, asked),
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
