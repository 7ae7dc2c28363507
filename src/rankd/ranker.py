"""A model version, ready to rank: `Ranker.load`, then `submit` or `rank`.

It holds the version's artifact, features, compiled graphs, user states and schedule. HTTP, gRPC, the command line and
the library all call it. What a remote feature store has to be asked is asked on submission, and tables on shards when
it has answered; a request comes to its turn when all answers are there, and one whose history has to be encoded anyway
does so meanwhile. What happens then is in `request_path.py`, and when it happens in `schedule/`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np

from rankd.artifact import Artifact
from rankd.embeddings.pooling import TableSource
from rankd.engine import thread_plan
from rankd.engine.backend import Backend, EngineConfig, Executor, Precision
from rankd.engine.mixed_targets import kinds_of
from rankd.engine.targets import load_backend
from rankd.engine.warming import Shapes, encode_ms, most_new_tokens, score_ms, warm
from rankd.errors import InvalidRequest, Unavailable
from rankd.features import assembly
from rankd.features.catalogue import Catalogue
from rankd.features.embedded import EmbeddedInputs
from rankd.features.feature_config import FeatureConfig
from rankd.features.reading.shared_features import FeatureService
from rankd.features.reading.version_features import Fetch, VersionFeatures
from rankd.features.requests import check_request
from rankd.observe.clocks import StageClock
from rankd.observe.schedule_metrics import ScheduleFigures
from rankd.observe.state_metrics import StateCounts
from rankd.observe.table_metrics import TableFigures
from rankd.observe.tracing import RequestTrace
from rankd.request_path import RankItem, RequestPath
from rankd.schedule.core_sharing import Cores
from rankd.schedule.costs import Warmed
from rankd.schedule.kinds import Mix
from rankd.schedule.packing import Packing, measure
from rankd.schedule.policy import Priority, Rules
from rankd.schedule.schedule_config import ScheduleConfig, make_rules
from rankd.schedule.scheduler import Scheduler
from rankd.schedule.served import Asked
from rankd.shards.table_config import TableConfig, open_tables, with_sums
from rankd.states.lending import States
from rankd.states.open_states import engine_state_type, open_states
from rankd.states.state_config import StateConfig
from rankd.types import Event, Float32Array, RankRequest, Scores

ASKING_THREADS = 2
"""Ask shards for requests whose features are there. Routing takes a while, and sending to a shard that has stalled: the
threads that say so are the event loop's and the store's, which may not wait."""
COMPUTE_RESERVE = 2.0
"""A request with a deadline keeps so many times its predicted work for its own computation."""


@dataclass(slots=True, eq=False)
class ExecutorKind:
    """The executors of one backend, which are alike, and how many users their calls serve."""

    backend: Backend
    executors: list[Executor]
    packing: Packing


class Ranker:
    """One model version, ready to rank. Make it with `Ranker.load`; close it, or use it as a context manager."""

    def __init__(
        self,
        artifact: Artifact,
        catalogue: Catalogue,
        features: VersionFeatures,
        backend: Backend,
        states: States,
        schedule: ScheduleConfig | None = None,
        tables: TableSource | None = None,
        cores: Cores | None = None,
    ) -> None:
        self.artifact, self.catalogue, self.features, self.backend = artifact, catalogue, features, backend
        self.manifest, self.schema, self.states = artifact.manifest, artifact.schema, states
        self._embedded = EmbeddedInputs(artifact.schema, tables) if tables is not None else None
        self.path = RequestPath(
            artifact.manifest, catalogue, features, states, self._begin, self._embedded, backend.host_memory
        )
        self._kinds = [
            ExecutorKind(one, [one.executor() for _ in range(one.num_executors)], Packing())
            for one in kinds_of(backend)
        ]
        self._executors = [executor for kind in self._kinds for executor in kind.executors]
        self._shapes = Shapes(self.manifest, backend.state_type, backend.host_memory)
        self._own_service: FeatureService | None = None
        self._config, self._cores = schedule or ScheduleConfig(), cores
        self._asking = ThreadPoolExecutor(ASKING_THREADS, thread_name_prefix="rankd-asking")
        self._schedule: Scheduler[RankItem, Scores, Executor] | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        engine: EngineConfig | None = None,
        histories: str | Path = "",
        items: str | Path = "",
        states: StateConfig | None = None,
        features: FeatureService | None = None,
        schedule: ScheduleConfig | None = None,
        tables: TableConfig | None = None,
        cores: Cores | None = None,
    ) -> Self:
        """Open, verify, compile and warm a version folder (or a model folder: its latest version).

        `histories` and `items` are Parquet files that take the place of the artifact's own (`features.parquet`).
        `features` is the server's; without it there is one in memory, for this ranker alone. `tables` says where
        embedding tables are that the model has beside its graph: in this process, or on shards. Versions that are given
        the same `cores` share them.

        Raises:
            ArtifactError: the artifact is missing, damaged, or not built for this engine.
            ConfigError: an unknown target, states that cannot be kept as configured, or a feature store whose columns
                are of another kind than the model's.
            DataError: a Parquet file that does not fit the model.
            Unavailable: a shard with embedding tables cannot be asked.
        """
        artifact = Artifact.open(Path(path))
        catalogue = Catalogue.load(artifact.path / "tables", artifact.schema)
        if histories or items:
            from rankd.features.parquet import with_histories, with_items

            catalogue = with_histories(catalogue, artifact.schema, Path(histories)) if histories else catalogue
            catalogue = with_items(catalogue, artifact.schema, Path(items)) if items else catalogue
        keep = states or StateConfig()
        with ExitStack() as on_failure:
            backend = load_backend(artifact, engine or EngineConfig(), engine_state_type(keep))
            on_failure.callback(backend.close)
            service = features or FeatureService(FeatureConfig())
            version = VersionFeatures(artifact.schema, catalogue, service.of(artifact.manifest.name))
            placed = with_sums(tables or TableConfig(), backend.precision is Precision.BF16)
            source = open_tables(artifact.path, artifact.schema.embedded_widths, placed)
            if source is not None:
                on_failure.callback(source.close)
            kept = open_states(artifact, backend, keep)
            ranker = cls(artifact, catalogue, version, backend, kept, schedule, source, cores)
            ranker._own_service = None if features is not None else service
            ranker.start()
            on_failure.pop_all()
        return ranker

    def start(self) -> None:
        """Warm every shape on every executor, measure what they take, then accept requests."""
        shapes = self._shapes
        warmed = [self._measured(kind) for kind in self._kinds]
        assembly.warm(self.schema, self.features.items)
        extends = []
        for kind, measured in zip(self._kinds, warmed, strict=True):
            self.path.use_packing(kind.packing, kind.executors)
            for executor in kind.executors:
                self._warm(executor, kind)
            extends.append(most_new_tokens(kind.executors[0], shapes, measured.encode_ms))
        self.states.extend_up_to({room: min(most[room] for most in extends) for room in shapes.rooms})
        self.open(*warmed)

    def use_packing(self, packing: Packing) -> None:
        """Say how many users share a call, and make room for their inputs; not while requests are served."""
        for kind in self._kinds:
            kind.packing = packing
            self.path.use_packing(packing, kind.executors)

    def open(self, *warmed: Warmed) -> None:
        """Accept requests, on executors that are warm. `warmed` is what calls of each kind of executors were measured
        to take."""
        rules = [self._rules(kind, one) for kind, one in zip(self._kinds, warmed, strict=True)]
        self._schedule = Scheduler(
            self._executors,
            self.path,
            rules[0] if len(rules) == 1 else Mix(rules),
            self._config.limits(),
            [partial(self._another_executor, kind) for kind in self._kinds],
            self._config.hang_seconds,
            self.manifest.name,
            on_start=partial(thread_plan.apply, self.backend.plan),
            cores=self._cores,
        )
        self._schedule.start()

    @property
    def schedule(self) -> Scheduler[RankItem, Scores, Executor]:
        """The schedule.

        Raises:
            Unavailable: the ranker was not started.
        """
        if self._schedule is None:
            raise Unavailable("this model is not taking requests: it is loading; try again soon")
        return self._schedule

    def close(self) -> None:
        """Finish the accepted requests, end the threads, put the states away."""
        if self._schedule is not None:
            self._schedule.close()
        self.backend.close()
        self._asking.shutdown()
        self.states.close()
        self.features.close()
        if self._embedded is not None:
            self._embedded.close()
        if self._own_service is not None:
            self._own_service.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rank(self, request: RankRequest) -> Scores:
        """Score the candidates of a request; see `submit`."""
        return self.submit(request).result()

    def submit(self, request: RankRequest, trace: RequestTrace | None = None) -> Future[Scores]:
        """Check a request and queue it; what happens with it is noted in `trace`.

        Raises:
            InvalidRequest, Overloaded, Unavailable, DeadlineExceeded: at once.
            DeadlineExceeded, EngineFailure: from the Future.
        """
        clock = StageClock(keep_laps=trace is not None)
        if trace is not None:
            trace.submitted(request, clock)
        check_request(request, self.schema)
        schedule, features = self.schedule, self.features
        deadline = None if request.timeout_ms is None else clock.started + request.timeout_ms / 1e3
        logits: Float32Array = np.empty((len(request.candidates), len(self.schema.tasks)), np.float32)
        item = RankItem(request, clock, logits, deadline, self._ready_by(request, deadline), trace=trace)
        resident = self.has_state(request.user_id)
        asked = Asked(len(request.candidates), resident, deadline, Priority(request.priority), _tokens(request))
        if features.local and not self.path.asks_early:
            return schedule.submit(item, asked)
        schedule.check_room(asked)  # before anything is asked of the store or of shards
        item.fetch = self._begin(item)
        return schedule.submit(item, asked, partial(self._when_ready, item, item.fetch, resident))

    def has_state(self, user_id: str) -> bool:
        """Whether a user's request has no whole history to compute: a state of it is in memory, or there is none."""
        return not self.manifest.split or self.states.has(user_id)

    def work_ms(self, request: RankRequest, resident: bool) -> float:
        """What a request is predicted to take, in milliseconds of one executor; `resident`: as if there were a state of
        its user. It has at most as many candidates as the schema allows."""
        return self.schedule.all_rules.estimates(len(request.candidates), resident, _tokens(request))[0]

    def state_counts(self) -> StateCounts:
        """What the user states did and hold."""
        return self.states.counts()

    def table_figures(self) -> TableFigures | None:
        """What look-ups of tables beside the graph did; None if there are none."""
        return None if self._embedded is None else self._embedded.figures()

    def schedule_figures(self) -> ScheduleFigures:
        """What the schedule did and has before it."""
        return self.schedule.figures()

    def _begin(self, item: RankItem) -> Fetch:
        """Ask for the features of a request. It waits for them no longer than leaves time to compute."""
        request, until = item.request, item.clock.started + self.features.shared.config.wait_ms / 1e3
        if item.ready_by is not None:
            until = min(until, item.ready_by)
        try:
            return self.features.begin(request.user_id, request.candidates, request.history is None, until)
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"an id of the request cannot be written in UTF-8: {error}; send text") from error

    def _ready_by(self, request: RankRequest, deadline: float | None) -> float | None:
        if deadline is None:
            return None
        return deadline - COMPUTE_RESERVE * self.schedule.all_rules.left_ms(len(request.candidates)) / 1e3

    def _when_ready(self, item: RankItem, fetch: Fetch, resident: bool, then: Callable[[], None]) -> None:
        """Call `then` when a request can come to its turn; one that has to be encoded needs no rows for that. Shards
        are asked when its features are there, and it comes when they have answered."""

        def come() -> None:
            item.clock.lap("features")
            then()

        def ask() -> None:
            looking = self.path.look_up_early(item)
            if looking is None:
                come()
            else:
                looking.when_there(come)

        def have_features() -> None:
            if not self.path.asks_early:
                come()
                return
            with suppress(RuntimeError):  # closed: this request has ended before
                self._asking.submit(ask)

        self.features.when_ready(fetch, resident, have_features)

    def _measured(self, kind: ExecutorKind) -> Warmed:
        """What calls of a kind of executors take; how many users share them is noted."""
        shapes, first = self._shapes, kind.executors[0]
        kind.packing = measure(lambda bucket, users: score_ms(first, shapes, bucket, users), shapes.candidate_buckets)
        rooms = shapes.rooms if self.manifest.split else ()
        narrow_ms = {room: encode_ms(first, shapes, room) for room in rooms}
        wide_ms = encode_ms(first, shapes, shapes.rooms[-1], wide=True)
        return Warmed(kind.packing.call_ms, narrow_ms, wide_ms, kind.backend.speed)

    def _rules(self, kind: ExecutorKind, warmed: Warmed) -> Rules:
        buckets, backend = self.schema.candidate_buckets, kind.backend
        rules = make_rules(self._config, buckets, warmed, lambda bucket: kind.packing.most(bucket), len(kind.executors))
        return replace(rules, name=backend.target)

    def _another_executor(self, kind: ExecutorKind) -> Executor:
        """One in place of an executor that was lost, of the same kind, warm."""
        executor = kind.backend.executor()
        self.path.use_packing(kind.packing, [executor])
        self._warm(executor, kind)
        return executor

    def _warm(self, executor: Executor, kind: ExecutorKind) -> None:
        sizes = {bucket: kind.packing.sizes(bucket) for bucket in self.schema.candidate_buckets}
        warm(executor, self._shapes, sizes)

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


def _tokens(request: RankRequest) -> int | None:
    """The events of a request's history; None if it is in a store."""
    return None if request.history is None else len(request.history)
