"""Checking a request against a model's schema, and turning its inline parts (events, context) into the model's rows.

Every refusal is an InvalidRequest that names the field, what was given, and what is allowed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import numpy as np

from rankd.errors import InvalidRequest, nearest
from rankd.features.catalogue import Catalogue
from rankd.features.schema import UNKNOWN_ROW, DefaultTime, FeatureSchema
from rankd.features.stores.event_records import RawEvent
from rankd.features.tables import UserFeatures, encode_values, normalise
from rankd.types import Event, RankRequest, UserHistory

PRIORITIES = ("interactive", "batch")
MAX_TIME = 2**40  # seconds; the year 36812

REQUEST_ID_CHARACTERS = 128


def check_request(request: RankRequest, schema: FeatureSchema) -> None:
    """Refuse what cannot be ranked.

    Raises:
        InvalidRequest: an empty user id, no or too many candidates, a bad top_k, timeout_ms, priority or time, or a
            request id that is too long.
    """
    if not request.user_id:
        raise InvalidRequest("user_id is empty; give the user's id, or any name for a user without history")
    if not request.candidates:
        raise InvalidRequest("candidates is empty; give at least one item id")
    if len(request.candidates) > schema.max_candidates:
        raise InvalidRequest(
            f"{len(request.candidates)} candidates given; this model takes at most {schema.max_candidates} "
            "in one request: split the list, scores do not depend on the split"
        )
    if request.top_k is not None and request.top_k < 1:
        raise InvalidRequest(f"top_k is {request.top_k}; it has to be 1 or more, or left out")
    if request.timeout_ms is not None and not (math.isfinite(request.timeout_ms) and request.timeout_ms > 0):
        raise InvalidRequest(f"timeout_ms is {request.timeout_ms}; it has to be above 0, or left out")
    if request.priority not in PRIORITIES:
        raise InvalidRequest(f"priority is '{request.priority}'; it is one of: {', '.join(PRIORITIES)}")
    if len(request.request_id) > REQUEST_ID_CHARACTERS:
        raise InvalidRequest(
            f"the request id has {len(request.request_id)} characters; allowed are {REQUEST_ID_CHARACTERS}"
        )
    if request.time is not None:
        _check_time(request.time)


def request_time(request: RankRequest, schema: FeatureSchema, history: UserHistory) -> int:
    """The moment of a request, in seconds since 1970: its own, else the clock's, else the end of what is known."""
    if request.time is not None:
        return request.time
    if schema.default_time is DefaultTime.WALL:
        return int(time.time())
    return max(schema.log_end, int(history.times[-1]) if len(history) else 0)


def history_of_events(
    events: Sequence[Event], schema: FeatureSchema, catalogue: Catalogue
) -> tuple[UserHistory, tuple[str, ...]]:
    """Events in the model's rows, sorted by time, and the item ids that the model does not know.

    Raises:
        InvalidRequest: an unknown event type, an unknown value name, or a value or time that is not usable.
    """
    rows = catalogue.rows_of([event.item_id for event in events])
    now = int(time.time()) if schema.default_time is DefaultTime.WALL else schema.log_end
    types = np.asarray([_event_type(event, schema) for event in events], np.int32)
    times = np.asarray([now if event.time is None else _check_time(event.time) for event in events], np.int64)
    raw = np.full((len(events), len(schema.event_values)), np.nan, np.float32)
    names = [column.name for column in schema.event_values]
    for number, event in enumerate(events):
        for name, value in event.values.items():
            raw[number, _position(name, names, "event value")] = _check_finite(name, value)
    values = [normalise(column, raw[:, index]) for index, column in enumerate(schema.event_values)]
    order = np.argsort(times, kind="stable")
    packed = np.stack(values, axis=1) if values else np.zeros((len(events), 0), np.float32)
    unknown = tuple(dict.fromkeys(e.item_id for e, row in zip(events, rows, strict=True) if row == UNKNOWN_ROW))
    return UserHistory(rows[order], types[order], times[order], packed[order]), unknown


def raw_events(events: Sequence[Event], schema: FeatureSchema) -> list[RawEvent]:
    """Events as a store keeps them, checked: raw values, a type and a time for each.

    Raises:
        InvalidRequest: as `history_of_events`.
    """
    now = int(time.time()) if schema.default_time is DefaultTime.WALL else schema.log_end
    names = [column.name for column in schema.event_values]
    raw = []
    for event in events:
        for name, value in event.values.items():
            _position(name, names, "event value")
            _check_finite(name, value)
        moment = now if event.time is None else _check_time(event.time)
        raw.append(RawEvent(event.item_id, schema.event_types[_event_type(event, schema)], moment, event.values))
    return raw


def user_features_with(
    context: Mapping[str, str | float], stored: UserFeatures, schema: FeatureSchema, catalogue: Catalogue
) -> UserFeatures:
    """Stored user features with the request's own values put over them by name.

    Raises:
        InvalidRequest: a name that is no user feature of this model, or a value of the wrong type.
    """
    if not context:
        return stored
    categories, numeric = stored.categories.copy(), stored.numeric.copy()
    columns = {column.name: column for column in schema.user_categorical}
    numbers = [column.name for column in schema.user_numeric]
    start = dict(zip(columns, np.cumsum([0, *(c.width for c in columns.values())]), strict=False))
    for name, value in context.items():
        if name in columns:
            if not isinstance(value, str):
                raise InvalidRequest(f"context '{name}' is {value!r}; this user feature is a text")
            codes = encode_values(columns[name], catalogue.vocabulary("user", name), [value])[0]
            categories[start[name] : start[name] + len(codes)] = codes
        else:
            index = _position(name, numbers, "user feature", [*columns, *numbers])
            raw = np.asarray(_check_finite(name, value), np.float32)
            numeric[index] = normalise(schema.user_numeric[index], raw)
    return UserFeatures(categories, numeric)


def _event_type(event: Event, schema: FeatureSchema) -> int:
    if not event.item_id:
        raise InvalidRequest("an event has an empty item_id")
    name = event.event or (schema.match_events or schema.event_types)[0]
    return _position(name, schema.event_types, "event type")


def _position(name: str, names: Sequence[str], what: str, allowed: Sequence[str] | None = None) -> int:
    if name in names:
        return names.index(name)
    allowed = names if allowed is None else allowed
    listed = ", ".join(allowed) or "none"
    raise InvalidRequest(f"unknown {what} '{name}'; this model has: {listed}.{nearest(name, allowed)}")


def _check_time(seconds: int) -> int:
    if not 0 <= seconds < MAX_TIME:
        raise InvalidRequest(f"time is {seconds}; it has to be whole seconds since 1970-01-01 UTC")
    return seconds


def _check_finite(name: str, value: str | float) -> float:
    if isinstance(value, str) or not math.isfinite(value):
        raise InvalidRequest(f"'{name}' is {value!r}; it has to be a finite number")
    return value
