"""The request path: RankRequest -> admission -> features -> state -> scores, in one function (`Ranker._rank`).

HTTP, the command line and the library all call a Ranker. It holds one model version: its artifact, store, compiled
graphs and waiting line.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np

from rankd.artifact import Artifact
from rankd.engine.backend import Backend, EngineConfig, Executor, load_backend
from rankd.errors import DeadlineExceeded, InvalidRequest
from rankd.features.assembly import assemble
from rankd.features.catalogue import Catalogue
from rankd.features.requests import check_request, history_of_events, request_time, user_features_with
from rankd.features.schema import UNKNOWN_ROW
from rankd.features.store import FeatureStore, MemoryStore, empty_history
from rankd.observe.clocks import StageClock
from rankd.schedule.line import WaitingLine
from rankd.types import Event, Features, Float32Array, RankRequest, Scores

MAX_WAITING = 1000


class Ranker:
    """One model version, ready to rank. Make it with `Ranker.load`; close it, or use it as a context manager."""

    def __init__(
        self,
        artifact: Artifact,
        catalogue: Catalogue,
        store: FeatureStore,
        backend: Backend,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self.artifact, self.catalogue, self.store, self.backend = artifact, catalogue, store, backend
        self.manifest, self.schema = artifact.manifest, artifact.schema
        self._executors = [backend.executor() for _ in range(backend.num_executors)]
        self.line = WaitingLine(self._executors, max_waiting, name=artifact.manifest.name)
        self._weights = np.asarray([task.rank_weight for task in self.schema.tasks], np.float32)

    @classmethod
    def load(
        cls,
        path: str | Path,
        engine: EngineConfig | None = None,
        histories: str | Path = "",
        items: str | Path = "",
        max_waiting: int = MAX_WAITING,
    ) -> Self:
        """Open, verify, compile and warm a version folder (or a model folder: its latest version).

        `histories` and `items` are Parquet files that take the place of the artifact's own (`features.parquet`).

        Raises:
            ArtifactError: the artifact is missing, damaged, or not built for this engine.
            DataError: a Parquet file that does not fit the model.
        """
        artifact = Artifact.open(Path(path))
        catalogue = Catalogue.load(artifact.path / "tables", artifact.schema)
        if histories or items:
            from rankd.features.parquet import with_histories, with_items

            catalogue = with_histories(catalogue, artifact.schema, Path(histories)) if histories else catalogue
            catalogue = with_items(catalogue, artifact.schema, Path(items)) if items else catalogue
        backend = load_backend(artifact, engine or EngineConfig())
        ranker = cls(artifact, catalogue, MemoryStore(artifact.schema, catalogue), backend, max_waiting)
        ranker.start()
        return ranker

    def start(self) -> None:
        """Warm every shape on every executor, then accept requests."""
        for executor in self._executors:
            self._warm(executor)
        self.line.start()

    def close(self) -> None:
        """Finish the accepted requests and end the threads."""
        self.line.close()

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
        return self.line.submit(lambda executor: self._rank(request, executor, clock, deadline), deadline)

    def _rank(self, request: RankRequest, executor: Executor, clock: StageClock, deadline: float | None) -> Scores:
        """The way of a request, once it is its turn."""
        clock.lap("queue")
        schema = self.schema
        rows = self.catalogue.rows_of(request.candidates)
        stored = self.store.history(request.user_id) if request.history is None else None
        given = None if request.history is None else history_of_events(request.history, schema, self.catalogue)[0]
        history = given if given is not None else stored if stored is not None else empty_history(schema)
        now = request_time(request, schema, history)
        user = user_features_with(request.context, self.store.user_features(request.user_id), schema, self.catalogue)
        features = assemble(schema, self.store.items(), history, rows, user, now)
        clock.lap("features")
        _check_deadline(deadline, clock)
        state = executor.encode(features.history)
        clock.lap("encode")
        _check_deadline(deadline, clock)
        scores = executor.score(state, features.candidates)[: features.num_candidates]
        clock.lap("score")
        scores[rows == UNKNOWN_ROW] = schema.missing_item_score
        order = self._order(scores, request.top_k)
        answer = Scores(
            model=self.manifest.name,
            version=self.manifest.version,
            candidates=request.candidates if order is None else tuple(request.candidates[i] for i in order),
            tasks=schema.task_names,
            scores=scores if order is None else scores[order],
            unknown=tuple(request.candidates[i] for i in np.flatnonzero(rows == UNKNOWN_ROW)),
            unknown_user=stored is None and given is None,
            request_id=request.request_id,
        )
        clock.lap("order")
        return replace(answer, timings_ms=clock.timings_ms())

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

    def _warm(self, executor: Executor) -> None:
        """Run every pair of a history bucket and a candidate bucket, so that no request pays for a first call."""
        for tokens in self.schema.history_buckets:
            for candidates in self.schema.candidate_buckets:
                features = self._filled(tokens, candidates)
                executor.score(executor.encode(features.history), features.candidates)

    def _filled(self, tokens: int, candidates: int) -> Features:
        """Features of the given padded sizes, of zeros."""

        def shape(dims: tuple[int | str, ...]) -> list[int]:
            return [{"B": 1, "T": tokens, "C": candidates}[d] if isinstance(d, str) else d for d in dims]

        manifest = self.manifest
        return Features(
            history={s.name: np.zeros(shape(s.shape), s.dtype) for s in manifest.history_inputs},
            candidates={s.name: np.zeros(shape(s.shape), s.dtype) for s in manifest.candidate_inputs},
            num_candidates=candidates,
        )


def _check_deadline(deadline: float | None, clock: StageClock) -> None:
    if deadline is not None and time.perf_counter() >= deadline:
        spent = ", ".join(f"{stage} {ms:.1f} ms" for stage, ms in clock.timings_ms().items())
        raise DeadlineExceeded(f"timeout_ms passed on the way: {spent}")
