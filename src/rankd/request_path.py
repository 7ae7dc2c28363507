"""THE request path: what is done with a request between its admission and its answer, in the order of this file.

    prepare    its history; the state of it, kept, extended or encoded; the rows of its candidates; its user's features
    assemble   a part of its candidates, with their features, into an executor's input buffers
    score      some parts, of one user or of several, in one call of the engine
    finish     all parts: unknown items get their score, and top_k is picked

`schedule/` says when, on which executor, and in how many parts; `ranker.py` takes requests in. What a request waits for
(the feature store, tables on shards, another request that computes the same user's state) is never waited for on an
executor: `prepare` says what it is, and is called again when it is there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np

from rankd.artifact import Manifest
from rankd.engine.backend import Executor
from rankd.errors import DeadlineExceeded
from rankd.features.assembly import fill_history, fill_item_columns, fill_request_columns, history_arrays, until
from rankd.features.catalogue import Catalogue
from rankd.features.embedded import EmbeddedInputs, EmbeddedLookUp, copy_candidates
from rankd.features.reading.stored_events import empty_history
from rankd.features.reading.version_features import Fetch, VersionFeatures
from rankd.features.requests import history_of_events, request_time, user_features_with
from rankd.features.schema import UNKNOWN_ROW, candidate_specs
from rankd.features.staging import InputBuffers, allocate, unwritten
from rankd.features.tables import UserFeatures
from rankd.features.token_rows import RowsAway, TokenRows
from rankd.observe.clocks import StageClock
from rankd.observe.tracing import Attribute, RequestTrace, SpanNote, opened
from rankd.schedule.packing import Packing
from rankd.schedule.served import Part, When
from rankd.states.lending import NO_TABLES, HeldState, NoStates, StateBusy, States, TokenTables
from rankd.types import Allocate, Array, Float32Array, RankRequest, Scores, UserHistory


@dataclass(slots=True, eq=False)
class RankItem:
    """A request on its way: the clock that was started when it came, and what was found for it so far. `lent` gives
    back what it holds; `logits` (C, K) fill up part by part. `columns` are its candidates' inputs: `embedded` when
    `looking` has filled them up; `token_rows` does that for its history where tables of tokens are beside the graph.
    `ready_by`: nothing is waited for after that, so that time is left to compute. Of the tables that could not be had
    `lost_tables` are the candidates' and `lost_tokens` those of the history."""

    request: RankRequest
    clock: StageClock
    logits: Float32Array
    deadline: float | None = None
    ready_by: float | None = None
    fetch: Fetch | None = None
    history: UserHistory | None = None
    now: int = 0
    unknown_user: bool = False
    held: HeldState | None = None
    alone: bool = False
    user: UserFeatures | None = None
    token_rows: TokenRows | None = None
    looking: EmbeddedLookUp | None = None
    columns: Mapping[str, Array] | None = None
    embedded: Mapping[str, Array] | None = None
    lost_tables: tuple[str, ...] = ()
    lost_tokens: tuple[str, ...] = ()
    dropped: bool = False
    lent: ExitStack = field(default_factory=ExitStack)
    trace: RequestTrace | None = None


