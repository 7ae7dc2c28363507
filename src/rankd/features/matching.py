"""Match features: what a user's own history says about each candidate, as (C, M) float32 columns.

They are computed at the moment of the request from the whole stored history, not from the tokens that fit the
model, and never enter the user's state. With h the matching events (`match_events`) of the user, oldest first:

    seen             1 if the candidate is in h
    count            log(1 + times it is in h)
    recency          log(1 + days since its newest event), 0 if never
    cadence          log(1 + days since its newest event / mean days between its events), 0 below two events
    affinity         log(1 + sum over distinct items i of h of similarity(i, candidate))
    recent_affinity  the same, each item weighted by exp(-days since its newest event / 30)
    events           log(1 + events in h), the same for every candidate
    idle             log(1 + days since the newest event of h), the same for every candidate

The loops are in `match_kernels.py`; here is what they need to know of a schema, and the memory that they work in.
"""

from __future__ import annotations

import threading
from functools import cache
from types import ModuleType

import numpy as np

from rankd.features.schema import FeatureSchema
from rankd.features.tables import ItemTable
from rankd.types import Array, Float32Array, Int32Array, UserHistory


@cache
def kernels() -> ModuleType:
    """The compiled loops. The first call takes 0.5 s, or 3 s where no process before has kept the machine code."""
    from rankd.features import match_kernels

    return match_kernels


def fill_match_features(
    schema: FeatureSchema,
    items: ItemTable,
    history: UserHistory,
    candidates: Int32Array,
    now: int,
    into: Float32Array,
) -> None:
    """Write the schema's match columns for candidate rows (C,) int32 at second `now` into (C, M) of any strides.

    Raises:
        IndexError: a candidate row that the item table does not have.
        ValueError: `into` is not (C, M).
    """
    check_shape(into, (candidates.shape[0], len(schema.match)))
    if not schema.match:
        return
    own = _workspace(schema, len(history))
    seen = own.seen[: kernels().note_seen(history.rows, history.events, history.times, own.wanted, own.slots, own.seen)]
    near = items.neighbours, items.similarities
    kernels().write_matches(candidates, *near, own.slots, seen, now, own.columns, into)


def check_shape(array: Array, shape: tuple[int, ...]) -> None:
    """The kernels trust their callers: what they write to must have the room.

    Raises:
        ValueError: another shape.
    """
    if array.shape != shape:
        raise ValueError(f"an array of shape {array.shape} cannot take {shape}")


class _Workspace:
    """What the kernels read of a schema, and their memory for histories of up to `capacity` events."""

    def __init__(self, schema: FeatureSchema, capacity: int) -> None:
        self.schema, self.capacity = schema, capacity
        places = [schema.match.index(name) if name in schema.match else -1 for name in kernels().ORDER]
        self.columns = np.asarray(places, np.int64)
        wanted = schema.match_events or schema.event_types
        self.wanted = np.asarray([name in wanted for name in schema.event_types], bool)
        slots = 1 << (kernels().SLOTS_A_PLACE * capacity).bit_length()
        self.slots = np.zeros((2, slots), np.int32)
        self.seen = np.zeros(capacity, kernels().SEEN)


class _Thread(threading.local):
    workspace: _Workspace | None = None


_thread = _Thread()


def _workspace(schema: FeatureSchema, events: int) -> _Workspace:
    """This thread's workspace, kept from request to request; a history longer than stored ones gets one of its own."""
    own = _thread.workspace
    if own is None or own.schema is not schema:
        own = _thread.workspace = _Workspace(schema, schema.stored_history)
    return own if events <= own.capacity else _Workspace(schema, events)
