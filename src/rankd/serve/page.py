"""The live page at / and the small read-only API that it stands on: users, their histories, items to rank.

The page itself is `page.html`, one file; everything it shows comes from these routes, /v1/rank and /v1/events.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from pathlib import Path

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rankd.errors import InvalidRequest, NotFound, nearest
from rankd.features.schema import FIRST_ITEM_ROW
from rankd.ranker import Ranker
from rankd.serve.repository import ModelRepository
from rankd.serve.v1 import json_response
from rankd.serve.wire import CandidatesAnswer, ItemAnswer, ShownEvent, UserAnswer, UserSummary, encode

PAGE = Path(__file__).with_name("page.html").read_bytes()
SHOWN_EVENTS = 200
MAX_LIMIT = 200
MAX_QUERY = 100
MAX_SEED = 2**31 - 1


def routes(repository: ModelRepository) -> list[Route]:
    """GET / and /v1/models/{model}/users, /users/{user_id}, /candidates, /items."""
    headers = {"content-security-policy": _policy(PAGE), "x-content-type-options": "nosniff"}

    async def page(request: Request) -> Response:
        return Response(PAGE, media_type="text/html", headers=headers)

    async def users(request: Request) -> Response:
        ranker, limit = _ranker(repository, request), _whole(request, "limit", 50, 1, MAX_LIMIT)
        return json_response(encode(await asyncio.to_thread(_users, ranker, limit)))

    async def user(request: Request) -> Response:
        ranker, user_id = _ranker(repository, request), request.path_params["user_id"]
        return json_response(encode(await asyncio.to_thread(_user, ranker, user_id)))

    async def candidates(request: Request) -> Response:
        ranker = _ranker(repository, request)
        count = _whole(request, "count", 20, 1, ranker.schema.max_candidates)
        seed = _whole(request, "seed", 0, 0, MAX_SEED)
        known = ranker.schema.num_item_rows - FIRST_ITEM_ROW
        drawn = np.random.default_rng(seed).choice(known, min(count, known), replace=False) + FIRST_ITEM_ROW
        return json_response(encode(CandidatesAnswer(seed, [_item(ranker, int(row)) for row in drawn])))

    async def items(request: Request) -> Response:
        ranker, limit = _ranker(repository, request), _whole(request, "limit", 20, 1, MAX_LIMIT)
        wanted = request.query_params.get("query", "").lower()
        if len(wanted) > MAX_QUERY:
            raise InvalidRequest(f"query has {len(wanted)} characters; at most {MAX_QUERY} are searched for")
        ids = ranker.catalogue.ids
        pairs = enumerate(zip(ids.items, ids.item_names, strict=True), start=FIRST_ITEM_ROW)
        rows = (row for row, (item, name) in pairs if wanted in item.lower() or wanted in name.lower())
        return json_response(encode([_item(ranker, row) for row, _ in zip(rows, range(limit), strict=False)]))

    prefix = "/v1/models/{model}"
    return [
        Route("/", page, methods=["GET"]),
        Route(f"{prefix}/users", users, methods=["GET"]),
        Route(f"{prefix}/users/{{user_id}}", user, methods=["GET"]),
        Route(f"{prefix}/candidates", candidates, methods=["GET"]),
        Route(f"{prefix}/items", items, methods=["GET"]),
    ]


def _users(ranker: Ranker, limit: int) -> list[UserSummary]:
    features = ranker.features
    return [UserSummary(user, len(features.stored_history(user) or ())) for user in features.user_ids(limit)]


def _user(ranker: Ranker, user_id: str) -> UserAnswer:
    history = ranker.features.stored_history(user_id)
    if history is None:
        near = nearest(user_id, ranker.features.user_ids(1000))
        raise NotFound(f"user '{user_id[:100]}' has no history here; ranking still works, as for a new user.{near}")
    newest = history.last(SHOWN_EVENTS)
    shown = [
        ShownEvent(
            ranker.catalogue.item_id(row), ranker.catalogue.item_name(row), ranker.schema.event_types[event], time
        )
        for row, event, time in zip(newest.rows.tolist(), newest.events.tolist(), newest.times.tolist(), strict=True)
    ]
    return UserAnswer(user_id, len(history), shown[::-1])


def _item(ranker: Ranker, row: int) -> ItemAnswer:
    return ItemAnswer(ranker.catalogue.item_id(row), ranker.catalogue.item_name(row))


def _ranker(repository: ModelRepository, request: Request) -> Ranker:
    return repository.get(request.path_params["model"])


def _whole(request: Request, name: str, default: int, low: int, high: int) -> int:
    """A whole number of the query string.

    Raises:
        InvalidRequest: not a whole number, or out of its range.
    """
    given = request.query_params.get(name)
    if given is None:
        return default
    if not re.fullmatch(r"-?[0-9]{1,18}", given) or not low <= int(given) <= high:
        raise InvalidRequest(f"{name} is '{given[:40]}'; it has to be a whole number from {low} to {high}")
    return int(given)


def _policy(page: bytes) -> str:
    """A content security policy that lets this page's own script and style run, and nothing else."""
    hashes = {}
    for tag in (b"script", b"style"):
        found = re.search(b"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        digest = hashlib.sha256(found[1] if found else b"").digest()
        hashes[tag.decode()] = base64.b64encode(digest).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
