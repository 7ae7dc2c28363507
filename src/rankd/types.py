"""What travels through a request, stage by stage: RankRequest -> Features -> UserState -> Scores.

Each stage returns a new frozen value. This file imports nothing of ours; `ranker.py` is where the stages meet.

Dimension letters, the same everywhere:

    B  requests in one call          T  history tokens of one sub-sequence (padded to a bucket)
    C  candidates of a request       N  sub-sequences of a history (one for each extraction strategy)
    K  tasks (click, like, ...)      D  width of the model
    H  attention heads               L  layers of a block
    G  categorical columns           F  numeric columns          E  numeric values carried by an event
    A  events appended to a state
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Allocate = Callable[[int], Bytes]
"""Makes memory: so many bytes of zeros, (n,) uint8, which begin at a multiple of 64."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that a user did to an item. `time` is in whole seconds since 1970-01-01 UTC; None means now."""

    item_id: str
    event: str = ""
    time: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RankRequest:
    """A user and the candidates to be ordered for that user.

    `history` replaces the stored one when it is given (an empty tuple: no history at all). `context` overrides
    stored user features by name. `priority` is "interactive" or "batch"; batch requests let interactive ones pass.
    `time` is the moment of the request in seconds since 1970-01-01 UTC; None means the model's own default (the wall
    clock, or the end of its log). `timeout_ms` counts from the call.
    """

    user_id: str
    candidates: tuple[str, ...]
    model: str = ""
    version: str = ""
    history: tuple[Event, ...] | None = None
    context: Mapping[str, str | float] = field(default_factory=dict)
    time: int | None = None
    top_k: int | None = None
    timeout_ms: float | None = None
    request_id: str = ""
    priority: str = "interactive"


@dataclass(frozen=True, slots=True)
class UserHistory:
    """The events of one user in a model version's own rows, oldest first; n events.

    rows (n,) int32 item rows; events (n,) int32 index of the event type; times (n,) int64 seconds since 1970;
    values (n, E) float32. `dropped` counts older events that are no longer kept: event i is the user's event number
    dropped + i. Arrays are never written to after the history is made: an append makes a new history.
    """

    rows: Int32Array
    events: Int32Array
    times: Int64Array
    values: Float32Array
    dropped: int = 0

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def until(self, end: int) -> UserHistory:
        """The first `end` events, as views."""
        return UserHistory(self.rows[:end], self.events[:end], self.times[:end], self.values[:end], self.dropped)

    def last(self, count: int) -> UserHistory:
        """The newest `count` events, as views."""
        start = max(len(self) - count, 0)
        kept = self.rows[start:], self.events[start:], self.times[start:], self.values[start:]
        return UserHistory(*kept, self.dropped + start)


@dataclass(frozen=True, slots=True)
class Features:
    """Columns ready for the model, named as the graph names its inputs; every array has a leading B of 1.

    `history` is padded to a history bucket, `candidates` to a candidate bucket; `num_candidates` rows are real.
    """

    history: Mapping[str, Array]
    candidates: Mapping[str, Array]
    num_candidates: int


@dataclass(frozen=True, slots=True)
class UserState:
    """What `encode` made of a history: arrays named and shaped as the artifact's `state` says, with a B of 1.

    An array with a T dimension has room for a bucket of tokens; of block n the first `lengths[n]` are real. `mark`
    names what the arrays hold: of one model version two states with the same mark hold the same. Empty: unknown.
    """

    arrays: Mapping[str, Array]
    lengths: tuple[int, ...]
    mark: bytes = b""


@dataclass(frozen=True, slots=True)
class RowCounts:
    """How many rows of a table an answer was made of, by where their values came from.

    fresh: read from the store within the table's TTL; stale: older, and not read anew in time; default: not there in
    time, or (of those, `wrong_schema`) of a schema that is not the table's; absent: the store says that it has no such
    row. Default and absent rows have the artifact's own values.
    """

    fresh: int = 0
    stale: int = 0
    default: int = 0
    absent: int = 0
    wrong_schema: int = 0

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(
            self.fresh + other.fresh,
            self.stale + other.stale,
            self.default + other.default,
            self.absent + other.absent,
            self.wrong_schema + other.wrong_schema,
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """The answer to one RankRequest.

    `scores` is (C, K) float32, the model's logits: sigmoid gives the probability of a task. Without top_k the rows
    are in the order of the request's candidates; with top_k they are the best top_k, best first. `candidates` names
    each row. `unknown` names the candidates that the model has never heard of; they carry the declared missing-item
    score. `degraded` says what the answer had to do without (`features.version_features`), `rows` how many rows of each
    table of the feature store were fresh, stale or default. `state` says where the user's state came from (see
    `states.lending.Origin`). `timings_ms` holds the stages, in milliseconds.
    """

    model: str
    version: str
    candidates: tuple[str, ...]
    tasks: tuple[str, ...]
    scores: Float32Array
    unknown: tuple[str, ...] = ()
    unknown_user: bool = False
    degraded: tuple[str, ...] = ()
    rows: Mapping[str, RowCounts] = field(default_factory=dict)
    state: str = ""
    request_id: str = ""
    timings_ms: Mapping[str, float] = field(default_factory=dict)
