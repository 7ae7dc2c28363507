"""The request path: events are seen by the very next request, alone and among threads; several users share a call."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from rankd import Event, Ranker, RankRequest
from rankd.build.pack import BuildOptions, build_artifact
from rankd.engine.backend import EngineConfig, Precision, StateType
from rankd.engine.targets import load_backend
from rankd.errors import ConfigError, DeadlineExceeded, InvalidRequest
from rankd.features.feature_config import FeatureConfig, RowsConfig
from rankd.features.filling.loading import LoadOptions, load_rows
from rankd.features.reading.shared_features import FeatureService
from rankd.features.stores.event_records import RawEvent, pack_events
from rankd.features.stores.store_keys import history_key
from rankd.models.protocol import create_model
from rankd.ranker import COMPUTE_RESERVE
from rankd.schedule.costs import ROW_MS
from rankd.schedule.packing import Packing, measure
from rankd.states.state_config import StateConfig
from rankd.train.recipe import ModelChoice
from rankd.types import Array, Float32Array, UserState
from tests.features.reading.remote_store import RemoteStore
from tests.features.stores.redis_server import eventually
from tests.serve.filled_store import SCHEMA, item_frame
from tests.train.small_log import RECIPE, small_dataset

ENGINE = EngineConfig(executors=2, precision=Precision.FP32)


@pytest.fixture
def ranker(demo_models: Path) -> Iterator[Ranker]:
    """The packaged model with states, for tests that append."""
    with Ranker.load(demo_models / "demo", ENGINE) as opened:
        extend_always(opened)
        yield opened


def extend_always(ranker: Ranker) -> None:
    """Whatever was measured at warm-up: for so small a model it may go either way."""
    ranker.states.extend_up_to(dict.fromkeys(ranker.schema.history_buckets, 32))


def fresh_scores(ranker: Ranker, user: str, items: tuple[str, ...]) -> np.ndarray:
    """The scores of the stored history, computed without any state."""
    history = ranker.features.stored_history(user)
    assert history is not None
    schema = ranker.schema
    events = tuple(
        Event(ranker.catalogue.item_id(int(row)), schema.event_types[int(kind)], int(time))
        for row, kind, time in zip(history.rows, history.events, history.times, strict=True)
    )
    assert history.dropped == 0
    scores = ranker.rank(RankRequest(f"{user} as a stranger", items, history=events)).scores
    return np.asarray(scores)


def test_the_next_rank_sees_the_events(ranker: Ranker) -> None:
    items = ranker.catalogue.ids.items[:20]
    kind = ranker.schema.event_types[0]
    seen = []
    for number in range(12):
        ranker.append_events("newcomer", (Event(items[number % 5], kind, ranker.schema.log_end - 50 + number),))
        answer = ranker.rank(RankRequest("newcomer", items))
        seen.append(answer.state)
        assert ranker.rank(RankRequest("newcomer", items)).state == "cached"
        with Ranker.load(ranker.artifact.path, ENGINE, states=StateConfig(budget_mib=0)) as other:
            for past in range(number + 1):
                event = Event(items[past % 5], kind, ranker.schema.log_end - 50 + past)
                other.append_events("newcomer", (event,))
            expected = other.rank(RankRequest("newcomer", items)).scores
        np.testing.assert_allclose(answer.scores, expected, atol=1e-4)
        if number == 3:
            break
    assert seen[0] == "encoded"
    assert "extended" in seen


def test_read_your_writes_among_threads(ranker: Ranker) -> None:
    """Each thread appends for its own users and for a shared one; after an append it never reads an older history."""
    items, kind, end = ranker.catalogue.ids.items[:20], ranker.schema.event_types[0], ranker.schema.log_end
    clock = iter(range(end - 5000, end))
    lock = threading.Lock()

    def live(name: str) -> None:
        for number in range(15):
            with lock:
                moment = next(clock)
            ranker.append_events(name, (Event(items[number % 7], kind, moment),))
            ranker.append_events("shared", (Event(items[number % 7], kind, moment),))
            mine = ranker.rank(RankRequest(name, items)).scores
            ranker.rank(RankRequest("shared", items))
            np.testing.assert_allclose(mine, ranker.rank(RankRequest(name, items)).scores, atol=1e-5)

    names = [f"thread-{number}" for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(live, name) for name in names]:
            done.result()
    with Ranker.load(ranker.artifact.path, ENGINE, states=StateConfig(budget_mib=0)) as other:
        for name in (*names, "shared"):
            history = ranker.features.stored_history(name)
            assert history is not None
            events = zip(history.rows.tolist(), history.times.tolist(), strict=True)
            other.append_events(name, tuple(Event(ranker.catalogue.item_id(row), kind, time) for row, time in events))
            expected = other.rank(RankRequest(name, items)).scores
            np.testing.assert_allclose(ranker.rank(RankRequest(name, items)).scores, expected, atol=1e-4)
    counts = ranker.state_counts()
    assert counts.origins["extended"] > 0
    assert counts.used_bytes <= counts.budget_bytes


def test_states_survive_a_restart(demo_models: Path, tmp_path: Path) -> None:
    kept = StateConfig(spill=str(tmp_path))
    with Ranker.load(demo_models / "demo", ENGINE, states=kept) as before:
        users, items = list(before.catalogue.ids.users[:5]), before.catalogue.ids.items[:30]
        expected = [before.rank(RankRequest(user, items)).scores for user in users]
    damaged = sorted(tmp_path.rglob("*.state"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    with Ranker.load(demo_models / "demo", ENGINE, states=kept) as after:
        answers = [after.rank(RankRequest(user, items)) for user in users]
        counts = after.state_counts()
    assert sorted(answer.state for answer in answers) == ["encoded"] + ["restored"] * 4
    assert (counts.spill.corrupt, counts.spill.restored) == (1, 4)
    for answer, scores in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer.scores, scores, atol=1e-5)


def test_a_budget_below_one_state_is_refused(demo_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankd.states.cache.MIB", 1000)
    with pytest.raises(ConfigError, match="one state of this model takes up to"):
        Ranker.load(demo_models / "demo", ENGINE, states=StateConfig(budget_mib=1))


def test_requests_that_share_a_call_are_answered_as_alone(ranker: Ranker) -> None:
    """All waiting requests of a bucket in calls of up to four users, whatever pays on this machine."""
    bucket = ranker.schema.candidate_buckets[0]
    ranker.use_packing(Packing({bucket: 4}))
    items, users = ranker.catalogue.ids.items, ranker.catalogue.ids.users[:11]
    requests = [RankRequest(user, items[n : n + 10 + n % 5], top_k=5) for n, user in enumerate(users)]
    alone = [ranker.rank(request) for request in requests]
    calls: list[int] = []
    score, gate = ranker.path.score, threading.Event()

    def slow(*arguments: Any) -> Any:
        gate.wait(10)
        return score(*arguments)

    ranker.path.score = slow  # type: ignore[method-assign, assignment]
    futures = [ranker.submit(request) for request in requests]
    late = ranker.submit(RankRequest(users[0], items[:5], timeout_ms=100.0))
    with pytest.raises(DeadlineExceeded):
        late.result()
    gate.set()
    for future, one in zip(futures, alone, strict=True):
        answer = future.result()
        calls.append(len(answer.candidates))
        assert answer.candidates == one.candidates
        np.testing.assert_allclose(answer.scores, one.scores, atol=1e-4)
    assert ranker.schedule_figures().counts.late == 1


def test_a_bad_event_in_a_request_is_answered_alone(ranker: Ranker) -> None:
    items = ranker.catalogue.ids.items[:5]
    ranker.use_packing(Packing({ranker.schema.candidate_buckets[0]: 8}))
    good = [ranker.submit(RankRequest(user, items)) for user in ranker.catalogue.ids.users[:6]]
    bad = ranker.submit(RankRequest("u", items, history=(Event(items[0], "no such event"),)))
    with pytest.raises(InvalidRequest, match="unknown event type"):
        bad.result()
    assert all(future.result().scores.shape[0] == 5 for future in good)


@pytest.mark.parametrize("request_", [RankRequest("\ud800", ("a",)), RankRequest("u", ("a", "\ud800"))])
def test_an_id_that_is_no_text_is_refused(ranker: Ranker, request_: RankRequest) -> None:
    with pytest.raises(InvalidRequest, match="UTF-8"):
        ranker.rank(request_)


def test_packing_follows_what_was_measured() -> None:
    costs = {(20, 1): 1.0, (20, 2): 1.2, (20, 4): 1.6, (20, 8): 3.2, (100, 1): 5.0, (100, 2): 9.9}
    packing = measure(lambda bucket, users: costs[bucket, users], (20, 100))
    assert (packing.most(20), packing.most(100), packing.most(7)) == (4, 1, 1)
    assert packing.sizes(20) == (1, 2, 4)
    assert [packing.fits(20, count) for count in (1, 2, 3, 4, 9)] == [1, 2, 2, 4, 4]


def test_the_schedule_goes_by_what_executors_get_done_at_once(ranker: Ranker) -> None:
    (kind,) = ranker._kinds
    assert ranker.schedule.rules.costs.speed.curve is None  # on the CPU they are independent
    kind.backend.speed = (1.0, 1.2)
    assert ranker._rules(kind, ranker._measured(kind)).costs.speed.curve == (1.0, 1.2)


def test_few_new_events_are_extended_only_where_that_was_measured_to_pay(ranker: Ranker) -> None:
    items, kind = ranker.catalogue.ids.items[:5], ranker.schema.event_types[0]
    event = Event(items[0], kind, ranker.schema.log_end - 9)
    origins = []
    for most in (32, 0, 1, 32):
        ranker.states.extend_up_to(dict.fromkeys(ranker.schema.history_buckets, most))
        ranker.append_events("somebody else", (event, event) if most == 1 else (event,))
        origins.append(ranker.rank(RankRequest("somebody else", items)).state)
    assert origins == ["encoded", "encoded", "encoded", "extended"]


def test_what_pays_is_measured_for_every_room(ranker: Ranker) -> None:
    from rankd.engine.warming import Shapes, encode_ms, most_new_tokens

    executor, shapes = ranker.backend.executor(), Shapes(ranker.manifest, ranker.backend.state_type)
    most = most_new_tokens(executor, shapes, {room: encode_ms(executor, shapes, room) for room in shapes.rooms})
    assert set(most) == set(ranker.schema.history_buckets)
    assert set(most.values()) <= {0, 8, 32}


@pytest.fixture(scope="module")
def pooling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranker]:
    """A model without a state of its own, which gets the history itself with every call."""
    dataset, kind = small_dataset(), "examples/attentive_pooling.py:AttentivePooling"
    torch.manual_seed(1)
    model = create_model(kind, dataset.schema, {})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    recipe = msgspec.structs.replace(RECIPE, model=ModelChoice(kind, {}))
    root = tmp_path_factory.mktemp("models")
    place = build_artifact(root, model.eval(), dataset, recipe, BuildOptions("films", "1"))
    with Ranker.load(place, EngineConfig(executors=1, precision=Precision.FP32)) as opened:
        yield opened


def test_the_history_that_stands_for_a_state_stays_as_it_came(pooling: Ranker) -> None:
    """In whatever an engine would keep states of its own: the graph reads the numbers of events in float32."""
    for wanted in (None, *StateType):
        assert load_backend(pooling.artifact, EngineConfig("openvino"), wanted).state_type is StateType.FP32


def test_users_without_states_that_share_a_call_are_scored_as_alone(pooling: Ranker) -> None:
    """Each with its own history: what one of them is scored by lies where the next one of the call does not write."""
    bucket, items = pooling.schema.candidate_buckets[0], pooling.catalogue.ids.items
    pooling.use_packing(Packing({bucket: 4}))
    users = (*pooling.catalogue.ids.users[:18], "somebody new")
    requests = [RankRequest(user, items[n : n + 3 + n % 5]) for n, user in enumerate(users)]
    alone = [pooling.rank(request).scores for request in requests]
    executor, gate = pooling._executors[0], threading.Event()
    score, sizes = executor.score, list[int]()

    def slow(states: Sequence[UserState], candidates: Mapping[str, Array]) -> Float32Array:
        gate.wait(10)
        sizes.append(len(states))
        return score(states, candidates)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "score", slow)
        futures = [pooling.submit(request) for request in requests]
        gate.set()
        for future, scores in zip(futures, alone, strict=True):
            np.testing.assert_allclose(future.result().scores, scores, atol=1e-5)
    assert sizes.count(4) >= 4
    assert sum(sizes) == len(requests)


class OverStore:
    """The packaged model over a store that does what the test says; `fresh` has the store's rows by way of a file,
    `plain` knows the artifact's own alone. Requests wait as long as their deadlines let them."""

    def __init__(self, ranker: Ranker, store: RemoteStore, fresh: Ranker, plain: Ranker) -> None:
        self.ranker, self.store, self.fresh, self.plain = ranker, store, fresh, plain
        self.users, self.items = plain.catalogue.ids.users, plain.catalogue.ids.items

    def impatient(self, request: RankRequest) -> RankRequest:
        """The request with a deadline of which all but .1 s is kept for computing, however slow this machine is."""
        rules = self.ranker.schedule.rules
        rules.costs._row.ms = 10_000.0 / len(request.candidates)
        work_ms = rules.work_ms(len(request.candidates), 0.0)
        return replace(request, timeout_ms=COMPUTE_RESERVE * work_ms + 100.0)


