"""The OpenAPI 3.1 description of the whole HTTP surface, at GET /openapi.json.

It is made from the same Structs that decode the bodies, and from what the loaded models take (candidate limits, event
types, value and context names), so that a request that fits the description is a request that is served.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import rankd
from rankd.ranker import Ranker
from rankd.serve.repository import ModelRepository
from rankd.serve.tensors import InferHeader
from rankd.serve.v1 import json_response
from rankd.serve.wire import (
    MAX_ID,
    MAX_SECONDS,
    MAX_TOP_K,
    CandidatesAnswer,
    ErrorAnswer,
    EventsAnswer,
    EventsBody,
    IndexBody,
    ItemAnswer,
    ModelAnswer,
    RankAnswer,
    RankBody,
    UserAnswer,
    UserSummary,
)

Json = dict[str, Any]
ANSWERS = (
    RankBody, RankAnswer, EventsBody, EventsAnswer, ModelAnswer, ErrorAnswer, InferHeader,
    UserSummary, UserAnswer, CandidatesAnswer, ItemAnswer, IndexBody,
)  # fmt: skip
REFUSALS = {
    400: "The request cannot be served as it is.",
    404: "No such model, version or user.",
    413: "The body is over the limit.",
    415: "A content type or encoding that is not read.",
    503: "Not ready, draining, too much waits, or timeout_ms could not be kept.",
    504: "The request's own timeout_ms passed.",
}


def routes(repository: ModelRepository) -> list[Route]:
    """GET /openapi.json."""

    async def description(request: Request) -> Response:
        return json_response(msgspec.json.encode(describe(repository)))

    return [Route("/openapi.json", description, methods=["GET"])]


def describe(repository: ModelRepository) -> Json:
    """The document for the models that are loaded now."""
    rankers = [ranker for _, _, ranker in repository.rankers()]
    _, components = msgspec.json.schema_components(ANSWERS, ref_template="#/components/schemas/{name}")
    _narrow(components, rankers)
    components["ProtocolError"] = _object({"error": {"type": "string"}})
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "rankd",
            "version": rankd.__version__,
            "description": "Online ranking for recommenders: a user and candidates in, scores out.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {**_v1_paths(rankers), **_page_paths(rankers), **_operations_paths(), **_protocol_paths(rankers)},
        "components": {"schemas": components},
    }


def _narrow(components: Json, rankers: list[Ranker]) -> None:
    """Put what the loaded models take into the general schemas."""
    components["Id"] = {
        "anyOf": [
            {"type": "string", "minLength": 1, "maxLength": MAX_ID},
            {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        ]
    }
    for body in ("RankBody", "EventsBody"):
        components[body]["properties"]["user_id"] = {"$ref": "#/components/schemas/Id"}
    seconds = {"type": "integer", "minimum": 0, "maximum": MAX_SECONDS}
    for body in ("RankBody", "EventBody"):
        components[body]["properties"]["time"] = {"anyOf": [seconds, {"type": "null"}]}
    top_k = {"type": "integer", "minimum": 1, "maximum": MAX_TOP_K}
    components["RankBody"]["properties"]["top_k"] = {"anyOf": [top_k, {"type": "null"}]}
    components["EventBody"]["properties"]["item_id"] = {"$ref": "#/components/schemas/Id"}
    components["RankBody"]["properties"]["candidates"]["items"] = {"$ref": "#/components/schemas/Id"}
    if not rankers:
        return
    schemas = [ranker.schema for ranker in rankers]
    components["RankBody"]["properties"]["candidates"]["maxItems"] = min(s.max_candidates for s in schemas)
    for body in ("RankBody", "EventsBody"):
        components[body]["properties"]["model"] = {"type": "string", "enum": _unique(r.manifest.name for r in rankers)}
    components["RankBody"]["properties"]["version"] = {"type": "string", "enum": ["", *_versions(rankers)]}
    components["EventBody"]["properties"]["event"] = {
        "type": "string",
        "enum": ["", *sorted(set.intersection(*(set(s.event_types) for s in schemas)))],
    }
    numbers = {column.name: {"$ref": "#/components/schemas/Number"} for s in schemas for column in s.event_values}
    texts = {column.name: {"type": "string"} for s in schemas for column in s.user_categorical}
    more = {column.name: {"$ref": "#/components/schemas/Number"} for s in schemas for column in s.user_numeric}
    components["Number"] = {"type": "number", "minimum": -1e15, "maximum": 1e15}
    components["EventBody"]["properties"]["values"] = _object(numbers, required=[])
    components["RankBody"]["properties"]["context"] = _object({**texts, **more}, required=[])


def _v1_paths(rankers: list[Ranker]) -> Json:
    return {
        "/v1/rank": {"post": _operation("rank", "Score the candidates of a user.", "RankAnswer", body="RankBody")},
        "/v1/events": {"post": _operation("appendEvents", "Append to a history.", "EventsAnswer", body="EventsBody")},
        "/v1/models": {"get": _operation("listModels", "Every model version.", _list_of("ModelAnswer"), refusals=())},
    }


def _page_paths(rankers: list[Ranker]) -> Json:
    model = _model_parameter(rankers)
    prefix = "/v1/models/{model}"
    return {
        f"{prefix}/users": {
            "get": _operation(
                "listUsers", "Some users with a history.", _list_of("UserSummary"), (400, 404, 503),
                [model, _query("limit", 1, 200)],
            )
        },
        f"{prefix}/users/{{user_id}}": {
            "get": _operation(
                "getUser", "A user's newest events.", "UserAnswer", (400, 404, 503),
                [model, {"name": "user_id", "in": "path", "required": True,
                         "schema": {"type": "string", "minLength": 1}}],
            )
        },
        f"{prefix}/candidates": {
            "get": _operation(
                "drawCandidates", "A seeded random sample of items.", "CandidatesAnswer", (400, 404, 503),
                [model, _query("count", 1, min((r.schema.max_candidates for r in rankers), default=1)),
                 _query("seed", 0, 2**31 - 1)],
            )
        },
        f"{prefix}/items": {
            "get": _operation(
                "findItems", "Items by a part of their id or name.", _list_of("ItemAnswer"), (400, 404, 503),
                [model, {"name": "query", "in": "query", "schema": {"type": "string", "maxLength": 100}},
                 _query("limit", 1, 200)],
            )
        },
    }  # fmt: skip


def _operations_paths() -> Json:
    page = {"description": "The live page.", "content": {"text/html": {"schema": {"type": "string"}}}}
    text = {"description": "Prometheus metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    document = {"description": "This document.", "content": {"application/json": {"schema": {"type": "object"}}}}
    return {
        "/health/live": {"get": _operation("isLive", "The process answers.", {"type": "object"}, ())},
        "/health/ready": {"get": _operation("isReady", "Models are warm.", {"type": "object"}, (503,))},
        "/metrics": {"get": {"operationId": "metrics", "summary": "Prometheus metrics.", "responses": {"200": text}}},
        "/openapi.json": {"get": {"operationId": "openapi", "summary": "This.", "responses": {"200": document}}},
        "/": {"get": {"operationId": "livePage", "summary": "The live page.", "responses": {"200": page}}},
    }


def _protocol_paths(rankers: list[Ranker]) -> Json:
    """The Open Inference Protocol; its errors are {"error": "message"}."""
    anything: Json = {"type": "object"}

    def get(name: str, summary: str, refusals: Iterable[int], parameters: list[Json]) -> Json:
        return {"get": _operation(name, summary, anything, refusals, parameters, error="ProtocolError")}

    paths = {
        "/v2": get("serverMetadata", "Name, version, extensions.", (), []),
        "/v2/health/live": get("serverLive", "The process answers.", (), []),
        "/v2/health/ready": get("serverReady", "Models are warm.", (503,), []),
        "/v2/models/stats": get("allStatistics", "Statistics of every model.", (), []),
        "/v2/repository/index": {
            "post": _operation(
                "repositoryIndex", "Every version and its state.", {"type": "array", "items": anything}, (400, 413),
                body="IndexBody", error="ProtocolError",
                body_required=False,
            )
        },
    }  # fmt: skip
    for verb in ("load", "unload"):
        paths[f"/v2/repository/models/{{model}}/{verb}"] = {
            "post": _operation(
                f"{verb}Model", f"{verb.capitalize()} a model.", anything, (400, 404, 413, 503),
                [_model_parameter(rankers)], {"type": "object"}, "ProtocolError", body_required=False,
            )
        }  # fmt: skip
    version = {"name": "version", "in": "path", "required": True, "schema": _enum(_versions(rankers))}
    for suffix, extra in (("", []), ("/versions/{version}", [version])):
        parameters, mark = [_model_parameter(rankers), *extra], "Version" if extra else ""
        prefix = f"/v2/models/{{model}}{suffix}"
        paths[prefix] = get(f"model{mark}Metadata", "Inputs and outputs.", (404, 503), parameters)
        paths[f"{prefix}/ready"] = get(f"model{mark}Ready", "It takes requests.", (404, 503), parameters)
        paths[f"{prefix}/config"] = get(f"model{mark}Config", "Its configuration.", (404, 503), parameters)
        paths[f"{prefix}/stats"] = get(f"model{mark}Statistics", "Its statistics.", (404, 503), parameters)
        infer = _operation(
            f"infer{mark}", "Score candidates; tensors may follow the JSON as raw data.", anything, tuple(REFUSALS),
            parameters, {"$ref": "#/components/schemas/InferHeader"}, "ProtocolError",
        )  # fmt: skip
        raw = {"schema": {"type": "string", "format": "binary"}}
        infer["responses"]["200"]["content"]["application/octet-stream"] = raw
        paths[f"{prefix}/infer"] = {"post": infer}
    return paths


def _operation(
    name: str,
    summary: str,
    answer: str | Json,
    refusals: Iterable[int] = tuple(REFUSALS),
    parameters: Iterable[Json] = (),
    body: str | Json | None = None,
    error: str = "ErrorAnswer",
    body_required: bool = True,
) -> Json:
    operation: Json = {
        "operationId": name,
        "summary": summary,
        "responses": {
            "200": {"description": "Done.", "content": {"application/json": {"schema": _schema(answer)}}},
            **{
                str(status): {
                    "description": REFUSALS[status],
                    "content": {"application/json": {"schema": _schema(error)}},
                }
                for status in refusals
            },
        },
    }
    if list(parameters):
        operation["parameters"] = list(parameters)
    if body is not None:
        content = {"application/json": {"schema": _schema(body)}}
        operation["requestBody"] = {"required": body_required, "content": content}
    return operation


def _schema(of: str | Json) -> Json:
    return {"$ref": f"#/components/schemas/{of}"} if isinstance(of, str) else of


def _list_of(name: str) -> Json:
    return {"type": "array", "items": _schema(name)}


def _object(properties: Json, required: list[str] | None = None) -> Json:
    required = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _enum(values: list[str]) -> Json:
    return {"type": "string", "enum": values} if values else {"type": "string"}


def _query(name: str, low: int, high: int) -> Json:
    return {"name": name, "in": "query", "schema": {"type": "integer", "minimum": low, "maximum": high}}


def _model_parameter(rankers: list[Ranker]) -> Json:
    return {"name": "model", "in": "path", "required": True, "schema": _enum(_unique(r.manifest.name for r in rankers))}


def _versions(rankers: list[Ranker]) -> list[str]:
    return _unique(r.manifest.version for r in rankers)


def _unique(values: Iterable[str]) -> list[str]:
    return sorted(set(values))
