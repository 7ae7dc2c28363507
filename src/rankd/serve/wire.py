"""The JSON of the /v1 API, as Structs that decode and check in one pass, and their way to and from our types."""

from __future__ import annotations

import math
import re
import uuid
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from rankd.errors import InvalidRequest, nearest
from rankd.gate_record import Compression
from rankd.types import Event, RankRequest, RowCounts, Scores

T = TypeVar("T", bound=msgspec.Struct)

MAX_ID = 512
Text = Annotated[str, Meta(min_length=1, max_length=MAX_ID)]
Whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Id = Text | Whole | float  # in JSON 7.0 is a whole number too; `_id` refuses 7.5
Name = Annotated[str, Meta(min_length=1, max_length=200)]
MAX_SECONDS = 2**40 - 1
MAX_TOP_K = 1_000_000
Seconds = Annotated[int, Meta(ge=0, le=MAX_SECONDS)] | float  # 3.0, as above
Number = Annotated[float, Meta(ge=-1e15, le=1e15)]


class EventBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One event: what was done to which item, when (seconds since 1970 UTC; now, if left out)."""

    item_id: Id
    event: Annotated[str, Meta(max_length=200)] = ""
    time: Seconds | None = None
    values: Annotated[dict[str, Number], Meta(max_length=64)] = {}


class RankBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """POST /v1/rank. `model` may be left out where there is only one; `version` means the newest that is ready."""

    user_id: Id
    candidates: Annotated[list[Id], Meta(min_length=1, max_length=100_000)]
    model: Annotated[str, Meta(max_length=200)] = ""
    version: Annotated[str, Meta(max_length=200)] = ""
    history: Annotated[list[EventBody], Meta(max_length=100_000)] | None = None
    context: Annotated[dict[str, str | Number], Meta(max_length=64)] = {}
    time: Seconds | None = None
    top_k: Annotated[int, Meta(ge=1, le=MAX_TOP_K)] | float | None = None
    timeout_ms: Annotated[float, Meta(gt=0, le=3_600_000)] | None = None
    request_id: Annotated[str, Meta(max_length=128, pattern=r"^[\x21-\x7e]*$")] = ""
    priority: Literal["interactive", "batch"] = "interactive"


class RankAnswer(msgspec.Struct, frozen=True):
    """The scores: row i of `scores` belongs to `candidates[i]`, column k to `tasks[k]`. They are logits."""

    model: str
    version: str
    request_id: str
    tasks: tuple[str, ...]
    candidates: tuple[str, ...]
    scores: list[list[float]]
    unknown: tuple[str, ...]
    unknown_user: bool
    degraded: tuple[str, ...]
    rows: dict[str, RowCounts]
    state: str
    timings_ms: dict[str, float]


class EventsBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """POST /v1/events: append to a user's history."""

    user_id: Id
    events: Annotated[list[EventBody], Meta(min_length=1, max_length=10_000)]
    model: Annotated[str, Meta(max_length=200)] = ""


class EventsAnswer(msgspec.Struct, frozen=True):
    """How many events each version of the model stores for the user now, and the item ids that it does not know.

    `acknowledged_by` is "store" where the feature store has confirmed them, "outbox" where this server's disk has.
    """

    model: str
    user_id: str
    stored: dict[str, int]
    unknown: tuple[str, ...]
    acknowledged_by: str = "store"


class ModelAnswer(msgspec.Struct, frozen=True):
    """One version in GET /v1/models. What follows `reason` is there when it is ready.

    `compression` is there for a compressed version: its recipe, and what the accuracy gate found.
    """

    name: str
    version: str
    state: str
    reason: str = ""
    kind: str = ""
    created: str = ""
    precision: str = ""
    target: str = ""
    parity: dict[str, float] = {}
    metrics: dict[str, float] = {}
    tasks: tuple[str, ...] = ()
    event_types: tuple[str, ...] = ()
    history_length: int = 0
    max_candidates: int = 0
    num_items: int = 0
    compression: Compression | msgspec.UnsetType = msgspec.UNSET


class UserSummary(msgspec.Struct, frozen=True):
    """A user in GET /v1/models/{model}/users."""

    user_id: str
    events: int


class ShownEvent(msgspec.Struct, frozen=True):
    """An event as people read it; `time` is seconds since 1970 UTC."""

    item_id: str
    item_name: str
    event: str
    time: int


class UserAnswer(msgspec.Struct, frozen=True):
    """GET /v1/models/{model}/users/{user_id}: the newest events first; `events` counts all that are stored."""

    user_id: str
    events: int
    history: list[ShownEvent]


class ItemAnswer(msgspec.Struct, frozen=True):
    """An item and its name for people."""

    item_id: str
    item_name: str


class CandidatesAnswer(msgspec.Struct, frozen=True):
    """GET /v1/models/{model}/candidates: the same sample for the same count and seed."""

    seed: int
    items: list[ItemAnswer]


