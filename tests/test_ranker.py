"""The request path: events are seen by the very next request, alone and among threads; several users share a call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rankd import Event, Ranker, RankRequest
from rankd.engine.backend import EngineConfig, Precision
from rankd.errors import ConfigError, InvalidRequest
from rankd.schedule.packing import Packing, measure
from rankd.states.state_config import StateConfig

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
        np.testing.assert_array_equal(answer.scores, scores)


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
    prepared = ranker._prepared
    gate = threading.Event()

    def slow(*arguments: object) -> object:
        gate.wait(10)
        return prepared(*arguments)  # type: ignore[arg-type]

    ranker._prepared = slow  # type: ignore[method-assign, assignment]
    futures = [ranker.submit(request) for request in requests]
    late = ranker.submit(RankRequest(users[0], items[:5], timeout_ms=0.001))
    gate.set()
    for future, one in zip(futures, alone, strict=True):
        answer = future.result()
        calls.append(len(answer.candidates))
        assert answer.candidates == one.candidates
        np.testing.assert_allclose(answer.scores, one.scores, atol=1e-4)
    assert late.exception() is not None


def test_a_bad_event_in_a_request_is_answered_alone(ranker: Ranker) -> None:
    items = ranker.catalogue.ids.items[:5]
    ranker.use_packing(Packing({ranker.schema.candidate_buckets[0]: 8}))
    good = [ranker.submit(RankRequest(user, items)) for user in ranker.catalogue.ids.users[:6]]
    bad = ranker.submit(RankRequest("u", items, history=(Event(items[0], "no such event"),)))
    with pytest.raises(InvalidRequest, match="unknown event type"):
        bad.result()
    assert all(future.result().scores.shape[0] == 5 for future in good)


def test_packing_follows_what_was_measured() -> None:
    costs = {(20, 1): 1.0, (20, 2): 1.2, (20, 4): 1.6, (20, 8): 3.2, (100, 1): 5.0, (100, 2): 9.9}
    packing = measure(lambda bucket, users: costs[bucket, users], (20, 100))
    assert (packing.most(20), packing.most(100), packing.most(7)) == (4, 1, 1)
    assert packing.sizes(20) == (1, 2, 4)
    assert [packing.fits(20, count) for count in (1, 2, 3, 4, 9)] == [1, 2, 2, 4, 4]


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
    from rankd.engine.warming import Shapes, most_new_tokens

    most = most_new_tokens(ranker.backend.executor(), Shapes(ranker.manifest, ranker.backend.state_type))
    assert set(most) == set(ranker.schema.history_buckets)
    assert set(most.values()) <= {0, 8, 32}
