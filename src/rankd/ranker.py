"""The request path: RankRequest -> admission -> features -> state -> scores, in one function (`Ranker._rank`).

HTTP, the command line and the library all call a Ranker. It holds one model version: its artifact, store, compiled
graphs, user states and waiting line.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from rankd.artifact import Artifact
from rankd.engine.backend import Backend, EngineConfig, Executor
from rankd.engine.targets import load_backend
from rankd.engine.warming import Shapes, most_new_tokens, score_ms, warm
from rankd.errors import DeadlineExceeded, InvalidRequest, RankdError
from rankd.features.assembly import bucket_of, candidate_arrays, history_arrays, until
from rankd.features.catalogue import Catalogue
from rankd.features.requests import check_request, history_of_events, request_time, user_features_with
from rankd.features.schema import UNKNOWN_ROW
from rankd.features.store import FeatureStore, MemoryStore, empty_history
from rankd.observe.clocks import StageClock
from rankd.observe.state_metrics import StateCounts
from rankd.schedule.line import WaitingLine
from rankd.schedule.packing import Packing, measure
from rankd.states.lending import HeldState, States
from rankd.states.open_states import engine_state_type, open_states
from rankd.states.state_config import StateConfig
from rankd.types import Array, Event, Float32Array, Int32Array, RankRequest, Scores

MAX_WAITING = 1000


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request on its way, with the clock that was started when it came."""

    request: RankRequest
    clock: StageClock
    deadline: float | None


@dataclass(frozen=True, slots=True)
class _Ready:
    """A request whose features and state are there."""

    asked: _Asked
    rows: Int32Array
    candidates: Mapping[str, Array]
    held: HeldState
    unknown_user: bool