class IndexBody(msgspec.Struct, frozen=True):
    """POST /v2/repository/index: everything, or only what is ready."""

    ready: bool = False


class ErrorDetail(msgspec.Struct, frozen=True):
    """The class of `rankd.errors` and what it says."""

    type: str
    message: str


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The body of every answer that is not a success."""

    error: ErrorDetail


_rank_decoder = msgspec.json.Decoder(RankBody)
_events_decoder = msgspec.json.Decoder(EventsBody)
_encoder = msgspec.json.Encoder()


def decode_rank(body: bytes) -> RankRequest:
    """A /v1/rank body as a request.

    Raises:
        InvalidRequest: not JSON, or not this JSON; the message has the path of the field.
    """
    raw: RankBody = _decode(_rank_decoder, body)
    return RankRequest(
        user_id=_id(raw.user_id),
        candidates=tuple(map(_id, raw.candidates)),
        model=raw.model,
        version=raw.version,
        history=None if raw.history is None else tuple(map(decode_event, raw.history)),
        context=raw.context,
        time=_whole(raw.time, "time", 0, MAX_SECONDS),
        top_k=_whole(raw.top_k, "top_k", 1, MAX_TOP_K),
        timeout_ms=raw.timeout_ms,
        request_id=raw.request_id or uuid.uuid4().hex,
        priority=raw.priority,
    )


def decode_events(body: bytes) -> tuple[str, str, tuple[Event, ...]]:
    """A /v1/events body as (model, user id, events); raises like `decode_rank`."""
    raw: EventsBody = _decode(_events_decoder, body)
    return raw.model, _id(raw.user_id), tuple(map(decode_event, raw.events))


def encode_scores(scores: Scores) -> bytes:
    """The answer to /v1/rank."""
    return _encoder.encode(
        RankAnswer(
            model=scores.model,
            version=scores.version,
            request_id=scores.request_id,
            tasks=scores.tasks,
            candidates=scores.candidates,
            scores=scores.scores.tolist(),
            unknown=scores.unknown,
            unknown_user=scores.unknown_user,
            degraded=scores.degraded,
            rows=dict(scores.rows),
            state=scores.state,
            timings_ms={stage: round(ms, 4) for stage, ms in scores.timings_ms.items()},
        )
    )


def encode(answer: msgspec.Struct | list[Any] | dict[str, Any]) -> bytes:
    """Any other answer."""
    return _encoder.encode(answer)


def encode_request(request: RankRequest) -> bytes:
    """What a client sends for a request.

    Raises:
        InvalidRequest: a timeout_ms that is not a number; JSON would say null, which means no limit at all.
    """
    if request.timeout_ms is not None and not math.isfinite(request.timeout_ms):
        raise InvalidRequest(f"timeout_ms is {request.timeout_ms}; it has to be above 0, or left out")
    return _encoder.encode(
        RankBody(
            user_id=request.user_id,
            candidates=list(request.candidates),
            model=request.model,
            version=request.version,
            history=None if request.history is None else [encode_event(event) for event in request.history],
            context=dict(request.context),
            time=request.time,
            top_k=request.top_k,
            timeout_ms=request.timeout_ms,
            request_id=request.request_id,
            priority=request.priority,  # type: ignore[arg-type]  # the server says what is wrong with another one
        )
    )


def encode_event(event: Event) -> EventBody:
    """What a client sends for an event."""
    return EventBody(event.item_id, event.event, event.time, dict(event.values))


def decode_event(raw: EventBody) -> Event:
    """An event of a body."""
    return Event(_id(raw.item_id), raw.event, _whole(raw.time, "time", 0, MAX_SECONDS), raw.values)


def _whole(raw: float | None, name: str, low: int, high: int) -> int | None:
    """A whole number, which JSON may write as 3 or as 3.0."""
    if isinstance(raw, float) and not (raw.is_integer() and low <= raw <= high):
        raise InvalidRequest(f"{name} is {raw}; it has to be a whole number from {low} to {high}")
    return None if raw is None else int(raw)


def _id(raw: str | float) -> str:
    """An id as text."""
    if type(raw) is str:
        return raw
    if isinstance(raw, float) and (not raw.is_integer() or abs(raw) >= 2**63):
        raise InvalidRequest(f"the id {raw} is neither a text nor a whole number of 64 bits; write it as a text")
    return str(int(raw))


def _decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(_explain(str(error), decoder.type)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error


def _explain(message: str, kind: Any) -> str:
    """msgspec's message, with the nearest known key where one is unknown."""
    unknown = re.search(r"unknown field `(.*?)`", message)
    if unknown is None:
        return message
    inner = EventBody if re.search(r"`\$\.\w+\[", message) else kind
    fields = inner.__struct_fields__
    return f"{message}; known here are {', '.join(fields)}.{nearest(unknown[1], fields)}"