@pytest.fixture(scope="module")
def over_store(demo_models: Path, demo_ranker: Ranker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OverStore]:
    path, store = tmp_path_factory.mktemp("rows") / "items.parquet", RemoteStore()
    item_frame(demo_ranker).write_parquet(path)
    load_rows(store, "demo", SCHEMA, path, LoadOptions(grace_seconds=0), lambda done, total, line: None)
    service = FeatureService(FeatureConfig(wait_ms=600_000.0, items=RowsConfig(budget_mib=1.0)), store)
    with (
        Ranker.load(demo_models / "demo", ENGINE, items=path) as fresh,
        Ranker.load(demo_models / "demo", ENGINE, features=service) as ranker,
    ):
        yield OverStore(ranker, store, fresh, demo_ranker)
        store.release_all()
    service.close()


@pytest.fixture
def over(over_store: OverStore) -> Iterator[OverStore]:
    yield over_store
    over_store.store.release_all()
    over_store.ranker.schedule.rules.costs._row.ms = ROW_MS


def test_rows_of_a_remote_store_are_what_is_ranked(over: OverStore) -> None:
    for number, user in enumerate((*over.users[:10], "somebody new")):
        request = RankRequest(user, over.items[number * 20 : number * 20 + 15 + number])
        answer = over.ranker.rank(request)
        np.testing.assert_allclose(answer.scores, over.fresh.rank(request).scores, atol=1e-5)
        assert answer.degraded == ()
        assert answer.rows["items"].fresh == len(request.candidates)
        assert answer.rows["histories"].fresh == 1
        assert answer.unknown_user == (user == "somebody new")