class Ranker:
    """One model version, ready to rank. Make it with `Ranker.load`; close it, or use it as a context manager."""

    def __init__(
        self,
        artifact: Artifact,
        catalogue: Catalogue,
        store: FeatureStore,
        backend: Backend,
        states: States,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self.artifact, self.catalogue, self.store, self.backend = artifact, catalogue, store, backend
        self.manifest, self.schema = artifact.manifest, artifact.schema
        self.states = states
        self._executors = [backend.executor() for _ in range(backend.num_executors)]
        self.packing = Packing()
        self.line = WaitingLine(self._executors, self._rank, max_waiting, self._joins, artifact.manifest.name)
        self._weights = np.asarray([task.rank_weight for task in self.schema.tasks], np.float32)

    @classmethod
    def load(
        cls,
        path: str | Path,
        engine: EngineConfig | None = None,
        histories: str | Path = "",
        items: str | Path = "",
        max_waiting: int = MAX_WAITING,
        states: StateConfig | None = None,
    ) -> Self:
        """Open, verify, compile and warm a version folder (or a model folder: its latest version).

        `histories` and `items` are Parquet files that take the place of the artifact's own (`features.parquet`).

        Raises:
            ArtifactError: the artifact is missing, damaged, or not built for this engine.
            ConfigError: an unknown target, or states that cannot be kept as configured.
            DataError: a Parquet file that does not fit the model.
        """
        artifact = Artifact.open(Path(path))
        catalogue = Catalogue.load(artifact.path / "tables", artifact.schema)
        if histories or items:
            from rankd.features.parquet import with_histories, with_items

            catalogue = with_histories(catalogue, artifact.schema, Path(histories)) if histories else catalogue
            catalogue = with_items(catalogue, artifact.schema, Path(items)) if items else catalogue
        keep = states or StateConfig()
        backend = load_backend(artifact, engine or EngineConfig(), engine_state_type(keep))
        store = MemoryStore(artifact.schema, catalogue)
        ranker = cls(artifact, catalogue, store, backend, open_states(artifact, backend, keep), max_waiting)
        ranker.start()
        return ranker

    def start(self) -> None:
        """Warm every shape on every executor, then accept requests."""
        shapes = Shapes(self.manifest, self.backend.state_type)
        buckets, first = self.schema.candidate_buckets, self._executors[0]
        self.packing = measure(lambda bucket, users: score_ms(first, shapes, bucket, users), buckets)
        for executor in self._executors:
            warm(executor, shapes, {bucket: self.packing.sizes(bucket) for bucket in buckets})
        self.states.extend_up_to(most_new_tokens(first, shapes))
        self.line.start()

    def close(self) -> None:
        """Finish the accepted requests, end the threads, put the states away."""
        self.line.close()
        self.states.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rank(self, request: RankRequest) -> Scores:
        """Score the candidates of a request; see `submit`."""
        return self.submit(request).result()

    def submit(self, request: RankRequest) -> Future[Scores]:
        """Check a request and queue it.

        Raises:
            InvalidRequest, Overloaded, Unavailable: at once. DeadlineExceeded, EngineFailure: from the Future.
        """
        clock = StageClock()
        check_request(request, self.schema)
        deadline = None if request.timeout_ms is None else clock.started + request.timeout_ms / 1e3
        return self.line.submit(_Asked(request, clock, deadline), deadline)

    def state_counts(self) -> StateCounts:
        """What the user states did and hold."""
        return self.states.counts()

    def _rank(self, asked: Sequence[_Asked], executor: Executor) -> Sequence[Scores | Exception]:
        """The way of requests, once it is their turn; several share a call where that pays (`schedule.packing`)."""
        for one in asked:
            one.clock.lap("queue")
        with ExitStack() as lent:
            ready = [self._prepared(one, executor, lent) for one in asked]
            due = [one for one in ready if isinstance(one, _Ready)]
            logits: list[Float32Array] = []
            while len(logits) < len(due):
                size = self.packing.fits(_rows_of(due[0].candidates), len(due) - len(logits))
                call = due[len(logits) : len(logits) + size]
                logits.extend(executor.score([one.held.state for one in call], _side_by_side(call)))
        scored = iter(logits)
        return [self._answer(one, next(scored)) if isinstance(one, _Ready) else one for one in ready]

    def _prepared(self, asked: _Asked, executor: Executor, lent: ExitStack) -> _Ready | Exception:
        """Features and state of a request; `lent` gives the state back when all is done."""
        request, clock, schema = asked.request, asked.clock, self.schema
        try:
            rows = self.catalogue.rows_of(request.candidates)
            stored = self.store.history(request.user_id) if request.history is None else None
            given = None if request.history is None else history_of_events(request.history, schema, self.catalogue)[0]
            history = given if given is not None else stored if stored is not None else empty_history(schema)
            now = request_time(request, schema, history)
            features = self.store.user_features(request.user_id)
            user = user_features_with(request.context, features, schema, self.catalogue)
            items, history = self.store.items(), until(history, now)
            candidates = candidate_arrays(schema, items, history, rows, user, now)
            clock.lap("features")
            _check_deadline(asked)
            lending = self.states.held(
                request.user_id, history, lambda: history_arrays(schema, items, history), executor, asked.deadline
            )
            held = lent.enter_context(lending)
            clock.lap("encode")
            _check_deadline(asked)
        except RankdError as error:
            return error
        return _Ready(asked, rows, candidates, held, unknown_user=stored is None and given is None)

    def _answer(self, ready: _Ready, logits: Float32Array) -> Scores:
        """Logits (C, K) of padded rows as the answer to the request."""
        request, clock, rows = ready.asked.request, ready.asked.clock, ready.rows
        clock.lap("score")
        scores = logits[: len(rows)]
        scores[rows == UNKNOWN_ROW] = self.schema.missing_item_score
        order = self._order(scores, request.top_k)
        answer = Scores(
            model=self.manifest.name,
            version=self.manifest.version,
            candidates=request.candidates if order is None else tuple(request.candidates[i] for i in order),
            tasks=self.schema.task_names,
            scores=scores if order is None else scores[order],
            unknown=tuple(request.candidates[i] for i in np.flatnonzero(rows == UNKNOWN_ROW)),
            unknown_user=ready.unknown_user,
            state=ready.held.origin.value,
            request_id=request.request_id,
        )
        clock.lap("order")
        return replace(answer, timings_ms=clock.timings_ms())

    def _joins(self, chosen: Sequence[_Asked], waiting: _Asked) -> bool:
        """Whether a waiting request may share the call of those chosen: as many candidates, and it pays."""
        bucket = self._bucket(chosen[0])
        return len(chosen) < self.packing.most(bucket) and self._bucket(waiting) == bucket

    def _bucket(self, asked: _Asked) -> int:
        return bucket_of(len(asked.request.candidates), self.schema.candidate_buckets)

    def _order(self, scores: Float32Array, top_k: int | None) -> list[int] | None:
        """Indices of the best top_k rows, best first, equals in the order they came; None keeps all as they are."""
        if top_k is None:
            return None
        order: list[int] = np.argsort(-(scores @ self._weights), kind="stable")[:top_k].tolist()
        return order

    def append_events(self, user_id: str, events: tuple[Event, ...]) -> tuple[int, tuple[str, ...]]:
        """Append events to a user's history; the next `rank` sees them.

        Returns:
            How many events are stored for the user now, and the item ids that the model does not know (they are kept
            as the unknown item).

        Raises:
            InvalidRequest: an empty id or list, or an unknown event type or value name.
        """
        if not user_id or not events:
            raise InvalidRequest("an append needs a user_id and at least one event")
        history, unknown = history_of_events(events, self.schema, self.catalogue)
        return self.store.append(user_id, history), unknown


def _rows_of(candidates: Mapping[str, Array]) -> int:
    return int(candidates["candidate_item"].shape[1])


def _side_by_side(call: Sequence[_Ready]) -> Mapping[str, Array]:
    """The candidate inputs of several requests as one; of one request they are handed through."""
    first = call[0].candidates
    if len(call) == 1:
        return first
    return {name: np.concatenate([one.candidates[name] for one in call]) for name in first}


def _check_deadline(asked: _Asked) -> None:
    if asked.deadline is not None and time.perf_counter() >= asked.deadline:
        spent = ", ".join(f"{stage} {ms:.1f} ms" for stage, ms in asked.clock.timings_ms().items())
        raise DeadlineExceeded(f"timeout_ms passed on the way: {spent}")
