"""rankd's own service over gRPC (`protocol/rankd.proto`): messages as requests, scores and events as messages."""

from __future__ import annotations

from typing import Any

import numpy as np

from rankd.serve.messages import message
from rankd.serve.repository import ModelRepository
from rankd.types import Event, RankRequest, Scores

SERVICE = "rankd.v1.Ranking"


def decode_rank(request: Any) -> RankRequest:
    """A RankRequest message; what it leaves out is as in the dataclass."""

    def given(name: str) -> Any:
        return getattr(request, name) if request.HasField(name) else None

    history = given("history")
    context = {
        name: value.text if value.WhichOneof("value") == "text" else value.number
        for name, value in request.context.items()
    }
    return RankRequest(
        user_id=request.user_id,
        candidates=tuple(request.candidates),
        model=request.model,
        version=request.version,
        history=None if history is None else tuple(map(_event, history.events)),
        context=context,
        time=given("time"),
        top_k=given("top_k"),
        timeout_ms=given("timeout_ms"),
        request_id=request.request_id,
        priority=request.priority or "interactive",
    )


def encode_scores(scores: Scores) -> Any:
    """A RankResponse message."""
    response = message("rankd.v1.RankResponse")(
        model=scores.model,
        version=scores.version,
        candidates=scores.candidates,
        tasks=scores.tasks,
        scores=np.ascontiguousarray(scores.scores, "<f4").tobytes(),
        unknown=scores.unknown,
        unknown_user=scores.unknown_user,
        degraded=scores.degraded,
        state=scores.state,
        timings_ms=scores.timings_ms,
        request_id=scores.request_id,
    )
    for table, counts in scores.rows.items():
        entry = response.rows[table]
        for name in ("fresh", "stale", "default", "absent", "wrong_schema"):
            setattr(entry, name, getattr(counts, name))
    return response


def append_events(repository: ModelRepository, request: Any) -> dict[str, Any]:
    """Append events; the fields of an AppendEventsResponse.

    Raises:
        RankdError: as `ModelRepository.append_events`.
    """
    name = repository.get(request.model).manifest.name
    done = repository.append_events(name, request.user_id, tuple(map(_event, request.events)))
    return {
        "model": name,
        "user_id": request.user_id,
        "stored": done.stored,
        "unknown": done.unknown,
        "confirmed_by": "store" if done.confirmed else "outbox",
    }


def _event(given: Any) -> Event:
    return Event(given.item_id, given.event, given.time if given.HasField("time") else None, dict(given.values))