def test_a_request_whose_rows_never_come_is_answered_from_the_artifact_and_says_so(over: OverStore) -> None:
    over.store.holds = {"get"}
    request = RankRequest(over.users[20], over.items[300:320])
    answer = over.ranker.rank(over.impatient(request))
    np.testing.assert_allclose(answer.scores, over.plain.rank(request).scores, atol=1e-5)
    assert answer.degraded == ("items_default",)
    assert answer.rows["items"].default == 20
    over.store.release_all()
    again = over.ranker.rank(request)  # what came too late is there for the next one
    np.testing.assert_allclose(again.scores, over.fresh.rank(request).scores, atol=1e-5)
    assert again.degraded == ()


def test_a_request_whose_history_never_comes_is_answered_with_the_artifacts(over: OverStore) -> None:
    over.store.holds = {"history"}
    request = RankRequest(over.users[21], over.items[:20])
    answer = over.ranker.rank(over.impatient(request))
    np.testing.assert_allclose(answer.scores, over.fresh.rank(request).scores, atol=1e-5)
    assert answer.degraded == ("history_default",)


def test_a_deadline_that_passes_while_the_store_is_waited_for(over: OverStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankd.ranker.COMPUTE_RESERVE", 0.0)  # else it may be answered just in time
    over.store.holds = {"get", "history"}
    late = over.ranker.submit(RankRequest(over.users[22], over.items[340:360], timeout_ms=500.0))
    with pytest.raises(DeadlineExceeded):
        late.result(20)
    eventually(lambda: over.ranker.schedule.unfinished == 0, "it has left the line")


def test_a_history_is_encoded_while_rows_are_on_their_way(over: OverStore) -> None:
    user = over.users[23]
    over.store.holds = {"get", "history"}
    request = RankRequest(user, over.items[360:380])
    future = over.ranker.submit(request)
    (history,) = (number for number, call in enumerate(over.store.waiting) if call.kind == "history")
    assert not over.ranker.states.has(user)
    over.store.release(history)
    eventually(lambda: over.ranker.states.has(user), "its history is encoded")
    assert not future.done()
    over.store.release_all()
    answer = future.result(20)
    np.testing.assert_allclose(answer.scores, over.fresh.rank(request).scores, atol=1e-5)
    assert answer.degraded == ()


def test_a_request_that_waits_for_rows_holds_up_nobody(over: OverStore) -> None:
    """Its state is there, so it takes its place in the line when its rows have come."""
    user = over.users[24]
    over.ranker.rank(RankRequest(user, over.items[:20]))
    over.store.holds = {"get"}
    waiting = [over.ranker.submit(RankRequest(user, over.items[400 + 20 * n : 420 + 20 * n])) for n in range(5)]
    for _ in range(10):
        assert over.ranker.submit(RankRequest(user, over.items[:20])).result(20).state == "cached"
    assert not any(future.done() for future in waiting)
    over.store.release_all()
    assert [future.result(20).degraded for future in waiting] == [()] * 5


def test_events_are_seen_by_the_next_request_whoever_appended_them(over: OverStore) -> None:
    kind, end, user = over.plain.schema.event_types[0], over.plain.schema.log_end, "a customer"
    raw = pack_events([RawEvent(over.items[3], kind, end - 40, {})])
    over.store.append_elsewhere(history_key("demo", user), raw).result()
    events = [Event(over.items[3], kind, end - 40)]
    for number in range(4):
        request = RankRequest(user, over.items[:20])
        expected = over.fresh.rank(replace(request, user_id="a stranger", history=tuple(events)))
        np.testing.assert_allclose(over.ranker.rank(request).scores, expected.scores, atol=1e-4)
        events.append(Event(over.items[number], kind, end - 30 + number))
        assert over.ranker.append_events(user, (events[-1],))[0] == len(events)
