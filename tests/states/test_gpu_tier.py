"""What the cache tells an engine that keeps states by itself: marks that name contents. Requests counted by tier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from prometheus_client.core import Metric

from rankd.engine.backend import StateType
from rankd.features.reading.stored_events import join
from rankd.observe.state_metrics import GpuCounts, StateCollector, StateCounts
from rankd.states.cache import StateCache
from rankd.states.spill import SpillTier
from rankd.states.state_config import MIB, StateConfig, Storage
from rankd.states.storage import StateLayout
from rankd.types import Array, UserHistory, UserState
from tests.states.plain_model import SPECS, PlainExecutor, plain_schema, score_of, tokens_of, truth

SCHEMA = plain_schema(window_step=4)


class Keeping(PlainExecutor):
    """Keeps what it makes, and sees to it that one mark is one state."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[bytes] = []
        self.gone: set[bytes] = set()

    def keep(self, mark: bytes) -> None:
        """It is there now."""
        self.kept.append(mark)

    def has(self, mark: bytes) -> bool:
        """Unless it has left."""
        return mark in self.kept and mark not in self.gone

    def counts(self) -> GpuCounts:
        """Some."""
        return GpuCounts(found=7, states=len(self.kept))


class Extending(Keeping):
    """Of an extension only the new part is there."""

    def extend(self, state: UserState, new: Mapping[str, Array]) -> Mapping[str, Array]:
        """The state that is extended has the mark under which it was kept."""
        assert self.has(state.mark)
        return super().extend(state, new)


def history_of(rows: list[int], since: int = 0) -> UserHistory:
    times = np.arange(since, since + len(rows), dtype=np.int64) * 86_400
    kinds = np.zeros(len(rows), np.int32)
    return UserHistory(np.asarray(rows, np.int32), kinds, times, np.ones((len(rows), 1), np.float32))


def cache_of(
    gpu: Keeping, spill: SpillTier | None = None, storage: Storage = Storage.AUTO, users: int = 4
) -> StateCache:
    layout = StateLayout(SPECS, StateType.FP32, storage)
    rooms = SCHEMA.history_buckets
    budget = users * layout.size_bytes(rooms[-1])
    return StateCache(layout, rooms, True, StateConfig(storage=storage), spill, budget, gpu=gpu)


def lent(cache: StateCache, executor: Keeping, user: str, history: UserHistory) -> UserState:
    """The state of a request, which is right."""
    with cache.held(user, history, lambda: tokens_of(history, SCHEMA), executor) as held:
        if cache.layout.direct:
            np.testing.assert_array_equal(score_of(held.state), truth(history, SCHEMA))
        return held.state


def test_a_state_has_the_mark_that_it_was_kept_under_and_another_one_when_it_has_grown() -> None:
    for storage in (Storage.AUTO, Storage.INT8):
        executor = Extending()
        cache = cache_of(executor, storage=storage)
        first = history_of([1, 2, 3])
        longer = join(first, history_of([4], since=3))
        states = [lent(cache, executor, "ada", one) for one in (first, first, longer, longer)]
        assert [state.mark for state in states] == [executor.kept[0]] * 2 + [executor.kept[1]] * 2
        assert len(set(executor.kept)) == 2
        assert all(executor.kept)
        assert (executor.encoded, executor.extended) == (1, 1)


def test_another_history_has_another_mark_and_the_same_one_has_the_same() -> None:
    executor = Keeping()
    cache = cache_of(executor)
    marks = [lent(cache, executor, user, history_of(rows)).mark for user, rows in (("a", [1]), ("b", [2]), ("c", [1]))]
    assert marks[0] == marks[2] != marks[1]


def test_a_state_that_is_not_kept_has_no_mark() -> None:
    executor = Keeping()
    cache = cache_of(executor, users=1)
    history = history_of([1, 2])
    with cache.held("ada", history, lambda: tokens_of(history, SCHEMA), executor) as held:
        assert held.state.mark == executor.kept[0]
        assert lent(cache, executor, "bob", history_of([3])).mark == b""
    assert len(executor.kept) == 1


def test_requests_are_counted_by_where_their_state_lay(tmp_path: Path) -> None:
    executor = Keeping()
    spill = SpillTier(tmp_path, "plain", "1", "identity", MIB)
    cache = cache_of(executor, spill, users=1)
    ada, bob = history_of([1, 2]), history_of([3, 4])
    lent(cache, executor, "ada", ada)  # computed
    mark = lent(cache, executor, "ada", ada).mark  # in the GPU's memory
    executor.gone.add(mark)
    lent(cache, executor, "ada", ada)  # in the host's
    lent(cache, executor, "bob", bob)  # computed; the other one goes to disk
    lent(cache, executor, "ada", ada)  # from there
    counts = cache.counts()
    assert counts.tiers == {"gpu": 1, "host": 1, "disk": 1, "computed": 2}
    assert counts.origins == {"cached": 2, "restored": 1, "extended": 0, "encoded": 2}
    assert counts.gpu.found == 7


def test_the_tiers_are_metrics() -> None:
    collector = StateCollector()
    origins = {"cached": 5, "restored": 1, "extended": 2, "encoded": 3}
    collector.show({("m", "1"): StateCounts(origins, in_gpu=4, gpu=GpuCounts(6, 2, 1, 3, 100, 200))})
    metrics: dict[str, Metric] = {metric.name: metric for metric in collector.collect()}
    tiers = {sample.labels["tier"]: sample.value for sample in metrics["rankd_state_tiers"].samples}
    assert tiers == {"gpu": 4, "host": 1, "disk": 1, "computed": 5}
    gpu = {name: metrics[name].samples[0].value for name in metrics if name.startswith("rankd_gpu_")}
    assert gpu == {
        "rankd_gpu_states_found": 6,
        "rankd_gpu_states_sent": 2,
        "rankd_gpu_states_evicted": 1,
        "rankd_gpu_states": 3,
        "rankd_gpu_state_bytes": 100,
        "rankd_gpu_state_budget_bytes": 200,
    }