class RequestPath:
    """What executors do with the requests of one model version; `schedule.served.Served` says what is called when.

    `begin` asks for the features of a request, if that was not done when it came. `memory` makes the memory that
    executors read (`Backend.host_memory`).
    """

    def __init__(
        self,
        manifest: Manifest,
        catalogue: Catalogue,
        features: VersionFeatures,
        states: States,
        begin: Callable[[RankItem], Fetch],
        embedded: EmbeddedInputs | None = None,
        memory: Allocate | None = None,
    ) -> None:
        self.manifest, self.schema, self.catalogue = manifest, manifest.schema, catalogue
        self.features, self.states, self._begin, self._embedded = features, states, begin, embedded
        self._memory = memory
        self._packing = WeakKeyDictionary[Executor, Packing]()  # of executors that are in use
        self._staging = WeakKeyDictionary[Executor, InputBuffers]()
        self._weights = np.asarray([task.rank_weight for task in self.schema.tasks], np.float32)

    @property
    def asks_early(self) -> bool:
        """Whether requests have to wait for tables that are elsewhere."""
        return self._embedded is not None and not self._embedded.local

    def use_packing(self, packing: Packing, executors: Sequence[Executor]) -> None:
        """Say how many users share a call of some executors, and make room for their inputs."""
        for executor in executors:
            most = {bucket: packing.most(bucket) for bucket in self.schema.candidate_buckets}
            self._packing[executor] = packing
            self._staging[executor] = InputBuffers(self.schema, most, self._memory)

    def prepare(self, item: RankItem, executor: Executor, alone: bool, wide: bool) -> When | None:
        """Find a request's history, state, rows and user features; a When if one of them is not there yet.

        Raises:
            InvalidRequest, DeadlineExceeded: of this request.
            EngineFailure: the engine failed.
        """
        request, features = item.request, self.features
        if item.history is None:
            item.clock.lap("queue")
            item.fetch = item.fetch or self._begin(item)
            item.history = self._history(item)
            item.clock.lap("features")
        _check_deadline(item)
        executor.encode_wide = wide and not alone
        if item.held is None or (alone and not item.alone):
            item.clock.lap("queue")
            states = NoStates() if alone else self.states
            tokens = partial(fill_history, self.schema, features.items, item.history, self._staging[executor])
            rows = self._token_rows(item)
            tables: TokenTables = NO_TABLES if rows is None else rows.again(alone)
            held = states.held(request.user_id, item.history, tokens, executor, wait=False, tables=tables)
            try:
                item.held, item.alone = item.lent.enter_context(held), alone
            except StateBusy:
                return partial(self._when_free, request.user_id)
            except RowsAway as away:
                return away.when_there
            item.lost_tokens = () if rows is None else rows.lost
            item.clock.lap("encode")
        assert item.fetch is not None  # noqa: S101 - it came with the history
        if (missing := features.when_rows(item.fetch)) is not None:
            return missing
        if self._embedded is not None and item.embedded is None:
            if item.looking is None:
                self._look_up(self._embedded, item, _held(item).state.arrays)
            assert item.looking is not None  # noqa: S101 - it was begun
            if not alone and not item.looking.there():
                return item.looking.when_there
            item.lost_tables = item.looking.finish()
            item.embedded = item.columns
        item.user = item.user or self._user(item)
        item.clock.lap("features")
        _check_deadline(item)
        return None

    def assemble(self, part: Part[RankItem], bucket: int, place: int, executor: Executor) -> None:
        """Write a part's candidates and their features into `place` of the executor's buffers.

        Raises:
            DeadlineExceeded: the request's time is over.
        """
        item = part.item
        assert item.fetch is not None  # noqa: S101 - the schedule prepares before it assembles
        assert item.history is not None  # noqa: S101
        assert item.user is not None  # noqa: S101
        if part.first == 0:
            item.clock.lap("queue")
        _check_deadline(item)
        into = self._staging[executor].candidates(bucket).row(place)
        rows = item.fetch.candidates[part.first : part.first + part.count]
        items = self.features.items
        if item.embedded is not None:
            copy_candidates(item.embedded, into, part.first, part.count)
        else:
            fill_item_columns(self.schema, items, rows, into)
            self.features.fill_items(item.fetch, into, part.first, part.count)
        fill_request_columns(self.schema, items, item.history, rows, item.user, item.now, into)
        if part.first == 0:
            item.clock.lap("features")

    def score(self, parts: Sequence[Part[RankItem]], bucket: int, executor: Executor) -> list[Float32Array]:
        """Logits (count, K) of each part, in calls of as many users as were warmed."""
        inputs, packing = self._staging[executor].candidates(bucket), self._packing[executor]
        logits = list[Float32Array]()
        while len(logits) < len(parts):
            size = packing.fits(bucket, len(parts) - len(logits))
            called = parts[len(logits) : len(logits) + size]
            states, begun = [_held(part.item).state for part in called], time.perf_counter()
            logits.extend(executor.score(states, inputs.call(len(logits), size)))
            _note_call(called, bucket, begun)
        return [one[: part.count] for part, one in zip(parts, logits, strict=True)]

    def take(self, part: Part[RankItem], logits: Float32Array) -> None:
        """Put a part's logits to the others."""
        part.item.logits[part.first : part.first + part.count] = logits

    def finish(self, item: RankItem) -> Scores:
        """The answer, now that all parts are there."""
        assert item.fetch is not None  # noqa: S101 - it was prepared
        request, scores, rows = item.request, item.logits, item.fetch.candidates
        lost = dict.fromkeys((*item.lost_tables, *item.lost_tokens))
        item.clock.lap("score")
        scores[rows == UNKNOWN_ROW] = self.schema.missing_item_score
        order = self._order(scores, request.top_k)
        answer = Scores(
            model=self.manifest.name,
            version=self.manifest.version,
            candidates=request.candidates if order is None else tuple(request.candidates[i] for i in order),
            tasks=self.schema.task_names,
            scores=scores if order is None else scores[order],
            unknown=tuple(request.candidates[i] for i in np.flatnonzero(rows == UNKNOWN_ROW)),
            unknown_user=item.unknown_user,
            degraded=(*self.features.degraded(item.fetch), *(f"table_{name}" for name in lost)),
            rows=dict(item.fetch.counts),
            state=_held(item).origin.value,
            request_id=request.request_id,
        )
        item.clock.lap("order")
        return replace(answer, timings_ms=item.clock.timings_ms())

    def abandon(self, item: RankItem, executor: Executor) -> None:
        """The executor that prepares a request hangs: nobody waits for the state that it was making."""
        self.states.abandon(item.request.user_id, executor)

    def let_go(self, executor: Executor) -> None:
        """A lost executor is not used any more; a call that it hangs in ends, if it can be ended."""
        executor.close()

    def drop(self, item: RankItem) -> None:
        """Give the state back, and have nobody look up for it any more."""
        item.dropped, item.token_rows = True, None  # which knows its item: it would wait for the garbage's collection
        item.lent.close()

    def look_up_early(self, item: RankItem) -> EmbeddedLookUp | None:
        """Ask for rows of tables that are elsewhere, now that a request's features are there; what is waited for, if
        anything is. Candidates whose rows are on their way are asked for when these are there; tokens that the kept
        state of the history lacks need none."""
        embedded = self._embedded
        assert item.fetch is not None  # noqa: S101 - it was asked for
        if embedded is None or embedded.local or item.dropped:
            return None
        have_rows = self.features.when_rows(item.fetch) is None
        if not have_rows and not embedded.token_tables:
            return None
        try:
            return self._ask_early(embedded, item, have_rows)
        except Exception:  # noqa: BLE001 - nobody listens here: `prepare` meets it again, and says so
            return None

    def _ask_early(self, embedded: EmbeddedInputs, item: RankItem, have_rows: bool) -> EmbeddedLookUp | None:
        item.history = self._history(item)
        tokens, of_history = history_arrays(self.schema, self.features.items, item.history), self._token_rows(item)
        lacking, first = dict[str, Array](), tuple[int, ...]()
        if of_history is not None:
            first = self.states.kept_tokens(item.request.user_id, item.history, tokens, of_history)
            lacking = of_history.lacking(tokens, first)
        looking = None
        if have_rows:
            looking = self._look_up(embedded, item, tokens, lacking)
        elif lacking:
            looking = self._begin_look_up(embedded, item, lacking, lacking)
        if looking is not None and of_history is not None and lacking:
            of_history.take(lacking, first, looking)
        return looking

    def _token_rows(self, item: RankItem) -> TokenRows | None:
        """What is looked up of a request's history for its state; None where the graph has all tables for that."""
        embedded = self._embedded
        if item.token_rows is None and embedded is not None and embedded.token_tables:
            item.token_rows = TokenRows(embedded, partial(self._begin_look_up, embedded, item))
        return item.token_rows

    def _user(self, item: RankItem) -> UserFeatures:
        assert item.fetch is not None  # noqa: S101 - the caller asked
        return user_features_with(item.request.context, self.features.user(item.fetch), self.schema, self.catalogue)

    def _look_up(
        self,
        embedded: EmbeddedInputs,
        item: RankItem,
        history: Mapping[str, Array],
        tokens: Mapping[str, Array] | None = None,
    ) -> EmbeddedLookUp:
        """Begin to look up rows of tables that are not in the graph, pooled: for all candidates at once, and the
        `tokens` that go with them, so that a shard is called once and not for every part."""
        assert item.fetch is not None  # noqa: S101 - the caller asked
        item.user = self._user(item)
        rows = item.fetch.candidates
        # What is not written here or by the look-up (the match features) is written when parts are assembled.
        whole = allocate(candidate_specs(self.schema), {"B": 1, "C": len(rows)}, unwritten).arrays
        fill_item_columns(self.schema, self.features.items, rows, whole)
        self.features.fill_items(item.fetch, whole, 0, len(rows))
        if self.schema.user_columns:
            whole["context_categories"][0] = item.user.categories
        item.columns = whole
        item.looking = self._begin_look_up(embedded, item, {**whole, **(tokens or {})}, history)
        return item.looking

    def _begin_look_up(
        self, embedded: EmbeddedInputs, item: RankItem, into: Mapping[str, Array], history: Mapping[str, Array]
    ) -> EmbeddedLookUp:
        """See `EmbeddedInputs.begin`; it ends with its request."""
        with opened(item.trace, "look-up") as span:
            looking = embedded.begin(into, history, item.ready_by, span)
        item.lent.callback(looking.forget)
        if item.dropped:  # meanwhile
            looking.forget()
        return looking

    def _history(self, item: RankItem) -> UserHistory:
        """The events up to the moment of the request, which is found on the way."""
        request, schema = item.request, self.schema
        assert item.fetch is not None  # noqa: S101 - the caller asked
        stored = self.features.history(item.fetch) if request.history is None else None
        given = None if request.history is None else history_of_events(request.history, schema, self.catalogue)[0]
        history = given if given is not None else stored if stored is not None else empty_history(schema)
        item.unknown_user = stored is None and given is None
        item.now = request_time(request, schema, history)
        return until(history, item.now)

    def _when_free(self, user: str, then: Callable[[], None]) -> None:
        if not self.states.when_free(user, then):
            then()

    def _order(self, scores: Float32Array, top_k: int | None) -> list[int] | None:
        """Indices of the best top_k rows, best first, equals in the order they came; None keeps all as they are."""
        if top_k is None:
            return None
        order: list[int] = np.argsort(-(scores @ self._weights), kind="stable")[:top_k].tolist()
        return order


def _held(item: RankItem) -> HeldState:
    assert item.held is not None  # noqa: S101 - the schedule prepares before it scores
    return item.held


def _note_call(parts: Sequence[Part[RankItem]], bucket: int, begun: float) -> None:
    """A call of the engine is over: those of its requests that are traced note it."""
    ended = time.perf_counter()
    for part in parts:
        if part.item.trace is not None:
            about: dict[str, Attribute] = {"rankd.rows": part.count, "rankd.bucket": bucket}
            about |= {"rankd.users": len(parts), "rankd.executor": threading.current_thread().name}
            part.item.trace.notes.append(SpanNote("score call", begun, ended, about))


def _check_deadline(item: RankItem) -> None:
    if item.deadline is not None and time.perf_counter() >= item.deadline:
        spent = ", ".join(f"{stage} {ms:.1f} ms" for stage, ms in item.clock.timings_ms().items())
        raise DeadlineExceeded(f"timeout_ms passed on the way: {spent}")
