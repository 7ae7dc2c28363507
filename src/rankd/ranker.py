"""The request path: RankRequest -> admission -> features -> state -> scores: `Ranker.submit`, then `Ranker._rank`.

HTTP, the command line and the library all call a Ranker. It holds one model version: its artifact, features, compiled
graphs, user states and waiting line. What a remote feature store has to be asked is asked on submission; a request
takes its place in the line when that has come, and one whose history has to be encoded anyway does so meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np

from rankd.artifact import Artifact
from rankd.engine import thread_plan
from rankd.engine.backend import Backend, EngineConfig, Executor
from rankd.engine.targets import load_backend
from rankd.engine.warming import Shapes, most_new_tokens, score_ms, warm
from rankd.errors import DeadlineExceeded, InvalidRequest, RankdError
from rankd.features import assembly
from rankd.features.assembly import bucket_of, fill_history, fill_item_columns, fill_request_columns, until
from rankd.features.catalogue import Catalogue
from rankd.features.feature_config import FeatureConfig
from rankd.features.reading.shared_features import FeatureService
from rankd.features.reading.stored_events import empty_history
from rankd.features.reading.version_features import Fetch, VersionFeatures
from rankd.features.requests import check_request, history_of_events, request_time, user_features_with
from rankd.features.schema import UNKNOWN_ROW
from rankd.features.staging import InputBuffers
from rankd.observe.clocks import StageClock
from rankd.observe.state_metrics import StateCounts
from rankd.schedule.line import WaitingLine
from rankd.schedule.packing import Packing, measure
from rankd.states.lending import HeldState, States
from rankd.states.open_states import engine_state_type, open_states
from rankd.states.state_config import StateConfig
from rankd.types import Event, Float32Array, RankRequest, Scores

MAX_WAITING = 1000
COMPUTE_RESERVE = 2.0
"""A request with a deadline keeps so many times what a request takes an executor for its own computation."""


@dataclass(slots=True)
class _Asked:
    """A request on its way, with the clock that was started when it came."""

    request: RankRequest
    clock: StageClock
    deadline: float | None
    fetch: Fetch | None = None


@dataclass(frozen=True, slots=True)
class _Ready:
    """A request whose features and state are there."""

    asked: _Asked
    fetch: Fetch
    held: HeldState
    unknown_user: bool


class Ranker:
    """One model version, ready to rank. Make it with `Ranker.load`; close it, or use it as a context manager."""

    def __init__(
        self,
        artifact: Artifact,
        catalogue: Catalogue,
        features: VersionFeatures,
        backend: Backend,
        states: States,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self.artifact, self.catalogue, self.features, self.backend = artifact, catalogue, features, backend
        self.manifest, self.schema = artifact.manifest, artifact.schema
        self.states = states
        self._executors = [backend.executor() for _ in range(backend.num_executors)]
        self._staging: dict[Executor, InputBuffers] = {}
        self._own_service: FeatureService | None = None
        self.packing = Packing()
        name, on_start = artifact.manifest.name, partial(thread_plan.apply, backend.plan)
        self.line = WaitingLine(self._executors, self._rank, max_waiting, self._joins, name, on_start=on_start)
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
        features: FeatureService | None = None,
    ) -> Self:
        """Open, verify, compile and warm a version folder (or a model folder: its latest version).

        `histories` and `items` are Parquet files that take the place of the artifact's own (`features.parquet`).
        `features` is the server's; without it there is one in memory, for this ranker alone.

        Raises:
            ArtifactError: the artifact is missing, damaged, or not built for this engine.
            ConfigError: an unknown target, states that cannot be kept as configured, or a feature store whose columns
                are of another kind than the model's.
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
        service = features or FeatureService(FeatureConfig())
        version = VersionFeatures(artifact.schema, catalogue, service.of(artifact.manifest.name))
        ranker = cls(artifact, catalogue, version, backend, open_states(artifact, backend, keep), max_waiting)
        ranker._own_service = None if features is not None else service
        ranker.start()
        return ranker

    def start(self) -> None:
        """Warm every shape on every executor, then accept requests."""
        shapes = Shapes(self.manifest, self.backend.state_type)
        buckets, first = self.schema.candidate_buckets, self._executors[0]
        self.use_packing(measure(lambda bucket, users: score_ms(first, shapes, bucket, users), buckets))
        assembly.warm(self.schema, self.features.items)
        for executor in self._executors:
            warm(executor, shapes, {bucket: self.packing.sizes(bucket) for bucket in buckets})
        self.states.extend_up_to(most_new_tokens(first, shapes))
        self.line.start()

    def use_packing(self, packing: Packing) -> None:
        """Say how many users share a call, and make room for their inputs; not while requests are served."""
        self.packing = packing
        most = {bucket: packing.most(bucket) for bucket in self.schema.candidate_buckets}
        self._staging = {executor: InputBuffers(self.schema, most) for executor in self._executors}

    def close(self) -> None:
        """Finish the accepted requests, end the threads, put the states away."""
        self.line.close()
        self.states.close()
        self.features.close()
        if self._own_service is not None:
            self._own_service.close()

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
        asked, features = _Asked(request, clock, deadline), self.features
        if features.local:
            return self.line.submit(asked, deadline)
        self.line.check_room()  # before anything is asked of the store
        asked.fetch = self._begin(asked)
        return self.line.submit(asked, deadline, partial(self._when_ready, asked, asked.fetch))

    def state_counts(self) -> StateCounts:
        """What the user states did and hold."""
        return self.states.counts()

    def _begin(self, asked: _Asked) -> Fetch:
        """Ask for the features of a request. It waits for them no longer than leaves time to compute."""
        request = asked.request
        until = asked.clock.started + self.features.shared.config.wait_ms / 1e3
        if asked.deadline is not None:
            until = min(until, asked.deadline - COMPUTE_RESERVE * self.line.mean_seconds)
        try:
            return self.features.begin(request.user_id, request.candidates, request.history is None, until)
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"an id of the request cannot be written in UTF-8: {error}; send text") from error

    def _when_ready(self, asked: _Asked, fetch: Fetch, then: Callable[[], None]) -> None:
        """Call `then` when a request can take its place in the line."""

        def come() -> None:
            asked.clock.lap("features")
            then()

        encode = not self.states.has(asked.request.user_id)  # then the rows come meanwhile
        self.features.when_ready(fetch, not encode, come)

    def _rank(self, asked: Sequence[_Asked], executor: Executor) -> Sequence[Scores | Exception]:
        """The way of requests, once it is their turn; several share a call where that pays (`schedule.packing`)."""
        for one in asked:
            one.clock.lap("queue")
        inputs = self._staging[executor].candidates(self._bucket(asked[0]))
        with ExitStack() as lent:
            ready: list[_Ready | Exception] = []
            due: list[_Ready] = []
            for one in asked:
                ready.append(self._prepared(one, executor, len(due), lent))
                due += [ready[-1]] if isinstance(ready[-1], _Ready) else []
            logits: list[Float32Array] = []
            while len(logits) < len(due):
                size = self.packing.fits(self._bucket(asked[0]), len(due) - len(logits))
                call = due[len(logits) : len(logits) + size]
                logits.extend(executor.score([one.held.state for one in call], inputs.call(len(logits), size)))
        scored = iter(logits)
        return [self._answer(one, next(scored)) if isinstance(one, _Ready) else one for one in ready]

    def _prepared(self, asked: _Asked, executor: Executor, place: int, lent: ExitStack) -> _Ready | Exception:
        """State and features of a request, these in `place` of the executor's buffers; `lent` gives the state back when
        all is done."""
        request, clock, schema, features = asked.request, asked.clock, self.schema, self.features
        staging = self._staging[executor]
        into = staging.candidates(self._bucket(asked)).row(place)
        try:
            fetch = asked.fetch or self._begin(asked)
            stored = features.history(fetch) if request.history is None else None
            given = None if request.history is None else history_of_events(request.history, schema, self.catalogue)[0]
            history = given if given is not None else stored if stored is not None else empty_history(schema)
            now = request_time(request, schema, history)
            history = until(history, now)
            clock.lap("features")
            _check_deadline(asked)
            tokens = partial(fill_history, schema, features.items, history, staging, place)
            held = lent.enter_context(self.states.held(request.user_id, history, tokens, executor, asked.deadline))
            clock.lap("encode")
            features.wait_for_rows(fetch)
            fill_item_columns(schema, features.items, fetch.candidates, into)
            features.fill_items(fetch, into)
            user = user_features_with(request.context, features.user(fetch), schema, self.catalogue)
            fill_request_columns(schema, features.items, history, fetch.candidates, user, now, into)
            clock.lap("features")
            _check_deadline(asked)
        except RankdError as error:
            return error
        return _Ready(asked, fetch, held, unknown_user=stored is None and given is None)

    def _answer(self, ready: _Ready, logits: Float32Array) -> Scores:
        """Logits (C, K) of padded rows as the answer to the request."""
        request, clock, rows = ready.asked.request, ready.asked.clock, ready.fetch.candidates
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
            degraded=self.features.degraded(ready.fetch),
            rows=ready.fetch.counts,
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
            StoreFailure: the events are not stored.
        """
        appended = self.features.append(user_id, events)
        return appended.stored, appended.unknown


def _check_deadline(asked: _Asked) -> None:
    if asked.deadline is not None and time.perf_counter() >= asked.deadline:
        spent = ", ".join(f"{stage} {ms:.1f} ms" for stage, ms in asked.clock.timings_ms().items())
        raise DeadlineExceeded(f"timeout_ms passed on the way: {spent}")
