"""How fast the machine's engine is with a model, beside the original: the same real requests, call by call in turn.

In: the original, requests of the log, a recipe's reference request. Out: `Speed` of the original and of another model.
Cold is a request whose history is encoded, warm one whose state is kept. A request's milliseconds are the best of
a few calls, so that percentiles are over requests, and no neighbour of the machine is in them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec
import numpy as np

from rankd.build.int8_graphs import Int8Plan
from rankd.compress.compression_recipe import ReferenceRequest
from rankd.compress.layer_prices import compiled
from rankd.compress.search_plan import SearchPlan
from rankd.compress.surgery import Subject
from rankd.engine.backend import Executor
from rankd.errors import BuildError
from rankd.features.catalogue import Catalogue
from rankd.train.batches import sample_features
from rankd.train.evaluation import TestEvent
from rankd.train.samples import Dataset
from rankd.types import Features, UserState


class Speed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Milliseconds of one request at a time on one thread, and candidates a second of all executors at once."""

    cold_p50_ms: float
    cold_p99_ms: float
    warm_p50_ms: float
    warm_p99_ms: float
    cold_throughput: float
    warm_throughput: float


class SpeedMeter:
    """Measures models against the original on the same requests; compiles the original once.

    Raises:
        ConfigError: no such target. BuildError: it does not run here, or not such a model.
    """

    def __init__(self, original: Subject, catalogue: Catalogue, requests: Sequence[Features], plan: SearchPlan) -> None:
        self._catalogue, self._requests, self._timing = catalogue, requests, plan.timing
        self._original = self._compile(original, plan.request)

    def measure(self, subject: Subject, request: ReferenceRequest, int8: Int8Plan | None = None) -> tuple[Speed, Speed]:
        """The original's speed and the model's, on the target and in the precision of `request`, or with scales in
        int8, measured in turn.

        Raises:
            BuildError: the target does not take such a model.
        """
        pools = (self._original, self._compile(subject, request, int8))
        contestants = [_Contestant(pool, self._requests, self._timing.throughput_s) for pool in pools]
        for turn in range(self._timing.rounds * len(self._requests)):
            number = turn % len(self._requests)
            for one in contestants if turn % 2 else contestants[::-1]:
                one.time(number)
        for turn in range(2):
            for one in contestants if turn % 2 else contestants[::-1]:
                one.load()
        original, mine = (one.speed() for one in contestants)
        return original, mine

    def _compile(self, subject: Subject, request: ReferenceRequest, int8: Int8Plan | None = None) -> list[Executor]:
        """All executors of an engine, made once: one that is made later is compiled anew."""
        backend, _ = compiled(subject, self._catalogue, request, 0, int8)
        return [backend.executor() for _ in range(backend.num_executors)]


class _Contestant:
    """One model's executors, the states that they keep of all requests, and what was measured."""

    def __init__(self, pool: Sequence[Executor], requests: Sequence[Features], load_s: float) -> None:
        self._pool, self._requests, self._load_s = pool, requests, load_s
        self._states = [_state(pool[0], one) for one in requests]
        self._ms = np.full((2, len(requests)), np.inf)
        self._rates = np.zeros(2)

    def time(self, number: int) -> None:
        """One cold and one warm call of a request."""
        for kind, call in enumerate((self._cold, self._warm)):
            started = time.perf_counter()
            call(self._pool[0], number)
            self._ms[kind, number] = min(self._ms[kind, number], (time.perf_counter() - started) * 1e3)

    def load(self) -> None:
        """All executors at once, each on a thread of its own and never idle."""
        for kind, call in enumerate((self._cold, self._warm)):
            with ThreadPoolExecutor(len(self._pool)) as threads:
                done = threads.map(partial(self._work, call), range(len(self._pool)))
                self._rates[kind] = max(self._rates[kind], sum(done))

    def speed(self) -> Speed:
        """What was measured."""
        (cold_p50, cold_p99), (warm_p50, warm_p99) = np.quantile(self._ms, (0.5, 0.99), axis=1).T.tolist()
        return Speed(cold_p50, cold_p99, warm_p50, warm_p99, *self._rates.tolist())

    def _work(self, call: Callable[[Executor, int], None], place: int) -> float:
        """Candidates a second of one executor."""
        done, number, started, spent = 0, place, time.perf_counter(), 0.0
        while spent < self._load_s:
            call(self._pool[place], number % len(self._requests))
            done += self._requests[number % len(self._requests)].num_candidates
            number += len(self._pool)
            spent = time.perf_counter() - started
        return done / spent

    def _cold(self, executor: Executor, number: int) -> None:
        request = self._requests[number]
        state = UserState(executor.encode(request.history), self._states[number].lengths)
        executor.score([state], request.candidates)

    def _warm(self, executor: Executor, number: int) -> None:
        executor.score([self._states[number]], self._requests[number].candidates)


def requests_of(dataset: Dataset, events: Sequence[TestEvent], plan: SearchPlan) -> list[Features]:
    """Some of the events, spread over them, each with as many candidates as the plan's reference request.

    Raises:
        BuildError: more candidates than a call of the model takes.
    """
    random = np.random.default_rng(plan.seed)
    count = plan.request.candidates or dataset.schema.max_candidates
    if count > dataset.schema.max_candidates:
        raise BuildError(
            f"request.candidates is {count}; a call of this model takes at most {dataset.schema.max_candidates}"
        )
    chosen = np.linspace(0, len(events) - 1, min(plan.timing.requests, len(events))).astype(int)
    made = []
    for event in (events[number] for number in chosen):
        known = dataset.snapshots[event.sample.snapshot].known
        rows = random.choice(known, count, replace=count > len(known)).astype(np.int32)
        made.append(sample_features(dataset, dataset.schema, event.sample, rows))
    return made


def _state(executor: Executor, request: Features) -> UserState:
    arrays = {name: np.array(array) for name, array in executor.encode(request.history).items()}
    return UserState(arrays, tuple(request.history["history_length"][0].tolist()))
